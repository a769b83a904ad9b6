"""SIGTERM and SIGINT in every phase: the run ends with a checkpoint, and what goes on from it is the same run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fastrl import checkpoint
from fastrl.checkpoint.reading import verify
from support import programs
from support.cases import mostly_later
from support.run_folders import digest, leftovers, rows, step_records

SMALL = """
    --problems-per-step 2 --group-size 4 --limit 30 --eval-limit 2 --eval-k 1 --eval-every 4 --save-every 3
    --sample-every 0 --threads 1 --reward last_character --keep 9 --steps 8
""".split()
# visits: generate, grade and eval begin with the first evaluation; data is read once for training, once for evaluation
VISITS = {
    "dataset": (1, 2, 1),
    "generate": (1, 2, 5),
    "grade": (1, 3, 6),
    "forward": (1, 3, 5),
    "optimizer": (1, 3, 5),
    "allgather": (1, 2, 5),
    "save.model": (1, 2, 1),
    "eval": (1, 2, 1),
}
CASES = [(phase, name, trial) for phase in VISITS for name in ("term", "int") for trial in range(3)]
NOW = [("generate", "int", 1)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The undisturbed run of 8 steps."""
    folder = tmp_path_factory.mktemp("straight")
    programs.run(folder, *SMALL)
    return folder / "runs" / "default"


def same(one, other) -> None:
    assert step_records(one) == step_records(other) and len(step_records(one)) == 8
    assert digest(one / "checkpoints/step-8") == digest(other / "checkpoints/step-8")


@pytest.mark.promise("A8")
@pytest.mark.parametrize("phase, name, trial", mostly_later(CASES, *NOW))
def test_a_signal_ends_the_run_with_a_checkpoint(phase, name, trial, straight, tmp_path):
    fault = f"{name}@{phase}:{VISITS[phase][trial]}"
    if trial == 2 and phase in ("dataset", "save.model", "eval"):  # those are few: the signal comes while they last
        fault += f",sleep=0.3@{phase}:1"
    programs.run(tmp_path, *SMALL, code=75, FASTRL_FAULT=fault)
    folder = tmp_path / "runs" / "default"
    status = json.loads((folder / "status.json").read_text())
    assert (status["reason"], status["exit_code"]) == ("stopped", 75)
    newest = checkpoint.newest(folder / "checkpoints")[0]
    assert status["last_checkpoint"].endswith(newest.name) and checkpoint.step_of(newest) == status["step"] < 8
    assert leftovers(folder / "checkpoints") == []
    programs.run(tmp_path, *SMALL, "--resume", "auto")
    same(straight, folder)
    steps = [row["step"] for row in rows(folder) if "eval/arithmetic/avg@1" in row]
    assert len(steps) == len(set(steps))  # none of them is there twice


@pytest.mark.promise("A8")
def test_a_signal_from_outside_ends_the_run_in_ten_seconds(straight, tmp_path):
    run = programs.Run(tmp_path, *SMALL, "--steps", 10**6, "--save-every", 0)
    run.wait_for("step       3/")
    start = time.monotonic()
    run.send(signal.SIGTERM)
    assert run.wait(60) == 75
    assert time.monotonic() - start < 10
    folder = tmp_path / "runs" / "default"
    status = json.loads((folder / "status.json").read_text())
    assert checkpoint.step_of(checkpoint.newest(folder / "checkpoints")[0]) == status["step"] >= 3


@pytest.mark.promise("A8")
@pytest.mark.parametrize("phase", mostly_later(["generate:4", "save.model:2", "eval:2"], "save.model:2"))
def test_a_second_signal_ends_it_at_once(phase, tmp_path):
    point = phase.partition(":")[0]
    run = programs.Run(tmp_path, *SMALL, "--steps", 10**6, FASTRL_FAULT=f"term@{phase},hang@{phase}")
    run.wait_for("step       4/" if point == "eval" else "step       2/" if point == "generate" else "step       6/")
    time.sleep(0.5)
    start = time.monotonic()
    run.send(signal.SIGINT)
    assert run.wait(30) == 130
    assert time.monotonic() - start < 5
    folder = tmp_path / "runs" / "default"
    assert json.loads((folder / "status.json").read_text())["exit_code"] == 130
    if point != "generate":
        checkpoint.load(folder / "checkpoints" / "step-3")


@pytest.mark.promise("A8")
def test_a_second_signal_is_heard_in_a_collective_that_never_ends(tmp_path):
    """The main thread is in gloo then, which does not come back to Python."""
    first, second = programs.ranks(tmp_path, 2, *SMALL, FASTRL_FAULT="hang@generate:rank1:3")
    try:
        first.wait_for("step 1/")
        time.sleep(1.0)
        start = time.monotonic()
        first.send(signal.SIGTERM)
        time.sleep(0.2)
        assert first.process.is_alive()
        first.send(signal.SIGTERM)
        assert first.wait(30) == 130
        assert time.monotonic() - start < 5
    finally:
        second.process.kill()
        second.wait(30)


@pytest.mark.soak
@pytest.mark.promise("A9")
@pytest.mark.parametrize("trial", range(3))
def test_torchrun_waits_for_a_save_of_45_seconds(trial, tmp_path):
    """Two ranks, and a signal to the launcher; its own patience is 30 s."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--shutdown-timeout",
        "600",
        "-m",
        "fastrl.train",
        *SMALL,
        "--steps",
        "100000",
        "--save-every",
        "0",
    ]
    environment = {**os.environ, "FASTRL_FAULT": "sleep=45@save.model:rank0"}
    with (tmp_path / "said.txt").open("w") as said:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=said, stderr=said)
    end = time.monotonic() + 200
    while "step      3/" not in (tmp_path / "said.txt").read_text():
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "said.txt").read_text()[-3000:]
        time.sleep(0.1)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(200)
    assert time.monotonic() - start > 40
    folder = tmp_path / "runs" / "default"
    status = json.loads((folder / "status.json").read_text())
    assert (status["reason"], status["exit_code"]) == ("stopped", 75)
    path = folder / "checkpoints" / f"step-{status['step']}"
    assert status["last_checkpoint"].endswith(path.name) and verify(path)["ranks"] == 2
