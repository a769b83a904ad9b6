"""The watchdog: how long it waits, what it writes, and what it does not take for a hang."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fastrl.base.log import write_json
from fastrl.base.spans import Progress, Spans
from fastrl.settings.run import configure
from fastrl.watch.watchdog import Patience, longest_wait
from support.arguments import SHORT_RUN
from support.process_trees import ProcessTree


def patience(timeout_s: float = 10.0) -> Patience:
    return Patience(timeout_s, tick=1.0, looked=0.0)


def watched(dog: Patience, progress: Progress, start: int, end: int) -> list[int]:
    """Seconds from start to end at which a look, once per second, is an alarm."""
    return [now for now in range(start, end) if dog.look(progress, float(now))]


def test_a_phase_may_be_silent_for_the_timeout_and_three_times_as_long_at_first():
    assert watched(patience(), Progress("update", 1, 0.0), 1, 34) == [31, 32, 33]
    assert watched(patience(), Progress("update", 2, 0.0), 1, 14) == [11, 12, 13]
    dog = patience()
    assert watched(dog, Progress("update", 2, 0.0), 1, 10) == []
    assert watched(dog, Progress("update", 2, 9.0), 10, 21) == [20]  # a sign of progress at 9
    assert watched(patience(), Progress("", 0, 0.0), 1, 99) == []  # nothing has begun: the start has no limit
    assert longest_wait(10.0) == 90.0 and longest_wait(0.0) == 0.0  # collectives wait longer than any first phase


def test_a_phase_that_is_always_slow_may_take_five_times_its_median():
    dog = patience()
    begin = 0
    for visit, length in enumerate((8, 6, 100, 8, 8), start=1):
        watched(dog, Progress("save", visit, float(begin)), begin + 1, begin + length + 1)
        begin += length
    # the longest pauses were 8, 6, 100, 8, 8 seconds: their median is 8, and 5 x 8 = 40
    assert watched(dog, Progress("save", 6, float(begin)), begin + 1, begin + 43) == [begin + 41, begin + 42]
    assert watched(dog, Progress("eval", 2, 300.0), 300, 312) == [311]  # which is no excuse for another phase


def test_pauses_within_a_phase_count_and_not_its_length():
    dog = patience()
    for now in range(1, 100):
        assert not dog.look(Progress("eval", 2, now - 0.5), float(now))
    assert watched(dog, Progress("eval", 3, 99.0), 100, 111) == [110]  # 5 x 0.5 is less than the timeout
    begin = 200
    for visit, length in enumerate((9, 1, 1, 1), start=2):
        watched(dog, Progress("save", visit, float(begin)), begin + 1, begin + length + 1)
        begin += length
    # a long pause is that of its own visit only: the median is 1
    assert watched(dog, Progress("save", 6, float(begin)), begin + 1, begin + 12) == [begin + 11]


def test_a_process_that_was_stopped_has_not_hung():
    dog = patience()
    progress = Progress("update", 2, 0.0)
    assert watched(dog, progress, 1, 9) == []
    assert watched(dog, progress, 500, 513) == [511, 512]  # nobody looked from 8 to 500: counted from there
    assert [now for now in range(517, 530, 5) if dog.look(progress, float(now))] == [517, 522, 527]  # merely late


def test_spans_tell_the_phase_and_its_visits():
    spans = Spans()
    assert spans.progress.phase == ""
    for visit in (1, 2):
        with spans("update"):
            before = spans.progress
            assert before[:2] == ("update", visit)
            spans.beat()
            assert spans.progress[:2] == before[:2] and spans.progress.at > before.at
    spans.enter("eval")
    assert spans.progress[:2] == ("eval", 1) and set(spans.seconds) == {"update"}


# it goes on for a while, is stopped for longer than the timeout in between, and then never returns from a call into C
SCRIPT = """
import ctypes, sys, time
from pathlib import Path
from fastrl.base.spans import Spans
from fastrl.watch.watchdog import Watchdog
spans = Spans()
report = lambda progress, message: Path("report.txt").write_text(f"{progress.phase}: {message}")
Watchdog(spans, 3.0, Path("run"), report=report, others_noticed=sys.exit).start()
for n in range(80):
    spans.enter("update")
    time.sleep(0.05)
    print(n, flush=True)
ctypes.CDLL(None).pause()
"""


def test_a_stopped_process_goes_on_and_a_call_that_never_returns_ends_it(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line == "9\n":
            process.send_signal(signal.SIGSTOP)
            time.sleep(6)
            process.send_signal(signal.SIGCONT)
        if line == "79\n":
            break
    assert line == "79\n"
    assert process.wait(timeout=60) == 5
    process.stdout.close()
    assert (tmp_path / "report.txt").read_text().startswith("update: rank 0 of 1: no progress for ")
    stacks = (tmp_path / "run/stacks-rank0.txt").read_text()
    assert 'File "<string>", line 13 in <module>' in stacks  # the call into C


def test_a_report_that_fails_does_not_cost_the_stacks(tmp_path):
    report = 'report = lambda progress, message: Path("report.txt").write_text'
    failing = SCRIPT.replace(report, 'report = lambda progress, message: Path("no/folder").write_text')
    script = failing.replace("range(80)", "range(2)")
    assert script != failing != SCRIPT
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=90
    )
    assert done.returncode == 5 and b"No such file or directory: 'no/folder'" in done.stderr
    stacks = (tmp_path / "run/stacks-rank0.txt").read_text()
    assert 'File "<string>", line 13 in <module>' in stacks


def test_ranks_that_write_one_file_at_once_leave_it_whole(tmp_path):
    """As status.json, when all ranks notice a hang in the same moment."""
    children = []
    for rank in range(4):
        children.append(os.fork())
        if not children[-1]:
            code = 1
            try:
                for n in range(500):
                    write_json(tmp_path / "status.json", {"rank": rank, "n": [n] * 100})
                code = 0
            finally:
                os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0, 0, 0]
    assert json.loads((tmp_path / "status.json").read_text())["n"] == [499] * 100
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


# where a rank stands still: the flag, the phase, a function on its stack and one on the other rank's
STUCK = [
    ("hang@forward:rank1:7", "update", "in backward", 'ranks.py", line'),
    ("hang@generate:rank0:4", "rollout", "in sample", 'ranks.py", line'),
    ("hang@allgather:rank1:4", "update", "in publish", "in all_gather"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, phase, here, there",
    [pytest.param(*STUCK[0], marks=pytest.mark.promise("E3"))]
    + [pytest.param(*stuck, marks=[pytest.mark.promise("E3"), pytest.mark.soak]) for stuck in STUCK[1:]],
)
def test_a_rank_that_stands_still_ends_all_with_their_stacks(fault, phase, here, there, tmp_path):
    timeout_s = 20 if phase == "rollout" else 10
    run = ProcessTree(tmp_path, *SHORT_RUN, "--steps", 8, "--hang-timeout", timeout_s, ranks=2, FASTRL_FAULT=fault)
    code = run.wait()
    ended = time.time()
    assert code == 1  # torchrun says 1 for whatever the ranks say
    errors = run.err.read_text()
    assert errors.count("exitcode  : 5 ") == 2, errors[-3000:]
    assert run.left() == []
    folder = tmp_path / "runs/default"
    rank = int(fault.partition(":rank")[2][0])
    stacks = [(folder / f"stacks-rank{n}.txt").read_text() for n in (rank, 1 - rank)]
    assert here in stacks[0] and "in happen" in stacks[0] and there in stacks[1]
    assert all("watchdog.py" in text and "launch" in text for text in stacks)  # every thread
    status = json.loads((folder / "status.json").read_text())
    assert (status["reason"], status["exit_code"]) == ("hang", 5) and status["message"] in errors
    headline = stacks[0].splitlines()[0]  # of the rank that stands still; the other may notice in the same moment
    assert phase == status["phase"] or f"in phase {phase}, " in headline, (status, headline)
    assert status["step"] >= 2 and status["last_checkpoint"].endswith(f"step-{status['step'] // 2 * 2}")
    last_step = os.path.getmtime(folder / "metrics.jsonl")
    assert timeout_s <= ended - last_step < timeout_s + 40


def test_the_setting_is_checked():
    for bad in ("-1", "nan", "inf"):
        with pytest.raises(ValueError, match="--hang-timeout must be at (least 0|most 1e6)"):
            configure(["--hang-timeout", bad])
