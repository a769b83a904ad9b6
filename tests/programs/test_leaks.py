"""What is left of a run that has ended, however it did: nothing. And what grows in a run that goes on: nothing."""

import os
import signal
import statistics

import pytest

from support.arguments import SHORT_RUN
from support.process_trees import ProcessTree, until
from support.run_folders import rows

WORKERS = ["--reward", "graded.py:graded", "--grade-truncated", "--steps", "40", "--hang-timeout", "60"]
# rewards that need a worker, which the embedded model's digits do not, so that there is a process to leave behind
GRADED = """
from fastrl.rewards.math import Math
verifier = Math(workers=1)
def graded(completions, **columns):
    (grade,) = verifier.grade([r"\\boxed{0.5x}"], [r"\\frac{x}{2}"])
    return [grade.reward * len(text) / 10 for text in completions]
"""


@pytest.fixture(autouse=True)
def reward(tmp_path):
    (tmp_path / "graded.py").write_text(GRADED)


def in_step(run: ProcessTree, folder) -> None:
    """Wait until its first steps are logged and its workers run."""
    metrics = folder / "runs/default/metrics.jsonl"
    assert until(lambda: metrics.exists() and metrics.read_text().count('"step_time"') >= 2, 100), run.err.read_text()
    assert len(run.living()) > 1


def ends(run: ProcessTree, folder, *signals: int) -> int:
    if signals:
        in_step(run, folder)
    for number in signals:
        os.kill(run.process.pid, number)
    return run.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, signals, codes",
    [
        pytest.param("", [signal.SIGKILL], {-9}, id="killed"),
        pytest.param("", [], {0}, id="done", marks=pytest.mark.soak),
        pytest.param("", [signal.SIGTERM], {75}, id="stopped", marks=pytest.mark.soak),
        pytest.param("", [signal.SIGINT] * 2, {75, 130}, id="interrupted", marks=pytest.mark.soak),
        pytest.param("fail@forward:3", [], {1}, id="error", marks=pytest.mark.soak),
        pytest.param("hang@grade:3", [], {5}, id="hang", marks=pytest.mark.soak),
    ],
)
def test_no_process_is_left(fault, signals, codes, tmp_path):
    run = ProcessTree(tmp_path, *SHORT_RUN, *WORKERS, **({"FASTRL_FAULT": fault} if fault else {}))
    assert ends(run, tmp_path, *signals) in codes, run.err.read_text()
    assert run.left() == []


def state(pid: int) -> tuple[int, float, int]:
    """Open files, resident memory in MiB and threads of a process."""
    with open(f"/proc/{pid}/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return len(os.listdir(f"/proc/{pid}/fd")), resident, len(os.listdir(f"/proc/{pid}/task"))


@pytest.mark.slow
@pytest.mark.soak
def test_nothing_grows_in_five_hundred_steps(tmp_path):
    """Files and threads stay as they were, memory within 50 MiB from step 100 on, with saves and evaluations."""
    steps = ["--steps", 500, "--eval-every", 25, "--save-every", 50, "--rollouts-every", 10]
    run = ProcessTree(tmp_path, *SHORT_RUN, *WORKERS, *steps)
    seen: list[tuple[int, tuple[int, float, int]]] = []
    folder = tmp_path / "runs/default"

    def over() -> bool:
        if (folder / "metrics.jsonl").exists() and run.process.poll() is None:
            at = max((row["step"] for row in rows(folder)), default=0)
            if not seen or at >= seen[-1][0] + 5:
                try:
                    seen.append((at, state(run.process.pid)))
                except OSError:
                    pass  # it has ended in between
        return run.process.poll() is not None

    assert until(over, 280) and run.wait() == 0, run.err.read_text()
    early = [found for at, found in seen if 100 <= at <= 200]
    late = [found for at, found in seen if at >= 400]
    assert len(early) > 5 and len(late) > 5
    files, memory, threads = ([statistics.median(f[i] for f in part) for part in (early, late)] for i in range(3))
    assert abs(files[1] - files[0]) <= 2 and threads[1] <= threads[0]
    assert memory[1] - memory[0] <= 50, memory
    print("files", files, "MiB", memory, "threads", threads)
