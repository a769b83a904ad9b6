"""Where the time and the memory of a step go."""

import gc
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Spans:
    """Named wall-clock spans in seconds, summed until taken. Waits for the device, so a span holds its own work."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
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
    of the start-up, and a pause of every full collection afterwards.
    """
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
