"""Training runs as processes: several at a time, none twice, stopped ones continued.

A run is finished when its folder says so and was made by the same arguments; that is all there is to resuming a
comparison. A run that was stopped goes on from its checkpoint, if it wrote one.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.1
NUMERICS = 4  # exit code of a run that left the finite numbers: a result, not a mistake


@dataclass(frozen=True, kw_only=True)
class Run:
    method: str
    lr: float
    seed: int
    folder: Path
    args: tuple[str, ...]  # of fastrl.train, without --out

    @property
    def label(self) -> str:
        return f"{self.method} lr {self.lr:g} seed {self.seed}"

    @property
    def console(self) -> Path:
        """What the run printed; beside its folder, which a new run moves out of the way."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def same_arguments(self) -> bool:
        """Whether the folder holds a run, whole or not, of these arguments."""
        made_by = read(self.folder / "manifest.json").get("argv", [])
        return tuple(made_by[: len(self.args)]) == self.args

    def finished(self) -> bool:
        status = read(self.folder / "status.json")
        ended = status.get("reason") in ("done", "target", "time") or status.get("exit_code") == NUMERICS
        return ended and self.same_arguments()

    def start(self) -> subprocess.Popen:
        more = ["--resume", "auto"] if self.same_arguments() else []
        command = [sys.executable, "-m", "fastrl.train", *self.args, "--out", str(self.folder), *more]
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self.console.open("w") as console:
            # a group of its own, so that Ctrl-C reaches a run once and not twice; S603: our own program, and no shell
            return subprocess.Popen(command, stdout=console, stderr=subprocess.STDOUT, process_group=0)  # noqa: S603


def read(path: Path) -> dict:
    """A JSON object, empty where there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def execute(
    runs: Sequence[Run], *, jobs: int, keep_checkpoints: bool = False, report: Callable[[Run, float], None]
) -> None:
    """Do all runs that are not finished, in order, at most `jobs` at a time; report(run, seconds it took) after each.

    A run that diverges is finished. Raises ValueError, after stopping the others, when one ends otherwise than by
    itself; KeyboardInterrupt after SIGINT or SIGTERM, when all have saved and stopped.
    """
    waiting = [run for run in runs if not run.finished()]
    running: dict[subprocess.Popen, tuple[Run, float]] = {}
    with sigterm_interrupts():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[run.start()] = run, time.monotonic()
                for process in [p for p in running if p.poll() is not None]:
                    run, started = running.pop(process)
                    check(run, process.returncode)
                    if not keep_checkpoints:
                        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
                    report(run, time.monotonic() - started)
                time.sleep(POLL_S)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()


def check(run: Run, code: int) -> None:
    if code and code != NUMERICS:
        lines = run.console.read_text().strip().splitlines()
        said = next(
            (line for line in reversed(lines) if line.startswith("fastrl: error: ")), lines[-1] if lines else ""
        )
        raise ValueError(
            f"{run.label} ended with exit code {code}: {said.removeprefix('fastrl: error: ')}; all it said is in "
            f"{run.console}. Finished runs are kept: start the same command again"
        )


@contextmanager
def sigterm_interrupts():
    """SIGTERM ends the block as Ctrl-C does, also where SIGINT is ignored, as shells have it for `command &`."""

    def stop(number: int, frame) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
