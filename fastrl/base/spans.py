"""Where the time and the memory of a step go."""

import atexit
import gc
import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Progress(NamedTuple):
    """Where a process is. One object, so that a thread that reads it never sees half of a change."""

    phase: str  # the newest one that was entered; "" before the first
    visit: int  # which time it is, from 1
    at: float  # of the newest progress, time.monotonic


class Spans:
    """Named wall-clock spans in seconds, summed until taken. Waits for the device, so a span holds its own work.

    A span is also a phase of the program, which lasts until the next one is entered: `progress` is what a watchdog
    reads. What takes long calls `beat` as it goes on.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.visits: Counter[str] = Counter()
        self.progress = Progress("", 0, time.monotonic())

    def enter(self, phase: str) -> None:
        self.visits[phase] += 1
        self.progress = Progress(phase, self.visits[phase], time.monotonic())

    def beat(self) -> None:
        self.progress = Progress(self.progress.phase, self.progress.visit, time.monotonic())

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.enter(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """{timing_s/<name>: seconds} since the last call."""
        taken = {f"timing_s/{name}": seconds for name, seconds in self.seconds.items()}
        self.seconds = {}
        return taken


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection inside, and none ever of what is alive at the end.

    Loading modules makes hundreds of thousands of objects that stay; looking them through again and again takes a fifth
    of the start-up, and a pause of every full collection afterwards. At exit they may be collected again: what is
    frozen outlives the interpreter, and nanobind lists it on stderr.
    """
    atexit.register(gc.unfreeze)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def memory_metrics() -> dict[str, float]:
    """Peak resident memory of this process and, on CUDA, torch's peak since the last call; MiB."""
    metrics = {"memory/host_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if torch.cuda.is_available():
        metrics["memory/peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
    return metrics
