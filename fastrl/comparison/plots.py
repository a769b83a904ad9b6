"""Accuracy and training reward against what was spent: mean over seeds, band from the lowest to the highest."""

from collections.abc import Sequence
from pathlib import Path

import numpy

from fastrl.comparison.costs import Point

AXES = {"rollouts": "rollouts", "backward_passes": "backward passes", "seconds": "seconds"}


def over_seeds(runs: Sequence[Sequence[Point]], cost: str, value: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Evaluations of one method's runs -> spent [E], and values [runs, E] of accuracy or reward.

    Runs that ended keep their last value: they stopped because they were done. What had been spent by an evaluation is
    the mean of the runs that came to it.
    """
    longest = max(map(len, runs))
    spent = [numpy.mean([run[e].spent[cost] for run in runs if e < len(run)]) for e in range(longest)]
    values = [[getattr(run[min(e, len(run) - 1)], value) for e in range(longest)] for run in runs]
    return numpy.array(spent), numpy.array(values)


def draw(path: Path, runs: dict[str, list[list[Point]]], controls: set[str], target: float) -> None:
    """runs: evaluations by method and seed. Controls are dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(AXES), figsize=(15, 8), sharey="row", layout="constrained")
    palette = pyplot.get_cmap("tab20")
    colors = [palette(i) for i in range(palette.N)]
    for row, value in zip(panels, ("accuracy", "reward"), strict=True):
        for axes, (cost, label) in zip(row, AXES.items(), strict=True):
            for i, (method, points) in enumerate(runs.items()):
                spent, values = over_seeds(points, cost, value)
                begin = 0 if value == "accuracy" else 1  # no reward before the first step
                line = "--" if method in controls else "-"
                color = colors[i % len(colors)]
                axes.plot(spent[begin:], values.mean(axis=0)[begin:], line, color=color, lw=1.5, label=method)
                band = (values.min(axis=0)[begin:], values.max(axis=0)[begin:])
                axes.fill_between(spent[begin:], *band, color=color, alpha=0.12, lw=0)
            if value == "accuracy":
                axes.axhline(target, color="black", lw=0.8, ls=":")
            axes.set(xlabel=label, ylabel=value if cost == "rollouts" else "")
            axes.grid(alpha=0.3)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
