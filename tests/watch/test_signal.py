"""Runs that cannot learn anything say so, why, and what helps; runs that can say nothing."""

import json
import re

import pytest
import torch

from fastrl.watch.signal import Signal, causes
from support.programs import run
from support.run_folders import rows
from support.trainers import make_trainer


def table(*groups: list[float], cut_off: int = 0) -> torch.Tensor:
    """Rewards by group; the first so many completions of all were cut off."""
    flat = [(number, reward) for number, group in enumerate(groups) for reward in group]
    return torch.tensor(
        [(number, reward, 5, n < cut_off) for n, (number, reward) in enumerate(flat)], dtype=torch.float64
    )


NOTHING = [[0.0] * 5, [0.0] * 5]
FOUR = "in the first 4 steps"
CASES = {
    "cut off": (table(*NOTHING, cut_off=9), {"truncated": 9, "wrong": 1}, f"no completion earned anything {FOUR}: "
                "90 % were cut off by --max-new-tokens 16, 10 % were wrong; raise --max-new-tokens"),
    "cut off and graded": (table(*NOTHING, cut_off=9), {"truncated": 0, "no_box": 9, "wrong": 1},
                           "90 % were cut off by --max-new-tokens 16, 9 % had no answer"),
    "no box": (table(*NOTHING), {"no_box": 8, "wrong": 2}, "80 % had no answer .* whether --instruction"),
    "wrong": (table(*NOTHING), {"wrong": 5, "unparsed": 3, "too_long": 2}, "100 % were wrong; take easier problems"),
    "error": (table(*NOTHING), {"error": 7}, "70 % made a reward function raise, 30 % got nothing from --reward; the"),
    "lost": (table(*NOTHING), {"hard_timeout": 6, "died": 4}, "100 % got no grade in time; take a lighter --reward"),
    "a function's": (table(*NOTHING), {"truncated": 0}, "100 % got nothing from --reward; see in rollouts/"),
    "two verifiers": (table(*NOTHING), {"wrong": 12, "no_box": 8}, "60 % were wrong, 40 % had no answer"),
    "negative": (table([-1.0] * 5, [-1.0] * 5), {"wrong": 10}, "no completion earned anything"),
    "all right": (table([1.0] * 5, [1.0] * 5), {"right": 10}, f"every completion earned 1 {FOUR}; take harder"),
    "groups alike": (table([1.0] * 5, [0.0] * 5), {"right": 5, "wrong": 5},
                     f"{FOUR} all completions of a problem earned the same, 0 to 1; take problems that"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_nothing_can_be_learnt_from_is_said_once_after_four_steps(name):
    rewards, statuses, said = CASES[name]
    watch = Signal(limit=16)
    assert [watch.observe(rewards, statuses) for _ in range(3)] == [[]] * 3
    (line,) = watch.observe(rewards, statuses)
    assert line.startswith("warning: nothing can be learnt: ") and "\n" not in line

    assert re.search(said, line), line
    assert [watch.observe(rewards, statuses) for _ in range(5)] == [[]] * 5
    assert "in the first 9 steps" in watch.outcome()


@pytest.mark.parametrize("when", [0, 2, 3])
def test_one_group_with_two_rewards_is_enough(when):
    watch = Signal(limit=16)
    for step in range(8):
        groups = [[0.0] * 5, [0.0, 0.0, 1.0] if step == when else [0.0] * 3]
        assert watch.observe(table(*groups), {"wrong": 8}) == []
    assert watch.outcome() == ""


def test_an_objective_that_compares_no_completions_of_a_group_learns_from_different_groups():
    for groups in ([[1.0], [0.0]], [[1.0, 1.0], [0.0, 0.0]]):
        watch = Signal(limit=16, compares=False)
        assert [watch.observe(table(*groups), {}) for _ in range(5)] == [[]] * 5 and watch.outcome() == ""
    watch = Signal(limit=16, compares=False)
    said = [watch.observe(table([float(step == 3)]), {}) for step in range(6)]  # one problem a step
    assert said == [[]] * 6 and watch.outcome() == ""
    watch = Signal(limit=16, compares=False)
    assert any(watch.observe(table([0.0], [0.0]), {"wrong": 2}) for _ in range(4))


def test_a_step_of_broken_rewards_says_nothing():
    watch = Signal(limit=16)
    for _ in range(9):
        assert watch.observe(table([float("nan"), 0.0]), {}) == []
    assert watch.outcome() == "" and watch.observe(torch.zeros(0, 4), {}) == []


@pytest.mark.parametrize("cut", [1, 3, 4, 6])
def test_a_restart_forgets_nothing(cut):
    rewards, statuses, _ = CASES["cut off"]
    straight, first, second = Signal(limit=16), Signal(limit=16), Signal(limit=16)
    expected = [straight.observe(rewards, statuses) for _ in range(8)]
    found = [first.observe(rewards, statuses) for _ in range(cut)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.observe(rewards, statuses) for _ in range(8 - cut)]
    assert found == expected and second.outcome() == straight.outcome()


def test_causes_are_all_completions_by_hand():
    found = causes({"wrong": 6, "no_box": 2}, 10, 6)
    assert found == {"truncated": 6, "no answer": 1, "wrong": 3, "error": 0, "lost": 0, "other": 0, "all": 10}
    assert causes({}, 10, 10)["truncated"] == 10 and causes({}, 10, 10)["other"] == 0


SMALL = "--problems-per-step 2 --group-size 2 --eval-limit 2 --eval-k 1 --threads 1 --max-new-tokens 1".split()


def test_a_run_that_learns_nothing_is_not_just_done(tmp_path):
    """Also one of fewer steps than the warning waits for; evaluations count as nothing."""
    for steps, warned in ((4, 1), (2, 0)):
        said = run(tmp_path, *SMALL, "--steps", steps, "--eval-every", 1, "--out", f"run{steps}")
        line = "nothing can be learnt: no completion earned anything in the first"
        cause = "100 % were cut off by --max-new-tokens 1; raise --max-new-tokens"
        assert said.count(f"warning: {line} 4 steps: {cause}") == warned
        status = json.loads((tmp_path / f"run{steps}/status.json").read_text())
        assert (status["reason"], status["exit_code"]) == ("done", 0)
        assert status["message"].startswith(f"{line} {steps} steps: {cause}")
        assert status["message"] in said.splitlines()[-1]
        assert all(row["grad_norm"] == 0 for row in rows(tmp_path / f"run{steps}") if "reward" in row)


def test_a_run_that_learns_says_nothing(tmp_path):
    said = run(tmp_path, *SMALL[:-1], 10, "--problems-per-step", 8, "--group-size", 8, "--steps", 4)
    status = json.loads((tmp_path / "runs/default/status.json").read_text())
    assert "nothing can be learnt" not in said and status["message"] == "" and status["reason"] == "done"


def test_the_trainer_keeps_it(tmp_path):
    first = make_trainer(tmp_path / "first", *SMALL)
    first.step()
    assert first.signal.steps == 1 and first.signal.limit == 1 and first.signal.compares
    second = make_trainer(
        tmp_path / "second", *SMALL, "--objective", "apo", "--num-profile-completions", 1, "--limit", 9
    )
    assert not second.signal.compares
    third = make_trainer(tmp_path / "third", *SMALL)
    third.load_state_dict(json.loads(json.dumps(first.state_dict())), dict(first.learner.state_tensors()))
    assert third.signal == first.signal


@pytest.mark.parametrize("allocation, said", [("sgpo", "nothing is left to"), ("apo_filter", "none of 6 problems")])
def test_a_filter_that_leaves_nothing_says_why(allocation, said, tmp_path):
    flags = (*SMALL[:2], *SMALL[4:], "--limit", 6, "--allocation", allocation, "--num-profile-completions", 2)
    with pytest.raises(ValueError, match=rf"{said}.*; 100 % of the profile's completions reached --max-new-tokens 1"):
        make_trainer(tmp_path / "run", *flags)
