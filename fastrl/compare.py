"""Run methods against each other, and say which needs less to reach an accuracy.

    python -m fastrl.compare --preset embedded --seeds 5           fastrl's methods on the embedded task
    python -m fastrl.compare list.toml --seeds 3 --target 0.8      your own list; fastrl/comparison/methods.py says how
    python -m fastrl.compare list.toml --dry-run                   the commands it stands for

First each method tries a small grid of learning rates with seeds that are not reported, then it runs with the best one
and every seed. --out holds all runs, compare.md, compare.png, rows.json and summary.json. A comparison that was stopped
goes on with the same command. Exit codes are those of fastrl.train.
"""

import os
import platform
import shlex
import time
from datetime import date

from fastrl.base.exits import run_program
from fastrl.base.log import say, versions, write_json
from fastrl.comparison.costs import choose_lr, measure, read_points
from fastrl.comparison.methods import COSTS, axis_names, check_protocol
from fastrl.comparison.plan import Plan, read_plan
from fastrl.comparison.plots import draw
from fastrl.comparison.ratios import summarize
from fastrl.comparison.report import (
    compared_pairs,
    cost_table,
    finite,
    judge,
    of,
    ratio_table,
    ratios,
    sentences,
    tuning_table,
    weak_points,
)
from fastrl.comparison.runs import Run, execute, read
from fastrl.settings.run import by_path

STOPPED = 75


def do(plan: Plan, runs: list[Run], what: str) -> list[dict]:
    """Execute what is not finished yet; one row of results per run, in the order of the methods."""
    left = [run for run in runs if not run.finished()]
    say(f"{what}: {len(runs)} runs, {len(left)} to do, {plan.jobs} at a time")
    started, done = time.monotonic(), 0

    def report(run: Run, seconds: float) -> None:
        nonlocal done
        done += 1
        row = measure(run, plan.config.target)
        say(
            f"[{done}/{len(left)}] {run.label}: accuracy {row['accuracy']:.3f} after {row['spent']['rollouts']:,.0f} "
            f"rollouts and {row['spent']['seconds']:.0f} s of steps; {seconds:.0f} s in all, "
            f"{time.monotonic() - started:.0f} s since the start"
        )

    keep = plan.config.keep_checkpoints
    if left:
        execute(left, jobs=plan.jobs, start_method=plan.preload(), keep_checkpoints=keep, report=report)
    order = [m.name for m in plan.methods]
    return [measure(r, plan.config.target) for r in sorted(runs, key=lambda r: (order.index(r.method), r.lr, r.seed))]


def choose(plan: Plan, tuning: list[dict]) -> dict[str, float]:
    """Learning rate by tuned method."""
    if not tuning:
        return {m.name: plan.settings[m.name].optim.lr * plan.config.lr_factors[0] for m in plan.tuned}
    return {m.name: choose_lr(of(tuning, m.name), m.headline) for m in plan.tuned}


def describe_rows(plan: Plan, rows: list[dict], runs: list[Run]) -> dict:
    """Give each row its axes and the settings in which methods differ; -> the settings that all have in common.

    Raises ValueError when runs were evaluated differently, such as by an earlier version of a list.
    """
    stored = {(run.method, run.seed): read(run.folder / "config.json") for run in runs}
    check_protocol({f"{method} seed {seed}": settings for (method, seed), settings in stored.items()})
    ignored = ("seed", "out", "resume", "name")
    settings = {key: {k: v for k, v in by_path(s).items() if k not in ignored} for key, s in stored.items()}
    keys = dict.fromkeys(k for s in settings.values() for k in s)
    first = next(iter(settings.values()))
    differ = [k for k in keys if any(k not in s or k not in first or s[k] != first[k] for s in settings.values())]
    for row in rows:
        own = settings[row["method"], row["seed"]]
        row |= axis_names(plan.settings[row["method"]])
        row["settings"] = {k: own[k] for k in differ if k in own}
    return {k: v for k, v in first.items() if k not in differ}


def write_results(plan: Plan, tuning: list[dict], rows: list[dict], runs: list[Run], argv: list[str]) -> list[str]:
    """rows.json, summary.json, compare.md and compare.png; -> the lines of the report."""
    config, methods = plan.config, plan.methods
    common = describe_rows(plan, rows, runs)
    chosen = choose(plan, tuning)
    found = ratios(rows, compared_pairs(methods, plan.claims, config.baseline))
    verdicts = [judge(claim, rows, found, config.baseline) for claim in plan.claims]
    said = sentences(rows, methods, found, config.baseline)
    weak = weak_points(tuning, rows, chosen, plan.jobs, config.threads, os.cpu_count() or 1)
    lines = [
        f"# {len(methods)} methods to an accuracy of {config.target:g}",
        "",
        f"Median over {config.seeds} seeds [lowest, highest] to the first evaluation at the target; `-`: not reached. "
        "Profiles are counted, evaluations are not.",
        "",
        *cost_table(rows, methods),
        "",
        "## Ratios",
        "",
        "Median over median, with the 95 % interval of a bootstrap over paired seeds; below 1: less.",
        "",
        *ratio_table(found),
        "",
        "## What follows",
        "",
        *(f"- {line}" for line in said),
        "",
        *(["## Claims", "", *(f"- {verdict['text']}" for verdict in verdicts), ""] if verdicts else []),
        *(["## Weak points", "", *(f"- {line}" for line in weak), ""] if weak else []),
        *(["## Learning rates", "", *tuning_table(tuning, methods, chosen), ""] if tuning else []),
        "![accuracy and reward against costs](compare.png)",
    ]
    (plan.folder / "compare.md").write_text("\n".join(lines) + "\n")
    points: dict[str, list] = {m.name: [] for m in methods}
    for run in runs:
        points[run.method].append(read_points(run.folder / "metrics.jsonl"))
    draw(plan.folder / "compare.png", points, {m.name for m in methods if m.control_of}, config.target)
    document = {
        "bench": "compare_methods",
        "date": date.today().isoformat(),
        "command": shlex.join(argv),
        "versions": versions(),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "jobs": plan.jobs, "threads": config.threads},
        "target": config.target,
        "seeds": config.seeds,
        "baseline": config.baseline,
        "tuning": tuning,
        "common_settings": common,
        "summary": {m.name: {cost: summarize(of(rows, m.name), cost) for cost in COSTS} for m in methods},
        "ratios": [
            {"method": a, "against": b, **{cost: vars(r) for cost, r in by_cost.items()}}
            for (a, b), by_cost in found.items()
        ],
        "sentences": said,
        "claims": verdicts,
        "weak_points": weak,
    }
    write_json(plan.folder / "rows.json", finite(rows))
    write_json(plan.folder / "summary.json", finite(document))
    return lines


def main(argv: list[str]) -> int:
    plan = read_plan(argv)
    if plan.config.dry_run:
        grid = plan.grid(plan.config.tuning_seeds[0])
        for run in grid or plan.reported(choose(plan, []), {}):
            say(f"python -m fastrl.train {shlex.join(run.args)} --out {run.folder}")
        say(f"{len(grid)} runs or more to choose learning rates, {len(plan.methods) * plan.config.seeds} to compare")
        return 0
    try:
        tuning: list[dict] = []
        for seed in plan.config.tuning_seeds:
            if grid := plan.grid(seed, tuning):
                tuning += do(plan, grid, f"learning rates, seed {seed}")
        chosen = choose(plan, tuning)
        seconds = {name: min(row["spent"]["seconds"] for row in of(tuning, name)) for name in chosen if tuning}
        runs = plan.reported(chosen, seconds)
        rows = do(plan, runs, "comparison")
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return STOPPED
    for line in write_results(plan, tuning, rows, runs, ["python", "-m", "fastrl.compare", *argv]):
        say(line)
    say(f"{plan.folder}/compare.md, compare.png, rows.json, summary.json")
    return 0


if __name__ == "__main__":
    run_program(main)
