"""Costs to the target over seeds: medians, and ratios of medians with 95 % intervals by the paired bootstrap.

    ratio = median over seeds of the method's cost / median of the baseline's

Seeds are drawn with replacement, for both alike. A run that ended before it reached the target is censored: its cost is
at least what it spent, and possibly infinite. Every bound is taken at whichever of the two makes it weaker, so that a
censored run widens an interval and is never left out of it. The cost of one that collapsed or diverged is infinite.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """least < most only where runs are censored: the ratio itself is known within these bounds."""

    least: float
    most: float
    low: float  # of the 95 % interval
    high: float

    def __str__(self) -> str:
        if self.least == self.most:
            value = number(self.least)
        elif math.isinf(self.most):
            value = f"> {number(self.least)}" if self.least > 0 else "?"
        elif self.least > 0:
            value = f"{number(self.least)} to {number(self.most)}"
        else:
            value = f"< {number(self.most)}"
        return f"{value} [{number(self.low)}, {number(self.high)}]"

    @property
    def verdict(self) -> str:
        """ "less", "more", or "unclear" where the interval holds 1."""
        return "less" if self.high < 1 else "more" if self.low > 1 else "unclear"


def number(value: float) -> str:
    return "inf" if math.isinf(value) else f"{value:.2f}"


def bounds(rows: Sequence[dict], cost: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Rows of one method -> least and greatest cost to the target of each run: equal, or spent and infinite."""
    lost = [row["ended"] in ("collapsed", "diverged") for row in rows]
    spent = [math.inf if gone else row["spent"][cost] for row, gone in zip(rows, lost, strict=True)]
    least = [row[cost] if row["reached"] else floor for row, floor in zip(rows, spent, strict=True)]
    most = [row[cost] if row["reached"] else math.inf for row in rows]
    return numpy.array(least, dtype=float), numpy.array(most, dtype=float)


def quotient(above: numpy.ndarray, below: numpy.ndarray, undefined: float) -> numpy.ndarray:
    """above / below, with `undefined` for 0 / 0 and inf / inf."""
    with numpy.errstate(divide="ignore", invalid="ignore"):
        value = above / below
    return numpy.where(numpy.isnan(value), undefined, value)


def ratio(rows: Sequence[dict], baseline: Sequence[dict], cost: str, *, resamples: int = RESAMPLES) -> Ratio:
    """Rows of a method and of what it is measured against, with the same seeds. Always draws the same resamples."""
    by_seed = {row["seed"]: row for row in baseline}
    assert len(rows) == len(baseline) and {row["seed"] for row in rows} == set(by_seed), "runs are not paired"
    least, most = bounds(rows, cost)
    base_least, base_most = bounds([by_seed[row["seed"]] for row in rows], cost)

    def both(draws: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        low = quotient(numpy.median(least[draws], axis=1), numpy.median(base_most[draws], axis=1), 0.0)
        return low, quotient(numpy.median(most[draws], axis=1), numpy.median(base_least[draws], axis=1), math.inf)

    (at_least,), (at_most,) = both(numpy.arange(len(rows))[None])
    draws = numpy.random.default_rng(0).integers(0, len(rows), (resamples, len(rows)))
    low, high = both(draws)
    tail = int(0.025 * resamples)  # order statistics: between a finite and an infinite draw there is nothing to average
    return Ratio(
        least=float(at_least),
        most=float(at_most),
        low=float(numpy.sort(low)[tail]),
        high=float(numpy.sort(high)[-1 - tail]),
    )


def summarize(rows: Sequence[dict], cost: str) -> dict[str, float | None]:
    """Rows of one method -> median, min and max of a cost; None where that run, or half of them, missed the target."""
    _, most = bounds(rows, cost)
    values = {"median": numpy.median(most), "min": most.min(), "max": most.max()}
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
