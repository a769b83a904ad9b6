"""Results as a person reads them: tables, and sentences that say which difference the seeds bear out."""

import math
import statistics
from collections.abc import Sequence

import numpy

from fastrl.comparison.methods import COSTS, Claim, Method
from fastrl.comparison.ratios import Ratio, bounds, ratio, summarize

WORDS = {"rollouts": "rollouts", "backward_passes": "backward passes", "seconds": "seconds", "tokens": "tokens"}


def of(rows: Sequence[dict], method: str) -> list[dict]:
    return [row for row in rows if row["method"] == method]


def ratios(rows: Sequence[dict], pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Ratio]]:
    """(method, against) -> ratio by cost."""
    return {(a, b): {cost: ratio(of(rows, a), of(rows, b), cost) for cost in COSTS} for a, b in pairs}


def compared_pairs(methods: Sequence[Method], claims: Sequence[Claim], baseline: str) -> list[tuple[str, str]]:
    """Everything against the baseline, every method against its controls, and what claims ask for besides."""
    pairs = [(m.name, baseline) for m in methods if m.name != baseline]
    pairs += [(m.control_of, m.name) for m in methods if m.control_of]
    pairs += [(c.method, c.against or baseline) for c in claims]
    return [pair for pair in dict.fromkeys(pairs) if pair[0] != pair[1]]


def cell(rows: Sequence[dict], cost: str) -> str:
    """`median [min, max]`; a run that missed the target shows as `-`, a median that did as more than what was spent.

    A collapsed one has no cost at any length.
    """
    values = summarize(rows, cost)
    shown = {name: "-" if value is None else f"{value:,.0f}" for name, value in values.items()}
    least = float(numpy.median(bounds(rows, cost)[0]))
    median = f"> {least:,.0f}" if values["median"] is None and math.isfinite(least) else shown["median"]
    return f"{median} [{shown['min']}, {shown['max']}]"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)]


def cost_table(rows: Sequence[dict], methods: Sequence[Method]) -> list[str]:
    lines = []
    for method in methods:
        own = of(rows, method.name)
        accuracy = [row["accuracy"] for row in own]
        reached = sum(row["reached"] for row in own)
        lines.append(
            [
                method.name,
                f"{own[0]['lr']:g}",
                f"{reached} of {len(own)}",
                *(cell(own, cost) for cost in COSTS),
                f"{statistics.median(accuracy):.3f}",
                f"{max(row['peak_host_mib'] or 0 for row in own):,.0f}",
            ]
        )
    return table(["method", "lr", "reached", *WORDS.values(), "last accuracy", "peak host MiB"], lines)


def ratio_table(found: dict[tuple[str, str], dict[str, Ratio]]) -> list[str]:
    lines = [[a, b, *(str(by_cost[cost]) for cost in COSTS)] for (a, b), by_cost in found.items()]
    return table(["method", "against", *WORDS.values()], lines)


def tuning_table(tuning: Sequence[dict], methods: Sequence[Method], chosen: dict[str, float]) -> list[str]:
    lines = []
    for method in (m for m in methods if not m.lr_from):
        for row in sorted(of(tuning, method.name), key=lambda row: (row["lr"], row["seed"])):
            cost = f"{row[method.headline]:,.0f}" if row["reached"] else f"> {row['spent'][method.headline]:,.0f}"
            mark = "taken" if row["lr"] == chosen[method.name] else ""
            numbers = [f"{row['lr']:g}", str(row["seed"]), method.headline, cost, f"{row['accuracy']:.3f}"]
            lines.append([method.name, *numbers, mark])
    return table(["method", "lr", "seed", "chosen by", "to the target", "last accuracy", ""], lines)


def sentences(
    rows: Sequence[dict], methods: Sequence[Method], found: dict[tuple[str, str], dict[str, Ratio]], baseline: str
) -> list[str]:
    """Who needs less than the baseline, and who is no better than a control: where the whole interval says so."""
    said = []
    others = [m.name for m in methods if m.name != baseline]
    for cost in COSTS:
        by_verdict = grouped({name: found[name, baseline][cost] for name in others})
        said.append(f"Fewer {WORDS[cost]} than {baseline}: {by_verdict['less'] or 'none'}.")
        said += [f"More {WORDS[cost]} than {baseline}: {by_verdict['more']}."] if by_verdict["more"] else []
    for control in (m for m in methods if m.control_of):
        name = control.control_of
        by_verdict = grouped({WORDS[cost]: r for cost, r in found[name, control.name].items()})
        for verdict, words in (("less", "beats"), ("more", "loses to"), ("unclear", "is not shown to differ from")):
            if by_verdict[verdict]:
                said.append(f"{name} {words} its control {control.name} in {by_verdict[verdict]}.")
    for method in methods:
        missed = [row for row in of(rows, method.name) if not row["reached"]]
        if missed:
            early = ("diverged", "collapsed")
            seeds = ", ".join(f"{r['seed']} ({r['ended']})" if r["ended"] in early else str(r["seed"]) for r in missed)
            said.append(f"{method.name} did not reach the target in its steps with seed {seeds}.")
    return said


def grouped(found: dict[str, Ratio]) -> dict[str, str]:
    """Ratios by name -> verdict -> the names with their ratios, as text."""
    return {
        verdict: ", ".join(f"{name} {r}" for name, r in found.items() if r.verdict == verdict)
        for verdict in ("less", "more", "unclear")
    }


def judge(claim: Claim, rows: Sequence[dict], found: dict[tuple[str, str], dict[str, Ratio]], baseline: str) -> dict:
    """A claim -> {"text", "met"}; met is None where nothing was asked or censored runs leave it open."""
    if claim.cost == "passes_per_step":
        most = max(row["spent"]["backward_passes"] / max(1, row["steps"]) for row in of(rows, claim.method))
        met = None if claim.at_most is None else most <= claim.at_most
        text = f"{claim.method} takes {most:.2f} backward passes a step"
    else:
        against = claim.against or baseline
        value = found[claim.method, against][claim.cost]
        text = f"{claim.method} needs {value} of the {WORDS[claim.cost]} of {against}"
        met = None
        if claim.at_most is not None and (value.most <= claim.at_most or value.least > claim.at_most):
            met = value.most <= claim.at_most
    wanted = "" if claim.at_most is None else f"; at most {claim.at_most:g} was wanted"
    word = "reported" if claim.at_most is None else {True: "met", False: "missed", None: "open"}[met]
    return {"text": f"{word}: {text}{wanted}", "met": met}


def weak_points(
    tuning: Sequence[dict], rows: Sequence[dict], chosen: dict[str, float], jobs: int, threads: int, cores: int
) -> list[str]:
    """What makes the numbers weaker than they look."""
    points = []
    for name, lr in chosen.items():
        tried = of(tuning, name)
        rates = {row["lr"] for row in tried}
        if tried and not any(row["reached"] for row in tried):
            points.append(f"{name}: no learning rate reached the target; {lr:g} had the highest accuracy.")
        elif len(rates) > 1 and lr in (min(rates), max(rates)):
            side = "smallest" if lr == min(rates) else "largest"
            points.append(
                f"{name} took the {side} learning rate of its grid, {lr:g}; a wider grid may serve it better."
            )
    if jobs * threads > cores:
        points.append(f"{jobs} runs of {threads} threads shared {cores} cores; seconds are longer than of a run alone.")
    commits = {str(row["commit"])[:12] for row in [*tuning, *rows]}
    if len(commits) > 1:
        points.append(f"Runs were made at different commits: {', '.join(sorted(commits))}.")
    if len({row["seed"] for row in rows}) < 5:
        points.append("Fewer than five seeds: the intervals are narrower than they should be.")
    return points


def finite(value: object) -> object:
    """JSON has no infinity and no NaN: null."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
