"""Scores of rollouts and evaluations by hand, by brute force over subsets, and their intervals by simulation."""

import itertools
import math
import random

import pytest
import torch

from fastrl.base.types import Completion, Problem, RolloutGroup
from fastrl.step.metrics import (
    evaluation_metrics,
    evaluation_table,
    interval95,
    majority,
    pass_at,
    reward_function_metrics,
    reward_function_sums,
    rollout_metrics,
    rollout_table,
)


def group(*completions):
    """(reward, tokens, finish_reason[, rewards by function]) ..."""
    return RolloutGroup(
        problem=Problem(id="p", prompt="", answer=""),
        completions=[
            Completion(
                token_ids=[1] * n, rollout_logprobs=[0.0] * n, finish_reason=finish, reward=r, rewards=dict(*names)
            )
            for r, n, finish, *names in completions
        ],
        policy_version=0,
    )


def test_rollout_metrics_with_groups_of_different_size():
    groups = [
        group((1.0, 3, "stop"), (0.0, 5, "stop"), (0.0, 9, "length")),  # mean 1/3, unbiased std sqrt(1/3)
        group((1.0, 2, "stop"), (1.0, 4, "stop")),  # all right
        group((0.0, 9, "length"), (0.0, 9, "length"), (0.0, 1, "stop"), (0.0, 6, "stop")),  # all wrong
        group((-0.5, 8, "stop"), (-0.5, 7, "stop")),  # equal and below zero: wrong
        group((0.5, 2, "stop")),  # one completion: std 0, and right
    ]
    metrics = rollout_metrics(rollout_table(groups))
    assert metrics == pytest.approx(
        {
            "reward": (1 + 2 + 0 - 1 + 0.5) / 12,
            "reward_std": math.sqrt(1 / 3) / 5,
            "frac_reward_zero_std": 4 / 5,
            "frac_reward_zero_std/all_right": 2 / 5,
            "frac_reward_zero_std/all_wrong": 2 / 5,
            "completions/mean_length": (17 + 6 + 25 + 15 + 2) / 12,
            "completions/min_length": 1,
            "completions/max_length": 9,
            "completions/mean_terminated_length": (8 + 6 + 7 + 15 + 2) / 9,
            "completions/clipped_ratio": 3 / 12,
        }
    )


def test_rollout_metrics_of_ranks_whose_group_numbers_have_gaps():
    table = rollout_table(
        [
            group((1.0, 2, "stop"), (0.0, 2, "stop")),
            group((0.25, 4, "stop"), (0.25, 6, "stop")),
            group((2.0, 1, "stop"), (5.0, 1, "stop")),
        ]
    )
    apart = table.clone()
    apart[2:, 0] = torch.tensor([7.0, 7.0, 9.0, 9.0])  # the other numbers belong to nobody
    for same in (apart, table[torch.tensor([2, 0, 5, 3, 1, 4])]):
        assert rollout_metrics(same) == pytest.approx(rollout_metrics(table))
    assert rollout_metrics(table)["reward_std"] == pytest.approx((math.sqrt(0.5) + 0 + math.sqrt(4.5)) / 3)


def test_nobody_terminated():
    metrics = rollout_metrics(rollout_table([group((0.1, 5, "length"), (0.1, 7, "length"))]))
    assert math.isnan(metrics["completions/mean_terminated_length"])
    assert metrics["completions/clipped_ratio"] == 1 and metrics["frac_reward_zero_std/all_right"] == 1


def test_reward_functions_that_do_not_apply():
    groups = [
        group((0.0, 1, "stop", {"a": 1.0, "b": None}), (0.0, 1, "stop", {"a": 0.0, "b": None})),
        group((0.0, 1, "stop", {"a": 0.5, "b": 2.0, "c": None}), (0.0, 1, "stop", {"a": None})),
    ]
    # a: 1, 0, 0.5 -> mean 0.5, unbiased std 0.5; b: 2 alone -> std 0, not NaN; c never applied
    assert reward_function_metrics(reward_function_sums(groups)) == pytest.approx(
        {"rewards/a/mean": 0.5, "rewards/a/std": 0.5, "rewards/b/mean": 2.0, "rewards/b/std": 0.0}
    )


def test_pass_at_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
                assert pass_at(k, c, n) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)
    assert pass_at(1, 3, 8) == pytest.approx(3 / 8)
    assert pass_at(512, 1, 1024) == pytest.approx(0.5)  # numbers of 300 digits


@pytest.mark.parametrize("k, n", [(0, 4), (5, 4), (-1, 4)])
def test_pass_at_needs_enough_completions(k, n):
    with pytest.raises(ValueError, match=rf"pass@k needs 1 <= k <= n, got k={k}, n={n}"):
        pass_at(k, 1, n)


@pytest.mark.parametrize(
    "keys, correct, share",
    [
        (["a", "a", "b"], [True, True, False], 1.0),
        (["a", "b", "b"], [True, False, False], 0.0),
        (["a", "a", "b", "b", None], [True, True, False, False, False], 0.5),
        (["a", "b", "c"], [False, True, False], 1 / 3),
        ([None, None, None, "a"], [False, False, False, True], 1.0),  # no answer has no vote
        ([None, None], [False, False], 0.0),
        ([], [], 0.0),
        (["b", None, "b", "a"], [True, True, True, False], 1.0),
    ],
)
def test_majority(keys, correct, share):
    assert majority(keys, correct) == pytest.approx(share)


def wilson(c, n, z=1.959964):
    center, half = c / n + z * z / (2 * n), z * math.sqrt(c / n * (1 - c / n) / n + z * z / (4 * n * n))
    return (center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n)


def test_interval_of_independent_answers_is_wilsons():
    # Wilson for 8 of 10 (e.g. Agresti and Coull 1998): 0.490 to 0.943
    assert wilson(8, 10) == pytest.approx((0.490, 0.943), abs=5e-4)
    # ours has the unbiased variance p (1 - p) / (n - 1): Wilson at n - 1
    assert interval95([1.0] * 8 + [0.0] * 2) == pytest.approx(wilson(8 * 0.9, 9), rel=1e-6)
    assert interval95([1.0] * 600 + [0.0] * 400) == pytest.approx(wilson(600, 1000), abs=1e-4)


def test_interval_does_not_collapse():
    z2 = 1.959964**2
    for n in (1, 5, 200):
        low, high = interval95([0.0] * n)
        assert (low, high) == pytest.approx((0.0, z2 / (n + z2)), abs=1e-12)
        low, high = interval95([1.0] * n)
        assert (low, high) == pytest.approx((n / (n + z2), 1.0), abs=1e-12)
    low, high = interval95([0.5] * 100)  # no spread between problems: as wide as 100 independent answers
    assert (low, high) == pytest.approx(wilson(50, 100), rel=1e-6)


def test_interval_counts_problems_and_not_completions():
    # 8 equal completions of each of 40 problems say no more than one of each
    answers = [1.0] * 25 + [0.0] * 15
    assert interval95([sum([a] * 8) / 8 for a in answers]) == interval95(answers)
    low, high = interval95(answers)
    clustered = interval95([0.75 if a else 0.25 for a in answers])
    assert clustered[1] - clustered[0] < 0.6 * (high - low)  # steadier problems: narrower


def test_interval_covers_the_truth():
    rng = random.Random(0)  # noqa: S311 (a simulation)
    for a, b in ((2.0, 2.0), (0.3, 0.6)):  # pass rates of problems ~ Beta(a, b): mild and strong clustering
        covered = 0
        for _ in range(300):
            rates = [rng.betavariate(a, b) for _ in range(50)]
            low, high = interval95([sum(rng.random() < p for _ in range(8)) / 8 for p in rates])
            covered += low <= a / (a + b) <= high
        assert covered >= 0.92 * 300
    # the same completions taken for independent ones cover far less
    naive = 0
    for _ in range(300):
        rates = [rng.betavariate(0.3, 0.6) for _ in range(50)]
        low, high = wilson(sum(rng.random() < p for p in rates for _ in range(8)), 400)
        naive += low <= 1 / 3 <= high
    assert naive < 0.75 * 300


def test_evaluation_by_hand():
    groups = [
        group((1.0, 2, "stop"), (1.0, 4, "stop"), (0.0, 6, "length"), (0.0, 8, "length")),
        group((0.0, 1, "stop"), (0.0, 1, "stop"), (0.0, 1, "stop"), (0.0, 1, "stop")),
        group((1.0, 3, "stop"), (0.0, 3, "stop"), (0.0, 3, "stop"), (0.0, 3, "stop")),
    ]
    correct = [[True, True, False, False], [False] * 4, [True, False, False, False]]
    keys = [["a", "a", "b", "b"], ["x", "y", None, "x"], ["a", "b", None, None]]
    table = evaluation_table(groups, correct, keys)
    assert table.tolist() == [[4, 2, 0.5, 20, 2], [4, 0, 0, 4, 0], [4, 1, 0.5, 12, 0]]
    metrics = evaluation_metrics(table)
    values = {
        "avg@4": (0.5 + 0 + 0.25) / 3,
        "pass@1": (0.5 + 0 + 0.25) / 3,
        "pass@2": (5 / 6 + 0 + 1 / 2) / 3,  # 1 - C(2,2)/C(4,2); 1 - C(3,2)/C(4,2)
        "pass@4": 2 / 3,
        "maj@4": 1 / 3,
    }
    plain = {"length": 3.0, "clipped_ratio": 2 / 12, "num_problems": 3}
    bounds = {f"{name}/ci95_{end}" for name in values for end in ("low", "high")}
    assert set(metrics) == {*values, *plain, *bounds}
    assert {name: metrics[name] for name in {**values, **plain}} == pytest.approx({**values, **plain})
    assert (metrics["avg@4/ci95_low"], metrics["avg@4/ci95_high"]) == interval95([0.5, 0.0, 0.25])
    assert (metrics["pass@4/ci95_low"], metrics["pass@4/ci95_high"]) == interval95([1.0, 0.0, 1.0])
    assert (metrics["maj@4/ci95_low"], metrics["maj@4/ci95_high"]) == interval95([0.5, 0.0, 0.5])


def test_pass_at_k_of_a_k_that_is_no_power_of_two():
    metrics = evaluation_metrics(torch.tensor([[6.0, 3, 1, 12, 0], [6, 1, 0, 18, 3]], dtype=torch.float64))
    names = [n for n in metrics if "@" in n and "/" not in n]
    assert names == ["avg@6", "pass@1", "pass@2", "pass@4", "pass@6", "maj@6"]
    assert metrics["pass@4"] == pytest.approx((1 + 4 / 6) / 2)  # 6 - 3 < 4; 1 - C(5,4)/C(6,4) = 1 - 5/15
    assert metrics["length"] == pytest.approx(30 / 12) and metrics["clipped_ratio"] == pytest.approx(3 / 12)
