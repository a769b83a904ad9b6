"""What benchmarks of single operations share: interleaved samples, peak memory, a model of a GPU, one JSON line."""

import json
import statistics
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from fastrl.log import versions

# what a "model" figure assumes: an H100 SXM, dense bfloat16 and HBM3, and what of them is reached in practice
PEAK_FLOPS, PEAK_BYTES_PER_S = 989e12, 3.35e12
REACHED_FLOPS, REACHED_BYTES_PER_S = 0.72 * PEAK_FLOPS, 0.9 * PEAK_BYTES_PER_S
FLUSH_BYTES = 1 << 28  # several times the L2 cache


def sample(
    providers: dict[str, Callable[[], object]], *, warmup: int = 20, samples: int = 30
) -> dict[str, list[float]]:
    """Milliseconds of each call, providers taking turns, with the L2 cache overwritten before each."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in providers}
    for number in range(warmup + samples):
        for name, call in providers.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if number >= warmup:
                times[name].append(start.elapsed_time(end))
    return times


def quantiles(ms: list[float]) -> dict[str, float]:
    low, *_, high = statistics.quantiles(ms, n=5)
    return {"ms": statistics.median(ms), "ms_20": low, "ms_80": high}


def peak_mib(call: Callable[[], object]) -> float:
    """Device memory above what is allocated already, MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def distance(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference relative to that of the truth."""
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


def show(rows: list[dict], columns: list[str]) -> None:
    """A table for people; what a row lacks is a dash."""
    width = {c: max(len(c), *(len(text(row.get(c))) for row in rows)) for c in columns}
    print("  ".join(c.rjust(width[c]) for c in columns))
    for row in rows:
        print("  ".join(text(row.get(c)).rjust(width[c]) for c in columns))


def text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 1e-2 else f"{value:,.2f}"
    return "-" if value is None else str(value)


def finish(name: str, rows: list[dict], out: str, **more: object) -> None:
    """Print the result as one JSON line; with `out` also write it there."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    document = {
        "bench": name,
        "date": date.today().isoformat(),
        "gpu": gpu,
        "versions": versions(),
        **more,
        "rows": rows,
    }
    if out:
        Path(out).write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
