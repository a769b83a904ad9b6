"""What benchmarks of single operations share: gates, interleaved samples, peak memory, a model of a GPU, the report.

A provider is one way to do an operation. Each is set against float64 on small inputs before any is timed, and what is
wrong gets no time: one of ours ends the benchmark, a rival keeps a row that says so.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastrl.base.exhausted import means_out_of_memory
from fastrl.base.log import versions, write_json
from fastrl.watch.card import NoCard, open_card
from fastrl.watch.card_watch import CardWatch, slowed_by

# what a "model" figure assumes: an H100 SXM, dense bfloat16 and HBM3, and what of them is reached in practice
PEAK_FLOPS, PEAK_BYTES_PER_S = 989e12, 3.35e12
REACHED_FLOPS, REACHED_BYTES_PER_S = 0.72 * PEAK_FLOPS, 0.9 * PEAK_BYTES_PER_S
MODEL = "model of an H100, not measured"
FLUSH_BYTES = 1 << 28  # several times the L2 cache
COPY_BYTES = 1 << 32  # a copy is as fast beyond
OURS = "fastrl"  # the first word of a provider that must not be wrong
SOFTWARE = ("triton", "liger-kernel", "trl")  # beside what a run of fastrl depends on


@dataclass(frozen=True, slots=True)
class Provider:
    """call() does the operation; error(what it returned) is from float64, and above `allowed` there is no time.

    error None: a yardstick, which has no result. flop, moved: the work and bytes that its rate counts.
    """

    call: Callable[[], object]
    error: Callable[[object], float] | None = None
    allowed: float = 0.0
    flop: float = 0.0
    moved: float = 0.0


class Wrong(Exception):
    """A rival's result is not the operation's."""


def gate(bench: str, name: str, provider: Provider) -> float | None:
    """Error of a provider on small inputs; SystemExit if ours is wrong, Wrong if a rival is."""
    if provider.error is None:
        return None
    error = provider.error(provider.call())
    if error <= provider.allowed:
        return error
    fault = f"off by {error:.2e}, allowed {provider.allowed:.0e}"
    if name.startswith(OURS):
        raise SystemExit(f"{bench}: {name} is {fault}: no times")
    raise Wrong(fault)


def measure(
    bench: str,
    small: Callable[[], dict[str, Provider]],
    large: Callable[[], dict[str, Provider]],
    *,
    yardstick: str,
    warmup: int = 3,
    seconds: float = 4.0,
    case: dict,
) -> list[dict]:
    """Rows of one case: gates on providers of `small`, new ones for each, and then times of those of `large`."""
    rows: dict[str, dict] = {}
    for name in small():
        rows[name] = {**case, "provider": name, **attempt(name, lambda name=name: gated(bench, name, small()[name]))}
    providers, calls = large(), {}
    for name, provider in providers.items():
        if "note" not in rows[name]:
            rows[name] |= attempt(name, lambda call=provider.call: {"peak_mib": peak_mib(call)})
        if "note" not in rows[name]:
            calls[name] = provider.call
    with card_watched() as seen:
        timed = sample(calls, warmup=warmup, seconds=seconds)
    for name, times in timed.items():
        rows[name] |= times | seen
    for name, row in rows.items():
        if "ms" in row:
            row |= rates(providers[name], row["ms"], providers[yardstick], rows[yardstick].get("ms", math.nan))
    return list(rows.values())


def rates(provider: Provider, ms: float, bare: Provider, bare_ms: float) -> dict[str, float]:
    """of_bare: the time over that of the yardstick; of_copy: the bandwidth over that of the yardstick."""
    if provider.flop:
        return {"useful_tflops": provider.flop / ms / 1e9, "of_bare": ms / bare_ms}
    return {"gb_per_s": provider.moved / ms / 1e6, "of_copy": provider.moved / ms / (bare.moved / bare_ms)}


def gated(bench: str, name: str, provider: Provider) -> dict[str, float | None]:
    return {"error": gate(bench, name, provider)}


def attempt(name: str, call: Callable[[], dict]) -> dict:
    """What call() returns, or a note on why there is nothing; other failures of ours than of memory are raised."""
    try:
        return call()
    except Exception as error:  # a rival may need another GPU, compiler or version: its row says so
        if means_out_of_memory(error):
            note = "out of memory"
        elif name.startswith(OURS):
            raise
        else:
            note = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:80]
    torch.cuda.empty_cache()
    return {"note": note}


def sample(
    calls: dict[str, Callable[[], object]], *, warmup: int, seconds: float, least: int = 7, most: int = 50
) -> dict[str, dict[str, float]]:
    """Quantiles of milliseconds, calls taking turns for about `seconds`, with the L2 cache overwritten before each.

    issue_ms: until the call has returned to the CPU. The overwriting is a backlog of a tenth of a millisecond, behind
    which as much of that does not show in the time on the device.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    names, times = list(calls), {name: [] for name in calls}

    def turn(first: int) -> None:
        for name in names[first:] + names[:first]:  # none is always behind the same one
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            begin = time.perf_counter()
            calls[name]()
            issued = time.perf_counter() - begin
            end.record()
            torch.cuda.synchronize()
            times[name].append((start.elapsed_time(end), issued * 1e3))

    for _ in range(warmup):
        begin = time.perf_counter()
        turn(0)
    rounds = min(most, max(least, int(seconds / (time.perf_counter() - begin))))
    for number in range(rounds):
        turn(number % max(1, len(names)))
    return {name: quantiles(taken[warmup:]) for name, taken in times.items()}


@contextmanager
def card_watched() -> Iterator[dict]:
    """A dict, filled at the end: mean clock and power of the card inside, and what held its clocks down how often."""
    seen: dict[str, float | str] = {}
    watch = CardWatch(open_card("cuda:0"))
    watch.start()
    watch.begin_step()
    try:
        yield seen
    finally:
        found = watch.end_step()
        watch.stop()
        seen |= {name: found[f"gpu/{name}"] for name in ("sm_mhz", "power_w") if f"gpu/{name}" in found}
        if slowed_by(found):
            seen["slowed_by"] = slowed_by(found)


def quantiles(taken: list[tuple[float, float]]) -> dict[str, float]:
    device, issue = zip(*taken, strict=True)
    low, *_, high = statistics.quantiles(device, n=5)
    return {"ms": statistics.median(device), "ms_20": low, "ms_80": high, "issue_ms": statistics.median(issue)}


def peak_mib(call: Callable[[], object]) -> float:
    """Device memory above what is allocated already, MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)  # one compilation for the gate and for all shapes


class Captured:
    """A call as a CUDA graph, captured when it is first made: what is left of its time without launches."""

    def __init__(self, call: Callable[[], object]):
        self.call, self.graph, self.result = call, None, None

    def __call__(self) -> object:
        if self.graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.call()  # compiles, which nothing may do during the capture
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.call()
        self.graph.replay()
        return self.result


def device_copy(moved: float) -> Provider:
    """The yardstick of bandwidth: a copy on the device that reads and writes as much in all, up to a few GB."""
    moved = min(int(moved), COPY_BYTES)
    source, target = (torch.empty(max(1, moved // 8), dtype=torch.float32, device="cuda") for _ in range(2))
    return Provider(lambda: target.copy_(source), moved=moved)


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference relative to that of the truth."""
    return ((found.double() - truth).norm() / truth.norm()).item()


def model(flop: float = 0.0, moved: float = 0.0, **case: object) -> dict:
    """The row of an H100 that multiplies and moves bytes one after the other, both at what is reached in practice."""
    products, memory = flop / REACHED_FLOPS * 1e3, moved / REACHED_BYTES_PER_S * 1e3
    at_peak = (flop / PEAK_FLOPS + moved / PEAK_BYTES_PER_S) * 1e3
    return {
        **case,
        "provider": MODEL,
        "ms": products + memory,
        "products_ms": products,
        "memory_ms": memory,
        "ms_at_peak": at_peak,
    }


def run(
    bench: str,
    doc: str,
    shapes: list[str],
    measured: Callable[..., Iterable[dict]],
    modelled: Callable[..., Iterable[dict]],
) -> None:
    """The program of a benchmark: shapes like 16384x1536, a file after every row, a table for people, one JSON line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help=f"like {shapes[0]}; may be given several times")
    parser.add_argument("--out", default="", help="also write the JSON here, after every row")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    report = Report(bench, args.out, measured=gpu)
    for shape in args.shape or shapes:
        for row in (measured if gpu else modelled)(*map(int, shape.split("x"))):
            report.add(row)
    report.finish()


def show(rows: list[dict]) -> None:
    """A table for people; what a row lacks is a dash, and lists are left to the file."""
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list)))
    width = {c: max(len(c), *(len(text(row.get(c))) for row in rows)) for c in columns}
    print("  ".join(c.rjust(width[c]) for c in columns))
    for row in rows:
        print("  ".join(text(row.get(c)).rjust(width[c]) for c in columns))


def text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 1e-2 else f"{value:,.2f}"
    return "-" if value is None else str(value)


class Report:
    """The JSON document of a benchmark, in a file that is whole after every row: one that is killed keeps its rows."""

    def __init__(self, bench: str, out: str = "", **more: object):
        self.path = Path(out) if out else None
        about = {"bench": bench, "date": date.today().isoformat(), **machine()}
        self.document: dict = {**about, "complete": False, **more, "rows": []}

    @property
    def rows(self) -> list[dict]:
        return self.document["rows"]

    def add(self, *rows: dict) -> None:
        self.rows.extend(rows)
        self.write()

    def write(self, **more: object) -> None:
        """Note what else there is to say, and replace the file."""
        self.document |= {"says": headline(self.rows), **more}
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.document)

    def finish(self, **more: object) -> None:
        """The table for people, and the whole document as one JSON line."""
        self.write(complete=True, **machine(), **more)  # clocks are those of a GPU that has worked
        if slowed := list(dict.fromkeys(row["slowed_by"] for row in self.rows if row.get("slowed_by"))):
            print(f"THROTTLED: the GPU's clocks were held down, in samples of one case each: {'; '.join(slowed)}")
        if self.rows:
            show(self.rows)
        print(json.dumps(self.document))


def headline(rows: list[dict]) -> str:
    """Ours against the yardstick, or how many rows there are."""
    found = [
        f"{row['provider']} {key} {text(row[key])}"
        for row in rows
        for key in ("of_bare", "of_copy")
        if key in row and row.get("provider", "").startswith(OURS)
    ]
    return "; ".join(found[:4]) or f"{len(rows)} rows"


def machine() -> dict:
    """The GPU, its driver and clocks as they are now, and versions of what ran on it; what is missing is left out."""
    found = versions() | {"cuda": torch.version.cuda}
    for name in SOFTWARE:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if not torch.cuda.is_available():
        return {"gpu": None, "versions": found}
    return {"gpu": torch.cuda.get_device_name(), "state": card_state(), "versions": found}


def card_state() -> dict:
    """Driver, clocks, load and other processes of the card as they are now; or why they are not known."""
    card = open_card("cuda:0")
    try:
        if isinstance(card, NoCard):
            raise card
        held, now = card.held(), card.read()
    except NoCard as error:
        return {"unknown": str(error)}
    figures = {"sm_mhz": now.sm_mhz, "top_sm_mhz": card.top_sm_mhz, "power_w": now.watts, "slowed_by": now.slowed}
    return {"driver": card.driver, **figures, "others": str(held) if held else None}
