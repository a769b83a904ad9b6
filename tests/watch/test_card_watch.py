"""A run's card from step to step: memory by phase, energy, what slows it, a driver that fails, several ranks."""

import json
import re

import pytest

from support import nvml
from support.run_folders import rows

pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return nvml.build(tmp_path_factory.mktemp("driver"))


STEP = """
from fastrl.base.spans import Spans
from fastrl.watch.card import open_card
from fastrl.watch.card_watch import CardWatch
spans, lines = Spans(), []
watch = CardWatch(open_card("cuda:0"), spans, lines.append)
MIB = 2**20

def see(used, own, **values):
    readings(f"0 process 0 {own * MIB}", used=used * MIB, **values)
    watch.look()

see(100, 50, millijoules=1_000_000)  # before the first phase: no memory of one
spans.enter("eval")
see(500, 400, millijoules=4_600_000)
watch.begin_step()
spans.enter("rollout")
see(3000, 2000, millijoules=4_700_000, busy=40, sm_mhz=1000, reasons=0x4)
see(1000, 600, millijoules=4_800_000, busy=50, sm_mhz=1200, reasons=0x0)
spans.enter("update")
see(2000, 1500, millijoules=5_000_000, busy=100, sm_mhz=1400, reasons=0x4 | 0x40)
for used in (2200, 2600):
    readings(f"0 process 0 {(used - 500) * MIB}", used=used * MIB, millijoules=5_200_000)
    watch.backward()
found = watch.end_step()  # one more sample of the update: 2600, at the busy, clock and reasons of the last one
wanted = {
    "memory/card_mib/rollout": 3000, "memory/card_mean_mib/rollout": 2000,
    "memory/process_mib/rollout": 2000, "memory/process_mean_mib/rollout": 1300,
    "memory/card_mib/update": 2600, "memory/card_mean_mib/update": 2300,
    "memory/process_mib/update": 2100, "memory/process_mean_mib/update": 1800,
    "memory/card_mib/backward": 2600, "memory/card_mean_mib/backward": 2400,
    "memory/process_mib/backward": 2100, "memory/process_mean_mib/backward": 1900,
    "memory/card_mib/eval": 500, "memory/card_mean_mib/eval": 500,
    "memory/process_mib/eval": 400, "memory/process_mean_mib/eval": 400,
    "gpu/busy_frac": 0.725, "gpu/sm_mhz": 1250, "gpu/power_w": 300,
    "gpu/slowed_frac": 0.75, "gpu/slowed_frac/power_cap": 0.75, "gpu/slowed_frac/hw_thermal": 0.5,
    "energy/step_j": 600, "energy/run_kwh": 4200 / 3.6e6,
}
assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
assert {name: round(value, 9) for name, value in found.items()} == {n: round(v, 9) for n, v in wanted.items()}, found
assert lines == ["warning: hw_thermal held the GPU's clocks down in 50% of the samples; "
                 "look at its cooling and its power supply"]

# the next step: nothing is left of the last one but what the run has used, and a reason is said once
watch.begin_step()
see(1000, 900, millijoules=5_300_000)
found = watch.end_step()
assert not any("eval" in name or "rollout" in name for name in found) and len(lines) == 1
assert round(found["energy/step_j"], 9) == 100 and round(watch.run_kwh() * 3.6e6, 6) == 4300
see(1000, 900, millijoules=200_000)  # a driver that was loaded anew
see(1000, 900, millijoules=250_000)
assert round(watch.run_kwh() * 3.6e6, 6) == 4350
watch.before_kwh = 2.0
assert round(watch.run_kwh() - 2.0, 9) == round(4350 / 3.6e6, 9)
watch.begin_step()
assert round(watch.end_step()["energy/run_kwh"] - 2.0, 9) == round(4350 / 3.6e6, 9)
"""


def test_a_step_by_hand(tmp_path, driver):
    nvml.run_script(tmp_path, driver, STEP)


POWER = """
import fastrl.watch.card_watch as module
from fastrl.watch.card import open_card
clock = iter([0.0, 10.0, 14.0, 14.0])
module.monotonic = lambda: next(clock)
readings(millijoules=None, milliwatts=100_000)
watch = module.CardWatch(open_card("cuda:0"))
watch.look()
readings(millijoules=None, milliwatts=300_000)
watch.begin_step()  # 10 s at 200 W on average
readings(millijoules=None, milliwatts=500_000)
watch.look()  # 4 s at 400 W
found = watch.end_step()
assert (found["energy/step_j"], round(found["energy/run_kwh"] * 3.6e6, 6)) == (1600, 3600), found
"""


def test_energy_of_a_card_without_a_counter_is_its_power_over_time(tmp_path, driver):
    nvml.run_script(tmp_path, driver, POWER)


FEW = """
from fastrl.watch.card import NoCard, open_card
from fastrl.watch.card_watch import CardWatch
readings(millijoules=None, milliwatts=None, used=None, busy=None, reasons=None)
watch = CardWatch(open_card("cuda:0"))
watch.begin_step()
watch.backward()
assert watch.end_step() == {"gpu/sm_mhz": 1410} and watch.run_kwh() is None
for watch in (CardWatch(), CardWatch(NoCard("no driver"))):
    watch.start()
    watch.begin_step()
    watch.backward()
    assert watch.end_step() == {} and watch.run_kwh() is None
    watch.stop()
"""


def test_what_a_card_does_not_tell_is_left_out(tmp_path, driver):
    nvml.run_script(tmp_path, driver, FEW)


LOST = """
import threading, time
from fastrl.base.spans import Spans
from fastrl.watch.card import open_card
from fastrl.watch.card_watch import CardWatch
lines, spans = [], Spans()
watch = CardWatch(open_card("cuda:0"), spans, lines.append)
spans.enter("rollout")
watch.start()
watch.begin_step()
end = time.monotonic() + 60
while watch.memory["card", "rollout"].count < 5:  # the thread's own
    assert time.monotonic() < end
    time.sleep(0.01)
readings("nvmlDeviceGetPowerUsage fails 15")
while not lines:
    assert time.monotonic() < end
    time.sleep(0.01)
for thread in threading.enumerate():
    if thread.name == "card watch":
        thread.join(60)
        assert not thread.is_alive()
watch.backward()
assert watch.end_step()["memory/card_mib/rollout"] == 1024
watch.begin_step()
assert watch.end_step() == {} and watch.run_kwh() is None
assert lines == ["warning: the GPU cannot be read any more, and its metrics end here "
                 "(nvmlDeviceGetPowerUsage: GPU is lost)"]
"""


def test_a_driver_that_fails_ends_the_sampling_and_not_the_run(tmp_path, driver):
    nvml.run_script(tmp_path, driver, LOST)


RANKS = """
from fastrl.base import ranks
from fastrl.watch.card import open_card
from fastrl.watch.card_watch import CardWatch
ranks.start("cpu", 60)
rank = ranks.rank()
MIB = 2**20
readings(cards=2)
watch = CardWatch(open_card(f"cuda:{rank}"))
watch.spans.enter("update")
watch.begin_step()
readings(card=rank, used=(100 + 200 * rank) * MIB, millijoules=5_000_000 + 1000 * (1 + rank), busy=75 - 50 * rank,
         reasons=0x20 * rank)
found = watch.end_step()
# one sample each after the beginning of the step
assert found["energy/step_j"] == 1 + 2 and round(found["energy/run_kwh"] * 3.6e6, 6) == 3, found
assert found["memory/card_mib/update"] == 1024 and found["gpu/busy_frac"] == (0.75 + 0.25) / 2
assert found["memory/card_mean_mib/update"] == (1024 + 100 + 1024 + 300) / 4  # the mean of two means
assert found["gpu/slowed_frac/sw_thermal"] == found["gpu/slowed_frac"] == 1  # the worst
assert round(watch.run_kwh() * 3.6e6, 6) == 3
if rank == 1:
    readings("nvmlDeviceGetPowerUsage fails 15")
watch.begin_step()
found = watch.end_step()
assert not any(name.startswith("energy/") for name in found) and found["gpu/busy_frac"] == 0.75, found
assert watch.run_kwh() is None  # of one card alone would be wrong
ranks.barrier()
ranks.stop()
ranks.leave(0)
"""


def test_ranks_add_up_their_energy_and_the_worst_card_counts(tmp_path, driver):
    nvml.run_script(tmp_path, driver, RANKS, count=2)


RUN = """
from dataclasses import replace
from pathlib import Path
import torch
from fastrl.base.log import RunLog
from fastrl.run.build import build
from fastrl.run.resolve import card_lines, resolve
from fastrl.run.resume import resume
from fastrl.run.sampling import open_rewards
from fastrl.settings.parse import parse
from fastrl.settings.run import AXES, EMBEDDED_RECIPE, TrainConfig
from fastrl.base.spans import Spans
from fastrl.watch.card import open_card
from fastrl.watch.card_watch import CardWatch
torch.set_num_threads(1)
readings("0 process 0 1073741824")
spent = 5_000_000

class Meter(CardWatch):
    # of a card that has used one joule more at every reading

    def look(self):
        global spent
        spent += 1000
        readings("0 process 0 1073741824", millijoules=spent)
        super().look()

def trained(steps, *more):
    argv = [str(EMBEDDED_RECIPE), "--out", "run", "--steps", str(steps), "--problems-per-step", "4",
            "--eval-limit", "4", "--tokens-per-microbatch", "64", "--reward-workers", "1", "--device", "cpu", *more]
    config = parse(TrainConfig, argv, AXES)
    log, spans = RunLog(config.run.folder, total_steps=steps), Spans()
    log.open()
    with open_rewards(config) as rewards:
        watch = Meter(open_card("cuda:0"), spans)
        watch.look()
        trainer = build(resolve(config), log, rewards, spans=spans, card=watch)
        if more:
            resume(trainer, "auto", config)
        trainer.run()
    return watch.run_kwh()

print("spent", trained(2))
print("spent", trained(3, "--resume", "auto"))

# the lines before a run, which on a GPU come from `resolve` itself
readings("0 process 4711 1073741824", used=2**30)
card = open_card("cuda:0")
on_cpu = resolve(parse(TrainConfig, [str(EMBEDDED_RECIPE), "--device", "cpu"], AXES))
assert on_cpu.card is None and card_lines(on_cpu) == []
on_gpu = replace(on_cpu, device="cuda:0", card=card, held=card.held())
print(card_lines(on_gpu))
readings("nvmlInitWithFlags fails 9")
print(card_lines(replace(on_gpu, card=open_card("cuda:0"), held=None)))
"""


def test_a_run_writes_it_down_and_goes_on_counting_after_a_resume(tmp_path, driver, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = nvml.run_script(tmp_path, driver, RUN).splitlines()
    logged = [row for row in rows(tmp_path / "run") if "reward" in row]
    assert [row["step"] for row in logged] == [1, 2, 3]
    for row in logged:
        # begin and end of a step are a reading each, and in between the thread does not run
        assert row["energy/step_j"] == pytest.approx(1.0)
        assert row["memory/process_mean_mib/backward"] == row["memory/card_mib/update"] == 1024
        phases = {name.split("/")[2] for name in row if name.startswith("memory/card_mib/")}
        assert phases >= {"update", "backward"}
    joules = [row["energy/run_kwh"] * 3.6e6 for row in logged]
    assert joules == pytest.approx(
        [2, 4, 6]
    )  # since the first reading two for each step; the log knows of 4 when it resumes
    spent = [float(line.split()[1]) * 3.6e6 for line in lines if line.startswith("spent")]
    assert spent == pytest.approx([5, 7])
    assert lines[-2] == (
        "['gpu: 1024 MiB are held by other processes: unknown (pid 4711) 1024 MiB; the plan leaves them that']"
    )
    assert lines[-1] == "['gpu: no readings beyond those of torch: NVML: Driver Not Loaded']"


PROGRAM = """
from dataclasses import replace
from fastrl import train
from fastrl.watch.card import open_card
readings("0 process 0 1073741824")
resolved = train.resolve
train.resolve = lambda config: replace(resolved(config), card=open_card("cuda:0"))  # as if this torch used it
assert train.main(["--out", "run", "--steps", "1", "--problems-per-step", "4", "--eval-limit", "4",
                   "--reward-workers", "1", "--device", "cpu"]) == 0
"""


def test_the_program_ends_with_its_energy(tmp_path, driver, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = nvml.run_script(tmp_path, driver, PROGRAM).splitlines()
    assert re.match(r"done at step 1 after \d+ s and 0 kWh of the GPUs; run ", lines[-1])
    first, step, *_, last = rows(tmp_path / "run")
    assert step["memory/process_mib/backward"] == 1024 and last == {"step": 1, "energy/run_kwh": 0.0}


BENCHMARK = """
import json
import peak_memory, timing
from fastrl.watch.card import open_card
readings(reasons=0x4 | 0x40, milliwatts=700_000)
with timing.card_watched() as seen:
    pass
assert seen == {"sm_mhz": 1410, "power_w": 700, "slowed_by": "hw_thermal 100%, power_cap 100%"}, seen
readings(milliwatts=500_000, reasons=0)
with timing.card_watched() as calm:
    pass
assert calm == {"sm_mhz": 1410, "power_w": 500}, calm
report = timing.Report("b")
report.add({"ms": 1.0} | seen, {"ms": 1.0} | calm)
report.finish()
readings("0 process 4711 1073741824", "name 4711 /usr/bin/python3", reasons=4)
print(json.dumps(timing.card_state()))
readings("nvmlDeviceGetPowerUsage fails 15")
print(json.dumps(timing.card_state()))
"""


def test_a_benchmark_says_that_it_was_slowed_down(tmp_path, driver):
    warning, throttled, *_, document, state, lost = nvml.run_script(tmp_path, driver, BENCHMARK).splitlines()
    assert warning.startswith("warning: hw_thermal held the GPU's clocks down in 100% of the samples")
    assert throttled == (
        "THROTTLED: the GPU's clocks were held down, in samples of one case each: hw_thermal 100%, power_cap 100%"
    )
    assert [row.get("slowed_by") for row in json.loads(document)["rows"]] == ["hw_thermal 100%, power_cap 100%", None]
    assert json.loads(state) == {
        "driver": "580.95.05",
        "sm_mhz": 1410,
        "top_sm_mhz": 1980,
        "power_w": 500,
        "slowed_by": ["power_cap"],
        "others": "1024 MiB are held by other processes: python3 (pid 4711) 1024 MiB",
    }
    assert json.loads(lost) == {"unknown": "nvmlDeviceGetPowerUsage: GPU is lost"}
