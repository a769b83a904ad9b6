"""Training runs as processes: several at a time, none twice, stopped ones continued.

A run is finished when its folder says so and was made by the same arguments; that is all there is to resuming a
comparison. A run that was stopped goes on from its checkpoint, if it wrote one.
"""

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

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
        ended = status.get("reason") in ("done", "target", "collapsed", "time") or status.get("exit_code") == NUMERICS
        return ended and self.same_arguments()

    def start(self, method: Literal["fork", "spawn"]) -> BaseProcess:
        more = ["--resume", "auto"] if self.same_arguments() else []
        argv = ["fastrl.train", *self.args, "--out", str(self.folder), *more]
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("fork") if method == "fork" else multiprocessing.get_context("spawn")
        process = context.Process(target=train, args=(argv, self.console))
        process.start()
        return process


def train(argv: list[str], console: Path) -> None:
    """`python -m` argv in this process, a new one, with all it prints in a file."""
    os.setpgid(0, 0)  # Ctrl-C would otherwise reach a run twice
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with console.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = argv
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


def read(path: Path) -> dict:
    """A JSON object, empty where there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def execute(
    runs: Sequence[Run],
    *,
    jobs: int,
    start_method: Literal["fork", "spawn"],
    keep_checkpoints: bool = False,
    report: Callable[[Run, float], None],
) -> None:
    """Do all runs that are not finished, in order, at most `jobs` at a time; report(run, seconds it took) after each.

    start_method: fork takes over what this process has imported, seconds of every run; not possible beside CUDA.
    A run that diverges is finished. Raises ValueError, after stopping the others, when one ends otherwise than by
    itself; KeyboardInterrupt after SIGINT or SIGTERM, when all have saved and stopped.
    """
    waiting = [run for run in runs if not run.finished()]
    running: dict[BaseProcess, tuple[Run, float]] = {}
    with sigterm_interrupts():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[run.start(start_method)] = run, time.monotonic()
                for process, code in [(p, p.exitcode) for p in running]:
                    if code is None:
                        continue
                    run, started = running.pop(process)
                    check(run, code)
                    if not keep_checkpoints:
                        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
                    report(run, time.monotonic() - started)
                time.sleep(POLL_S)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.join()


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
