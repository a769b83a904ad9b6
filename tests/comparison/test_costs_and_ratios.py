"""Costs, medians, ratios, choices and sentences of a comparison, by hand."""

import json
import math

import pytest

from fastrl.comparison.costs import Point, choose_lr, first_reaching, measure, read_points
from fastrl.comparison.methods import Claim, Method
from fastrl.comparison.plots import over_seeds
from fastrl.comparison.ratios import ratio, summarize
from fastrl.comparison.report import cell, compared_pairs, judge, of, ratios, sentences, weak_points
from fastrl.comparison.runs import Run


def write_log(folder, records: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def step(number: int, seconds: float, reward: float = 0.5) -> dict:
    """A step of 8 completions of 10 tokens and 2 passes."""
    return {
        "step": number,
        "reward": reward,
        "step_time": seconds,
        "num_rollouts": 8 * number,
        "num_tokens": 80 * number,
        "num_backward_passes": 2 * number,
        "memory/host_mib": 100.0 + number,
    }


def evaluation(number: int, accuracy: float, name: str = "sums") -> dict:
    return {"step": number, f"eval/{name}/avg@4": accuracy, "num_rollouts": 8 * number, "timing_s/eval": 50.0}


def run_in(folder) -> Run:
    return Run(method="grpo", lr=1e-4, seed=0, folder=folder, args=())


def row(method: str, seed: int, cost: float | None, spent: float = 0, **more) -> dict:
    """A result whose every cost is `cost`; None: not reached."""
    costs = ("rollouts", "backward_passes", "seconds", "tokens")
    return {
        "method": method,
        "seed": seed,
        "lr": 1e-4,
        "reached": cost is not None,
        "accuracy": 0.5,
        "steps": 10,
        "spent": dict.fromkeys(costs, spent or cost),
        "ended": "target" if cost else "done",
        "commit": "abc",
        **dict.fromkeys(costs, cost),
    } | more


# what a run cost


def test_costs_are_those_of_the_steps_before_the_first_evaluation_at_the_target(tmp_path):
    write_log(
        tmp_path,
        [
            evaluation(0, 0.2),
            evaluation(0, 0.9, "other"),
            step(1, 1.5),
            step(2, 0.5, reward=0.7),
            evaluation(2, 0.4),
            evaluation(2, 0.9, "other"),
            step(3, 1.0),
            step(4, 2.0),
            evaluation(4, 0.8),
            step(5, 9.0),
            evaluation(5, 0.9),
        ],
    )
    got = measure(run_in(tmp_path), 0.8)
    # 4 steps: 32 completions, 8 passes, 320 tokens, 1.5 + 0.5 + 1 + 2 s; the 50 s of each evaluation are left out
    assert (got["rollouts"], got["backward_passes"], got["tokens"], got["seconds"]) == (32, 8, 320, 5.0)
    assert got["reached"] and got["steps"] == 5 and got["accuracy"] == 0.9 and got["spent"]["seconds"] == 14.0
    assert got["peak_host_mib"] == 105.0 and got["peak_device_mib"] is None
    points = read_points(tmp_path / "metrics.jsonl")
    assert [p.accuracy for p in points] == [0.2, 0.4, 0.8, 0.9]
    assert math.isnan(points[0].reward) and points[1].reward == pytest.approx(0.6)  # (0.5 + 0.7) / 2
    assert first_reaching(points, 0.95) is None


def test_the_profile_is_paid_for(tmp_path):
    profile = {"step": 0, "profile/num_rollouts": 64, "profile/num_tokens": 500, "profile/seconds": 3.0}
    write_log(tmp_path, [profile, evaluation(0, 0.2), step(1, 1.0), evaluation(1, 0.9)])
    got = measure(run_in(tmp_path), 0.8)
    # 8 + 64, 80 + 500, 1 + 3; profiling takes no gradient
    assert (got["rollouts"], got["tokens"], got["seconds"], got["backward_passes"]) == (72, 580, 4.0, 2)


def test_a_run_that_misses_the_target_has_no_cost_and_keeps_what_it_spent(tmp_path):
    write_log(tmp_path, [evaluation(0, 0.2), step(1, 1.0), evaluation(1, 0.5)])
    (tmp_path / "status.json").write_text('{"reason": "NumericsError", "exit_code": 4}')
    got = measure(run_in(tmp_path), 0.8)
    assert not got["reached"] and got["rollouts"] is None
    assert got["spent"]["rollouts"] == 8 and got["ended"] == "diverged"


def test_a_target_below_the_untrained_model_is_refused(tmp_path):
    write_log(tmp_path, [evaluation(0, 0.8), step(1, 1.0), evaluation(1, 0.9)])
    with pytest.raises(
        ValueError, match="grpo lr 0.0001 seed 0: accuracy is 0.800 before the first step; raise --target"
    ):
        measure(run_in(tmp_path), 0.8)


def test_the_learning_rate_is_that_of_the_lowest_headline_cost():
    def tried(lr, cost, accuracy, **more):
        return row("m", 9, cost, spent=100, lr=lr, accuracy=accuracy) | more

    grid = [tried(1e-4, 60, 0.85), tried(2e-4, 40, 0.85), tried(4e-4, None, 0.99)]
    assert choose_lr(grid, "rollouts") == 2e-4  # not reaching it costs more than anything
    grid[0]["seconds"] = 10
    assert choose_lr(grid, "seconds") == 1e-4
    missed = [tried(1e-4, None, 0.5), tried(2e-4, None, 0.7), tried(4e-4, None, 0.7)]
    assert choose_lr(missed, "rollouts") == 2e-4  # the higher accuracy, then the smaller rate
    other_seed = [tried(1e-4, 64, 0.85), tried(2e-4, None, 0.2)]
    assert choose_lr([*grid, *other_seed], "rollouts") == 1e-4  # 2e-4 collapsed with it; the mean of 60 and 64 is known
    assert choose_lr([*grid, tried(1e-4, 90, 0.85), tried(2e-4, 70, 0.85)], "rollouts") == 2e-4  # means of 75 and 55


# medians and ratios


def test_median_and_range_with_runs_that_missed():
    assert summarize([row("m", s, c) for s, c in enumerate((10, 30, 20))], "rollouts") == {
        "median": 20,
        "min": 10,
        "max": 30,
    }
    one_missed = [row("m", 0, 10), row("m", 1, None, spent=15), row("m", 2, 20)]
    assert summarize(one_missed, "seconds") == {"median": 20, "min": 10, "max": None}  # 10, 20, infinity
    two_missed = [row("m", 0, 10), row("m", 1, None, spent=15), row("m", 2, None, spent=15)]
    assert summarize(two_missed, "tokens") == {"median": None, "min": 10, "max": None}


def test_proportional_costs_have_exactly_their_ratio():
    base = [row("grpo", s, c) for s, c in enumerate((100, 300, 200, 700, 500))]
    half = [row("m", s, c / 2) for s, c in enumerate((100, 300, 200, 700, 500))]
    # pairing: whichever seeds are drawn, the medians are those of the same seed
    got = ratio(half[::-1], base, "rollouts")
    assert (got.least, got.most, got.low, got.high) == (0.5, 0.5, 0.5, 0.5) and got.verdict == "less"
    assert str(got) == "0.50 [0.50, 0.50]"


def test_interval_of_two_seeds_by_hand():
    base = [row("grpo", 0, 10), row("grpo", 1, 10)]
    got = ratio([row("m", 0, 5), row("m", 1, 15)], base, "seconds")
    # draws: both seed 0 (1/4): 0.5; both seed 1 (1/4): 1.5; one of each (1/2): 1
    assert (got.least, got.low, got.high, got.verdict) == (1.0, 0.5, 1.5, "unclear")


def test_two_and_a_half_percent_are_cut_from_each_end():
    """Of 6 seeds one is far out: a median of 6 draws moves only when at least 3 of them are that seed."""
    base = [row("grpo", s, 10) for s in range(6)]
    method = [row("m", s, 10) for s in range(5)] + [row("m", 5, 1000)]
    got = ratio(method, base, "rollouts")
    # P(3 or more of 6) = 1 - (5^6 + 6 5^5 + 15 5^4) / 6^6 = 0.062 > 0.025, P(4 or more) = 0.0087 < 0.025
    assert got.low == 1.0 and got.high == (10 + 1000) / 2 / 10


def test_censored_runs_bound_the_ratio():
    base = [row("grpo", s, 100) for s in range(3)]
    slow = ratio([row("m", s, None, spent=300) for s in range(3)], base, "rollouts")
    assert (slow.least, slow.most, slow.low, slow.high) == (3, math.inf, 3, math.inf)
    assert str(slow) == "> 3.00 [3.00, inf]" and slow.verdict == "more"
    # the baseline missed: it needs at least 400, so the method needs at most a quarter
    fast = ratio(base, [row("grpo", s, None, spent=400) for s in range(3)], "rollouts")
    assert (fast.least, fast.most, fast.high) == (0, 0.25, 0.25) and str(fast) == "< 0.25 [0.00, 0.25]"
    neither = ratio([row("m", 0, None, spent=1)], [row("grpo", 0, None, spent=9)], "rollouts")
    assert str(neither) == "? [0.00, inf]" and neither.verdict == "unclear"
    # one of three missed: medians are known, but draws with that seed twice are not
    some = ratio([row("m", 0, 50), row("m", 1, 60), row("m", 2, None, spent=70)], base, "rollouts")
    assert (some.least, some.most, some.low, some.high) == (0.6, 0.6, 0.5, math.inf)


# what follows


METHODS = [
    Method(name="grpo"),
    Method(name="sfpo", args="--update sfpo"),
    Method(name="grpo-lr", control_of="sfpo", lr_from="sfpo", lr_factor=3.4),
]
CLAIMS = [
    Claim(method="sfpo", cost="rollouts", at_most=0.45),
    Claim(method="sfpo", cost="seconds", at_most=0.3),
    Claim(method="sfpo", cost="passes_per_step", at_most=4),
    Claim(method="sfpo", cost="tokens"),
]


def results() -> list[dict]:
    rows = []
    for seed, base in enumerate((100, 200, 300)):
        rows += [row("grpo", seed, base), row("sfpo", seed, 0.4 * base), row("grpo-lr", seed, 0.3 * base)]
    return rows


def test_every_method_meets_the_baseline_and_its_controls():
    pairs = compared_pairs(METHODS, [*CLAIMS, Claim(method="grpo-lr", cost="rollouts", against="sfpo")], "grpo")
    assert pairs == [("sfpo", "grpo"), ("grpo-lr", "grpo"), ("sfpo", "grpo-lr"), ("grpo-lr", "sfpo")]


def test_sentences_say_who_wins_and_who_loses_to_a_control():
    rows = results()
    said = sentences(rows, METHODS, ratios(rows, compared_pairs(METHODS, CLAIMS, "grpo")), "grpo")
    assert "Fewer rollouts than grpo: sfpo 0.40 [0.40, 0.40], grpo-lr 0.30 [0.30, 0.30]." in said
    assert any(s.startswith("sfpo loses to its control grpo-lr in rollouts 1.33 [1.33, 1.33], backward") for s in said)
    rows[1] |= row("sfpo", 0, None, spent=500, ended="diverged")
    said = sentences(rows, METHODS, ratios(rows, compared_pairs(METHODS, CLAIMS, "grpo")), "grpo")
    assert "Fewer rollouts than grpo: grpo-lr 0.30 [0.30, 0.30]." in said  # a third of the draws has no median
    rows[4] |= row("sfpo", 1, None, spent=500, ended="collapsed")
    said = sentences(rows, METHODS, ratios(rows, compared_pairs(METHODS, CLAIMS, "grpo")), "grpo")
    assert "sfpo did not reach the target in its steps with seed 0 (diverged), 1 (collapsed)." in said


def test_a_collapsed_run_has_no_cost_at_any_length():
    gone = [
        row("grpo-lr", seed, None, spent=5, ended=("collapsed", "diverged", "collapsed")[seed]) for seed in range(3)
    ]
    rows = [*[r for r in results() if r["method"] != "grpo-lr"], *gone]
    found = ratios(rows, compared_pairs(METHODS, CLAIMS, "grpo"))
    # a run that is only out of steps after 5 would leave open whether it is the faster one
    assert str(found["sfpo", "grpo-lr"]["rollouts"]) == "0.00 [0.00, 0.00]"
    assert str(found["grpo-lr", "grpo"]["rollouts"]) == "inf [inf, inf]"
    assert cell(gone, "rollouts") == "- [-, -]"
    said = sentences(rows, METHODS, found, "grpo")
    assert any(s.startswith("sfpo beats its control grpo-lr in rollouts 0.00 [0.00, 0.00], back") for s in said)
    open_end = [r | {"ended": "done"} for r in gone]
    assert ratio(of(rows, "sfpo"), open_end, "rollouts").verdict == "unclear"
    assert cell(open_end, "rollouts") == "> 5 [-, -]"


def test_claims_are_met_missed_or_open():
    rows = results()
    found = ratios(rows, compared_pairs(METHODS, CLAIMS, "grpo"))
    texts = [judge(claim, rows, found, "grpo")["text"] for claim in CLAIMS]
    assert texts == [  # most passes in 10 steps: 0.4 * 300, with seed 2
        "met: sfpo needs 0.40 [0.40, 0.40] of the rollouts of grpo; at most 0.45 was wanted",
        "missed: sfpo needs 0.40 [0.40, 0.40] of the seconds of grpo; at most 0.3 was wanted",
        "missed: sfpo takes 12.00 backward passes a step; at most 4 was wanted",
        "reported: sfpo needs 0.40 [0.40, 0.40] of the tokens of grpo",
    ]
    none = [row(r["method"], r["seed"], None, spent=100) for r in rows]
    found = ratios(none, compared_pairs(METHODS, CLAIMS, "grpo"))
    assert judge(CLAIMS[0], none, found, "grpo") == {
        "text": "open: sfpo needs ? [0.00, inf] of the rollouts of grpo; at most 0.45 was wanted",
        "met": None,
    }


def test_weak_points_are_named():
    tuning = [row("grpo", 9, 10, lr=lr) for lr in (1e-4, 2e-4, 4e-4)] + [row("sfpo", 9, None, spent=5, commit="def")]
    found = weak_points(tuning, results(), {"grpo": 4e-4, "sfpo": 1e-4}, jobs=2, threads=2, cores=2)
    assert [text.partition(":")[0].partition(";")[0] for text in found] == [
        "grpo took the largest learning rate of its grid, 0.0004",
        "sfpo",
        "2 runs of 2 threads shared 2 cores",
        "Runs were made at different commits",
        "Fewer than five seeds",
    ]
    assert not weak_points(
        [row("grpo", 9, 10, lr=lr) for lr in (1, 2, 3)],
        [row("m", s, 1) for s in range(5)],
        {"grpo": 2},
        jobs=1,
        threads=1,
        cores=1,
    )


def test_curves_hold_their_last_value():
    def point(accuracy, rollouts):
        return Point(step=0, accuracy=accuracy, reward=0, spent={"rollouts": rollouts})

    spent, values = over_seeds(
        [[point(0.2, 0), point(0.9, 8)], [point(0.4, 0), point(0.5, 10), point(0.8, 20)]], "rollouts", "accuracy"
    )
    assert spent.tolist() == [0, 9, 20]  # (8 + 10) / 2, then the second run alone
    assert values.tolist() == [[0.2, 0.9, 0.9], [0.4, 0.5, 0.8]]
