"""The order of problems: a function of seed and epoch, whole groups up to the budget, and a position that resumes."""

import pytest

from fastrl.allocation import ALLOCATORS
from fastrl.allocation.uniform import Uniform
from fastrl.base.types import Problem


def problems(n):
    return [Problem(id=f"p{i}", prompt="", answer="") for i in range(n)]


def started(n=7, seed=0, group_size=4):
    allocation = Uniform(group_size=group_size)
    allocation.start(problems(n), seed, steps=100)
    return allocation


def ids(plan):
    return [problem.id for problem, _ in plan]


def test_order_is_a_function_of_seed_and_epoch():
    order = [p.id for p in started(50, seed=3).permutation(2)]
    other = started(50, seed=3)
    other.take(400)  # two epochs on: nothing depends on what was taken
    assert [p.id for p in other.permutation(2)] == order
    assert [p.id for p in started(50, seed=4).permutation(2)] != order
    assert [p.id for p in started(50, seed=3).permutation(1)] != order
    assert order != sorted(order, key=lambda name: int(name[1:]))
    # seed and epoch are not simply added
    assert [p.id for p in started(50, seed=2).permutation(3)] != order
    assert sorted(p.id for p in started(9, seed=-1).permutation(0)) == ids([(p, 0) for p in problems(9)])


def test_every_problem_once_per_epoch():
    allocation = started(7)
    taken = [ids(allocation.take(4))[0] for _ in range(21)]
    epochs = [taken[:7], taken[7:14], taken[14:]]
    for epoch, order in enumerate(epochs):
        assert sorted(order) == [f"p{i}" for i in range(7)]
        assert order == [p.id for p in allocation.permutation(epoch)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_take_across_the_end_of_an_epoch():
    allocation = started(5, group_size=2)
    first, second, third, fourth = ([p.id for p in allocation.permutation(epoch)] for epoch in range(4))
    assert ids(allocation.take(6)) == first[:3]
    assert ids(allocation.take(8)) == first[3:] + second[:2]
    assert allocation.state_dict() == {"epoch": 1, "position": 2}
    assert ids(allocation.take(20)) == second[2:] + third + fourth[:2]  # more than an epoch at once


@pytest.mark.parametrize("budget, groups", [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (30, 8)])
def test_budget_is_met_by_whole_groups(budget, groups):
    plan = started(7, group_size=4).take(budget)
    assert [size for _, size in plan] == [4] * groups  # never fewer completions, never a whole group more
    assert sum(size for _, size in plan) >= budget > sum(size for _, size in plan[:-1]) or groups == 0


def test_budget_of_a_step():
    assert started(group_size=6).budget(5) == 30
    assert started(group_size=6).min_group_size == 6


@pytest.mark.parametrize("taken", [0, 3, 5, 7, 11, 14])
def test_resuming_continues(taken):
    one = started(7, seed=5)
    one.take(4 * taken)
    resumed = started(7, seed=5)
    resumed.take(4)  # whatever it did before is overwritten
    resumed.load_state_dict(dict(one.state_dict()))
    for budget in (4, 12, 40, 9):
        assert ids(resumed.take(budget)) == ids(one.take(budget))
    assert resumed.state_dict() == one.state_dict()


def test_problems_are_not_reordered_in_place():
    given = problems(6)
    allocation = Uniform(group_size=2)
    allocation.start(given, seed=1, steps=100)
    allocation.take(30)
    assert [p.id for p in given] == [f"p{i}" for i in range(6)]


def test_registry_and_refused_group_size():
    assert ALLOCATORS["uniform"] is Uniform
    with pytest.raises(ValueError, match="--allocation.group-size must be at least 1, got 0"):
        Uniform(group_size=0)
