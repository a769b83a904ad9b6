"""What a run cost until an evaluation first reached the target, from its metrics.jsonl.

    rollouts          completions sampled for training
    backward passes   full gradients, one per minibatch
    tokens            of prompts and completions trained on
    seconds           of steps; start-up, evaluations and checkpoints are left out

each with what the profile took, where there was one. Nothing is interpolated: a cost is that of the whole steps before
the evaluation. A run that never reached the target has no cost, only what it spent.
"""

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastrl.comparison.methods import COSTS
from fastrl.comparison.runs import Run, read

PROFILE = {"rollouts": "profile/num_rollouts", "tokens": "profile/num_tokens", "seconds": "profile/seconds"}
ENDS = {"NumericsError": "diverged"}  # other reasons of a run's status.json are words already
COUNTERS = {"rollouts": "num_rollouts", "tokens": "num_tokens", "backward_passes": "num_backward_passes"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation, and what had been spent by then."""

    step: int
    accuracy: float
    reward: float  # mean over the steps since the last evaluation; NaN at the first
    spent: dict[str, float]  # by name of COSTS


def read_points(path: Path) -> list[Point]:
    """Evaluations of the first evaluation set. Raises ValueError when there is none."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    pattern = re.compile(r"eval/.+/avg@\d+")
    key = next((k for row in rows for k in row if pattern.fullmatch(k)), None)
    if key is None:
        raise ValueError(f"{path}: no evaluation in it; give --eval and --eval-every")
    points: list[Point] = []
    spent, profiled, rewards = dict.fromkeys(COSTS, 0.0), dict.fromkeys(COSTS, 0.0), []
    for row in rows:
        for cost, name in PROFILE.items():
            profiled[cost] += row.get(name, 0.0)
        if "reward" in row:
            spent |= {cost: row[name] for cost, name in COUNTERS.items()}
            spent["seconds"] += row["step_time"]
            rewards.append(row["reward"])
        if key in row and not (points and points[-1].step == row["step"]):
            reward = sum(rewards) / len(rewards) if rewards else math.nan
            total = {cost: spent[cost] + profiled[cost] for cost in COSTS}
            points.append(Point(step=row["step"], accuracy=row[key], reward=reward, spent=total))
            rewards = []
    return points


def first_reaching(points: Sequence[Point], target: float) -> Point | None:
    return next((p for p in points if p.accuracy >= target), None)


def peak_mib(path: Path, name: str) -> float | None:
    """Largest value of memory/<name> in a metrics.jsonl, MiB; None where it was not measured."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return max((row[f"memory/{name}"] for row in rows if f"memory/{name}" in row), default=None)


def measure(run: Run, target: float) -> dict:
    """One row of the results.

    Raises ValueError when the untrained model already has the target: then every ratio would be 0 / 0.
    """
    log, reason = run.folder / "metrics.jsonl", read(run.folder / "status.json").get("reason", "")
    points = read_points(log)
    reached = first_reaching(points, target)
    if reached is points[0]:
        raise ValueError(f"{run.label}: accuracy is {points[0].accuracy:.3f} before the first step; raise --target")
    return {
        "method": run.method,
        "seed": run.seed,
        "lr": run.lr,
        "target": target,
        "reached": reached is not None,
        **{cost: reached.spent[cost] if reached else None for cost in COSTS},
        "spent": points[-1].spent,
        "steps": points[-1].step,
        "accuracy": points[-1].accuracy,
        "peak_host_mib": peak_mib(log, "host_mib"),
        "peak_device_mib": peak_mib(log, "peak_mib"),
        "ended": ENDS.get(reason, reason),
        "commit": read(run.folder / "manifest.json").get("versions", {}).get("commit"),
    }


def contenders(rates: Sequence[float], rows: Sequence[dict]) -> list[float]:
    """Learning rates of one method with which no run, so far, missed the target; all of them when there is none."""
    missed = {row["lr"] for row in rows if not row["reached"]}
    return [lr for lr in rates if lr not in missed] or list(rates)


def choose_lr(rows: Sequence[dict], headline: str) -> float:
    """Rows of one method, one per learning rate and seed -> the rate with the lowest mean cost to the target.

    A rate that missed it less often goes first, then the cost, then the accuracy, then the smaller rate: the fastest
    rate of a single seed is often one that collapses with the next.
    """

    def order(lr: float) -> tuple[float, float, float, float]:
        own = [row for row in rows if row["lr"] == lr]
        costs = [row[headline] for row in own if row["reached"]]
        accuracy = statistics.mean(row["accuracy"] for row in own)
        return 1 - len(costs) / len(own), statistics.mean(costs) if costs else math.inf, -accuracy, lr

    return min({row["lr"] for row in rows}, key=order)
