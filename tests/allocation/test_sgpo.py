"""sGPO and the filter of A*-PO: who is sampled, with how many completions, in which phase; and that it resumes."""

import json
import math

import pytest
import torch

from fastrl.allocation.apo_filter import APOFilter
from fastrl.allocation.sgpo import SGPO
from fastrl.allocation.uniform import Uniform
from fastrl.base.types import Completion, Problem, RolloutGroup
from fastrl.objectives.grpo import GRPO
from fastrl.step.batching import make_batch

# problems with 0..8 of 8 right, as measured: Qwen2.5-Math-1.5B at its first visit of a training set
U_SHAPE = [439, 151, 103, 91, 73, 76, 88, 96, 92]


def problem(name, right, n=8):
    """A problem that was solved `right` times of n in the profile."""
    return Problem(id=str(name), prompt="", answer="", profile_right=torch.tensor([1.0] * right + [0.0] * (n - right)))


def problems(counts):
    """counts[s] problems with s of 8 right, named s-0, s-1, ..."""
    return [problem(f"{s}-{i}", s) for s, count in enumerate(counts) for i in range(count)]


def started(counts, steps=100, seed=0, **fields):
    allocation = SGPO(**fields)
    allocation.start(problems(counts), seed, steps)
    return allocation


def right_of(plan):
    """How often each sampled problem was right in the profile."""
    return [int(p.id.split("-")[0]) for p, _ in plan]


# s of 8 right: pass rate s/8, 1 / (s/8) is 8, 4, 8/3, 2, 8/5, 4/3; 7/8 and 8/8 are above 0.75
FREQUENCY = {0: "unsolved", 1: 8, 2: 4, 3: 2, 4: 2, 5: 2, 6: 2, 7: "trivial", 8: "trivial"}
# (s + 1) / 10: 1/0.1 is 10, 1/0.2 is 5, 1/0.3 is 3.3; 0.8 and 0.9 are above 0.75; none is unsolved
BETA = {0: 8, 1: 4, 2: 2, 3: 2, 4: 2, 5: 2, 6: 2, 7: "trivial", 8: "trivial"}


@pytest.mark.parametrize("estimator, table", [("frequency", FREQUENCY), ("beta", BETA)])
@pytest.mark.parametrize("s", range(9))
def test_bucket_table(s, estimator, table):
    counts = [0] * 9
    counts[4] = 1  # somebody to learn from
    counts[s] += 1
    allocation = started(counts, estimator=estimator, unsolved_keep_frac=1.0)
    id = f"{s}-{counts[s] - 1}"
    size = allocation.sizes().get(id, "trivial")
    assert (size or "unsolved") == table[s]
    assert (id in {p.id for p in allocation.unsolved}) == (table[s] == "unsolved")


def test_group_size_is_the_largest_that_expects_one_right():
    allocation = SGPO(group_sizes=(2, 5, 7))
    # 7 * 0.14 = 0.98 expects one, 7 * 0.15 = 1.05 more than one; 1/5 of 10 is exactly 5
    assert [allocation.group_size(p) for p in (0.1, 0.14, 0.15, 0.2, 0.21, 0.5, 0.75)] == [7, 7, 5, 5, 2, 2, 2]
    # floor(log2(1/p)) as published
    for p in (0.13, 0.2, 0.25, 0.26, 0.3, 0.5, 0.7, 0.125, 0.01):
        assert SGPO().group_size(p) == min(8, max(2, 2 ** math.floor(math.log2(1 / p))))


def test_a_higher_threshold_keeps_what_is_solved_as_often():
    assert "7-0" in started([0, 0, 0, 0, 0, 0, 0, 1, 1], trivial_threshold=7 / 8).sizes()
    assert "8-0" not in started([0, 0, 0, 0, 0, 0, 0, 1, 1], trivial_threshold=7 / 8).sizes()


@pytest.mark.parametrize("unsolved, kept", [(0, 0), (1, 1), (10, 1), (11, 2), (70, 7), (71, 8)])
def test_a_tenth_of_the_unsolved_is_kept_rounded_up(unsolved, kept):
    assert len(started([unsolved, 0, 0, 0, 3, 0, 0, 0, 0]).unsolved) == kept


def test_the_unsolved_sample_is_random_and_fixed_by_the_seed():
    counts = [40, 0, 0, 0, 3, 0, 0, 0, 0]
    samples = [tuple(p.id for p in started(counts, seed=seed).unsolved) for seed in (0, 0, 1, 2)]
    assert samples[0] == samples[1] and len(set(samples)) == 3
    assert samples[0] != tuple(f"0-{i}" for i in range(4))


def test_phases_go_from_easy_to_hard_and_keep_to_their_own():
    # clusters: 40 problems x 2 = 80, 10 x 4 = 40, 5 x 8 = 40 of 160: half, a quarter and a quarter of 40 steps
    counts = [20, 5, 10, 10, 10, 10, 10, 30, 30]
    allocation = started(counts, steps=40)
    assert allocation.phase_lengths == [20, 10, 10]
    plans = [allocation.take(32) for _ in range(44)]  # more than planned: the last phase goes on
    sizes = [{size for _, size in plan} for plan in plans]
    assert sizes == [{2}] * 20 + [{4}] * 10 + [{8}] * 14
    allowed = {2: {0, 3, 4, 5, 6}, 4: {0, 2}, 8: {0, 1}}
    for size, first, last in ((2, 0, 20), (4, 20, 30), (8, 30, 44)):
        taken = [entry for plan in plans[first:last] for entry in plan]
        assert set(right_of(taken)) == allowed[size]  # never 7 or 8
        assert {p.id for p, _ in taken if p.id.startswith("0-")} == {p.id for p in allocation.unsolved}
        assert len(allocation.unsolved) == 2  # of 20


def test_a_phase_takes_each_problem_once_before_any_twice():
    allocation = started([10, 0, 0, 4, 5, 0, 0, 0, 0], steps=50)
    taken = [p.id for _ in range(5) for p, _ in allocation.take(8)]  # 4 groups of 2 a step: two passes over 10
    for start in (0, 10):
        assert sorted(taken[start : start + 10]) == sorted(
            [f"3-{i}" for i in range(4)] + [f"4-{i}" for i in range(5)] + [allocation.unsolved[0].id]
        )
    assert taken[:10] != taken[10:]


def test_phase_lengths_add_up_and_empty_phases_are_left_out():
    # equal thirds of 10 steps end at 3.33, 6.67 and 10
    assert started([0, 1, 2, 4, 0, 0, 0, 0, 0], steps=10).phase_lengths == [3, 4, 3]
    only_hard = started([0, 3, 0, 0, 0, 0, 0, 0, 0], steps=10)
    assert only_hard.phases == [8] and only_hard.phase_lengths == [10]
    assert {size for _, size in only_hard.take(40)} == {8}
    # 2 of 402 in 10 steps rounds to none: that phase is passed over
    short = started([0, 50, 0, 1, 0, 0, 0, 0, 0], steps=10)
    assert short.phase_lengths == [0, 10] and {size for _, size in short.take(8)} == {8}


@pytest.mark.parametrize("rollouts", [8, 9, 15, 16, 61, 250])
def test_a_step_has_the_budget_and_at_most_seven_more(rollouts):
    allocation = started([5, 9, 9, 9, 9, 9, 9, 9, 9], steps=12, num_rollouts_per_step=rollouts)
    assert allocation.budget(problems_per_step=999) == rollouts
    seen = set()
    for _ in range(12):
        plan = allocation.take(rollouts)
        seen |= {size for _, size in plan}
        assert rollouts <= sum(size for _, size in plan) <= rollouts + 7
    assert seen == {2, 4, 8}


def test_the_default_budget_is_that_of_the_largest_groups():
    assert SGPO().budget(32) == 256 and SGPO(group_sizes=(2, 4)).budget(32) == 128
    assert (SGPO().min_group_size, SGPO().max_group_size) == (2, 8)


def reward_step(allocation, reward):
    """One step in which every completion earns `reward`."""
    groups = []
    for p, size in allocation.take(8):
        completions = [Completion(token_ids=[], rollout_logprobs=[], finish_reason="stop") for _ in range(size)]
        for completion in completions:
            completion.reward = reward
        groups.append(RolloutGroup(problem=p, completions=completions, policy_version=0))
    allocation.observe(groups)
    return {len(group.completions) for group in groups}


def test_patience_ends_a_phase_that_no_longer_gains():
    allocation = started([0, 5, 5, 5, 0, 0, 0, 0, 0], phase_schedule="patience", patience=2)
    # best 0.3 at the third step, then two without a gain; in the next phase lower rewards are no loss
    rewards = [0.1, 0.2, 0.3, 0.3, 0.25, 0.05, 0.04, 0.06, 0.06, 0.05, 0.9, 0.1, 0.1, 0.1]
    sizes = [reward_step(allocation, reward) for reward in rewards]
    #        best: .1   .2   .3   -    -   | .05  -    .06  -    -   | .9   -    -    - the last phase does not end
    assert sizes == [{2}] * 5 + [{4}] * 5 + [{8}] * 4


@pytest.mark.parametrize("schedule", ["proportional", "patience"])
def test_resuming_continues_anywhere(schedule):
    fields = {"phase_schedule": schedule, "patience": 3, "num_rollouts_per_step": 16}
    counts = [20, 5, 6, 7, 0, 0, 0, 3, 0]

    def step(allocation, t):
        plan = allocation.take(16)
        groups = [
            RolloutGroup(
                problem=p,
                policy_version=0,
                completions=[
                    Completion(token_ids=[], rollout_logprobs=[], finish_reason="stop", reward=float(t * 7 % 5 > k % 4))
                    for k in range(size)
                ],
            )
            for p, size in plan
        ]
        allocation.observe(groups)
        return [(p.id, size) for p, size in plan]

    straight = started(counts, steps=24, seed=3, **fields)
    states, plans = [], []
    for t in range(24):
        states.append(json.dumps(straight.state_dict()))
        plans.append(step(straight, t))
    assert len({size for plan in plans for _, size in plan}) == 3
    for cut in range(24):
        resumed = started(counts, steps=24, seed=3, **fields)
        step(resumed, 1)  # whatever it did before is overwritten
        resumed.load_state_dict(json.loads(states[cut]))
        assert [step(resumed, t) for t in range(cut, 24)] == plans[cut:]
        assert resumed.state_dict() == straight.state_dict()


def test_a_longer_run_moves_the_ends_ahead_and_never_goes_back():
    counts = [20, 5, 10, 10, 10, 10, 10, 30, 30]  # half, a quarter and a quarter of the steps
    short, long = started(counts, steps=40), started(counts, steps=80)
    for _ in range(25):  # 20 steps of groups of 2, 5 of groups of 4
        short.take(32)
    long.load_state_dict(short.state_dict())
    assert [{size for _, size in long.take(32)} for _ in range(20)] == [{4}] * 15 + [{8}] * 5


def test_a_new_profile_starts_the_curriculum_anew():
    allocation = started([10, 4, 4, 4, 0, 0, 0, 0, 0], steps=6)
    for _ in range(6):
        allocation.take(16)
    assert allocation.phase == 2
    epoch = allocation.epoch
    for p in allocation.problems:  # everything has become easier: 1 -> 2, 2 -> 4, 3 -> 8 of 8 right
        p.profile_right = torch.tensor([1.0] * {0: 0, 1: 2, 2: 4, 3: 8}[int(p.id[0])] + [0.0] * 8)[:8]
    allocation.profile_changed()
    assert (allocation.phase, allocation.phase_steps, allocation.position) == (0, 0, 0) and allocation.epoch > epoch
    plans = [allocation.take(16) for _ in range(6)]
    # 4 x 2 and 4 x 4 completions: a third and two thirds of 6 steps
    assert [{size for _, size in plan} for plan in plans] == [{2}] * 2 + [{4}] * 4
    assert {p.id[0] for plan in plans[:2] for p, _ in plan} <= {"2", "0"}
    assert {p.id[0] for plan in plans[2:] for p, _ in plan} <= {"1", "0"}


def test_a_profile_that_leaves_nothing_is_refused_and_changes_nothing():
    with pytest.raises(ValueError, match="of 5 problems 3 were never solved.*trivial-threshold 0.75, so nothing is"):
        started([3, 0, 0, 0, 0, 0, 0, 0, 2])
    allocation = started([3, 0, 0, 2, 2, 0, 0, 0, 0])
    before, sizes = allocation.state_dict(), allocation.sizes()
    for p in allocation.problems:
        p.profile_right = torch.ones(8)
    with pytest.raises(ValueError, match="nothing is left"):
        allocation.profile_changed()
    assert allocation.state_dict() == before and allocation.sizes() == sizes


def test_advantages_of_groups_of_several_sizes_are_those_of_each_alone():
    rewards = [[1.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1.0] + [0.0] * 7, [1.0, 1.0]]
    groups = [
        RolloutGroup(
            problem=Problem(id=str(k), prompt="", answer="", prompt_ids=[1]),
            policy_version=0,
            completions=[
                Completion(token_ids=[2] * (1 + i), rollout_logprobs=[0.0] * (1 + i), finish_reason="stop", reward=r)
                for i, r in enumerate(values)
            ],
        )
        for k, values in enumerate(rewards)
    ]
    batch = make_batch(groups, GRPO().credit, pad_id=0, max_new_tokens=8)
    # unbiased std of one success in G: sqrt(1/G). G = 2: (1 - 1/2) / .7071; 4: (1 - 1/4) / .5; 8: (1 - 1/8) / .35355
    expected = [0.70711, -0.70711, -0.5, -0.5, 1.5, -0.5, 2.47487, *[-0.35355] * 7, 0, 0]
    assert batch.credit.tolist() == pytest.approx(expected, abs=1e-4)
    assert batch.group.tolist() == [0] * 2 + [1] * 4 + [2] * 8 + [3] * 2


def mixed_per_1000(allocation, rate, steps, budget):
    """Expected groups with unlike rewards per 1000 rollouts: P(mixed) = 1 - p^G - (1 - p)^G."""
    plan = [entry for _ in range(steps) for entry in allocation.take(budget)]
    mixed = sum(1 - rate[p.id] ** g - (1 - rate[p.id]) ** g for p, g in plan)
    return 1000 * mixed / sum(g for _, g in plan)


def test_more_groups_teach_something_than_with_groups_of_eight():
    generator = torch.Generator().manual_seed(0)
    pool = problems(U_SHAPE)
    rate = {p.id: int(p.id.split("-")[0]) / 8 for p in pool}
    for p in pool:  # the profile is a sample, so many problems are in the wrong bucket
        p.profile_right = torch.bernoulli(torch.full((8,), rate[p.id]), generator=generator)
    uniform = Uniform(group_size=8)
    uniform.start(pool, seed=0, steps=200)
    fixed = mixed_per_1000(uniform, rate, 1209, 256)  # 32 whole epochs
    # 1000 sum_s count_s (1 - (s/8)^8 - (1 - s/8)^8) / (8 * 1209)
    assert fixed == pytest.approx(58.88, abs=0.01)
    sgpo = SGPO()
    sgpo.start(pool, seed=0, steps=200)
    assert mixed_per_1000(sgpo, rate, 200, 256) > 1.9 * fixed


def test_mixed_groups_per_rollout_never_grow_with_the_group():
    def per_rollout(p, g):
        return (1 - p**g - (1 - p) ** g) / g

    assert [round(per_rollout(1 / 8, g), 3) for g in (2, 4, 8, 16)] == [0.109, 0.103, 0.082, 0.055]
    for p in (0.01, 0.125, 0.3, 0.5, 0.9):
        assert per_rollout(p, 2) == pytest.approx(per_rollout(p, 3))
        assert all(per_rollout(p, g + 1) < per_rollout(p, g) for g in range(3, 16))


BAD = [
    ({"group_sizes": (1, 2)}, "group-sizes must be 2 or more, each larger than the last, got \\(1, 2\\)"),
    ({"group_sizes": (4, 2)}, "group-sizes must be 2 or more, each larger than the last"),
    ({"group_sizes": ()}, "group-sizes must be 2 or more"),
    ({"trivial_threshold": 0.0}, "trivial-threshold must be above 0, got 0.0"),
    ({"unsolved_keep_frac": 1.5}, "unsolved-keep-frac must be at most 1, got 1.5"),
    ({"patience": 0}, "patience must be at least 1, got 0"),
    ({"num_rollouts_per_step": 7}, "num-rollouts-per-step must hold a group of 8 \\(or be 0\\), got 7"),
]


@pytest.mark.parametrize("fields, message", BAD, ids=[str(f) for f, _ in BAD])
def test_settings_that_cannot_work(fields, message):
    with pytest.raises(ValueError, match=f"--allocation.{message}"):
        SGPO(**fields)


def test_outlook_counts_what_happens_to_every_problem():
    # 2 of 20 unsolved kept; 10 x 8, 10 x 4, 40 x 2 = 80 + 40 + 80 of 200: 20, 10 and 20 of 50 steps; 7 + 3 trivial
    line = started([20, 10, 10, 10, 10, 10, 10, 7, 3], steps=50).outlook()
    assert line == (
        "60 of 90 problems by group size, in phases: 40 x 2 in 20 steps, 10 x 4 in 10 steps, 10 x 8 in 20 steps; "
        "2 of 20 unsolved ones in every phase; 10 solved too often"
    )


def test_the_filter_drops_only_what_was_never_solved():
    allocation = APOFilter()
    allocation.start(problems([6, 1, 0, 0, 1, 0, 0, 0, 2]), seed=0, steps=10)
    assert allocation.min_group_size == 1 and allocation.budget(3) == 3
    epochs = [[p.id for p, size in allocation.take(4) if size == 1] for _ in range(3)]
    assert all(sorted(epoch) == ["1-0", "4-0", "8-0", "8-1"] for epoch in epochs)
    assert allocation.outlook() == "4 of 10 problems by group size: 4 x 1"
    with pytest.raises(ValueError, match="none of 3 problems was solved in the profile"):
        APOFilter().start(problems([3]), seed=0, steps=10)
