"""What a completion earns that was cut off: never more than one that came to an end and was wrong."""

import json

import pytest
import torch

from fastrl.base.types import Completion, Problem, RolloutGroup
from fastrl.engine.base import Sampling
from fastrl.models.loading import load_tokenizer
from fastrl.objectives.grpo import GRPO
from fastrl.rewards import RewardSet
from fastrl.step.rollout import Rollout
from support.programs import together
from support.trainers import make_trainer

# completions say what they earn: "1", "-1", "none", or "raise"
REWARDS = """
def first(completions, **columns):
    return [None if text == "none" else float(text.split("|")[0]) for text in completions]

def second(completions, **columns):
    return [float(text.split("|")[-1]) for text in completions]
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "f.py").write_text(REWARDS)
    return tmp_path / "f.py"


def rollout(*specs, **options) -> Rollout:
    sampling = Sampling(temperature=1.0, max_new_tokens=8)
    rewards, tokenizer = RewardSet(list(specs)), load_tokenizer("embedded")
    return Rollout(engine=None, rewards=rewards, tokenizer=tokenizer, sampling=sampling, seed=0, **options)


def group(*texts: str) -> RolloutGroup:
    """What begins with "..." was cut off."""
    completions = [
        Completion(token_ids=[1], rollout_logprobs=[0.0], finish_reason="length" if t[:3] == "..." else "stop", text=t)
        for t in texts
    ]
    return RolloutGroup(problem=Problem(id="p", prompt="", answer="1"), completions=completions, policy_version=0)


def earned(groups, specs, lowest=0.0, **options):
    low = rollout(*specs, **options).score(groups, lowest)
    return [[c.reward for c in g.completions] for g in groups], low


def test_it_earns_the_smaller_of_0_and_the_lowest_of_its_group(file):
    groups = [
        group("1", "-1", "...", "-1"),  # the published case: 0 was above both wrong ones
        group("1", "...", "1"),
        group("1", "0", "..."),
        group("-0.25", "none", "...", "..."),
        group("-3", "1"),
        group("...", "..."),  # nothing of it was graded: the lowest of all
    ]
    found, low = earned(groups, [f"{file}:first"])
    assert found == [[1, -1, -1, -1], [1, 0, 1], [1, 0, 0], [-0.25, 0, -0.25, -0.25], [-3, 1], [-3, -3]] and low == -3
    assert GRPO().credit(torch.tensor(found[0])).tolist()[2] == GRPO().credit(torch.tensor(found[0])).tolist()[1] < 0


def test_totals_are_compared_as_they_are_weighted(file):
    found, _ = earned([group("1|0", "0|2", "...")], [f"{file}:first", f"{file}:second:-0.5"])
    assert found == [[1, -1, -1]]
    found, _ = earned([group("1|0", "0|2", "...")], [f"{file}:first:-1"])
    assert found == [[-1, 0, -1]]


def test_rewards_that_are_never_negative_leave_it_at_0_to_the_bit():
    found, low = earned([group("1", "2", "..."), group("...", "..."), group("1", "1", "...")], ["exact"])
    assert [[x.hex() for x in row] for row in found] == [[float(x).hex() for x in row] for row in
                                                         ([1, 0, 0], [0, 0], [1, 1, 0])]  # fmt: skip
    assert low.hex() == (0.0).hex()


def test_where_it_is_graded_it_earns_what_it_is_graded(file):
    texts = [group("1", "-1", "2")]
    texts[0].completions[2].finish_reason = "length"
    assert earned(texts, [f"{file}:first"], grade_truncated=True)[0] == [[1, -1, 2]]


def test_the_lowest_of_earlier_steps_counts_where_nothing_was_graded(file):
    assert earned([group("...", "...")], [f"{file}:first"], lowest=-2.0) == ([[-2, -2]], -2)
    # but not in a group that has a lowest of its own, nor is it forgotten
    assert earned([group("...", "-1"), group("...")], [f"{file}:first"], lowest=-2.0) == ([[-1, -1], [-2]], -2)


def test_a_reward_that_is_no_number_is_no_lowest(file, planned):
    planned("nan@reward,-inf@reward:2")
    found, low = earned([group("-9", "-1", "...")], [f"{file}:first"])
    assert found[0][1:] == [-1, -1] and low == -1
    assert earned([group("-9", "-1", "...")], [f"{file}:first"])[1] == -1


RUN = ("--problems-per-step", 4, "--group-size", 4, "--max-new-tokens", 6, "--eval-limit", 2, "--eval-k", 2)
NEGATIVE = """
def sign(completions, **columns):
    return [1.0 if sum(map(ord, text)) % 2 else -1.0 for text in completions]
"""


@pytest.fixture
def negative(tmp_path):
    (tmp_path / "sign.py").write_text(NEGATIVE)
    return f"{tmp_path / 'sign.py'}:sign"


@pytest.mark.parametrize("objective", [("grpo",), ("rebel",), ("ppo", "--group-size", 1), ("apo", "--group-size", 1)])
def test_no_objective_gives_it_more_credit_than_a_wrong_one(objective, negative, tmp_path):
    flags = ("--reward", negative, "--objective", *objective, "--num-profile-completions", 2, "--limit", 40)
    trainer = make_trainer(tmp_path / "run", *RUN, *flags)
    for step in range(1):
        groups = trainer.rollout.run(trainer.allocator.take(48), step)
        found = [(c.finish_reason, c.reward) for g in groups for c in g.completions]
        assert ("stop", -1.0) in found and ("length", -1.0) in found and ("length", 0.0) not in found
        for g in groups:
            credit = trainer.learner.objective.credit(g.rewards, g.problem).tolist()
            cut = [x for x, c in zip(credit, g.completions, strict=True) if c.finish_reason == "length"]
            wrong = [
                x for x, c in zip(credit, g.completions, strict=True) if c.reward < 0 and c.finish_reason == "stop"
            ]
            assert not cut or not wrong or max(cut) <= min(wrong)


def test_evaluations_and_profiles_call_it_wrong(negative, tmp_path):
    """And the profile's rewards, of which A*-PO makes its optimal values, are those of the run."""
    flags = ("--reward", negative, "--objective", "apo", "--group-size", 1, "--num-profile-completions", 4)
    trainer = make_trainer(tmp_path / "run", *RUN, *flags, "--limit", 40, "--max-new-tokens", 5)
    profile = trainer.profiler.profile
    assert {-1.0, 1.0} == {r for row in profile.rows for r in row["rewards"]}
    assert {0.0, 1.0} == {r for row in profile.rows for r in row["right"]}
    before = trainer.rollout.lowest
    groups, table = trainer.rollout.evaluate(trainer.allocator.problems[:20], 2, trainer.rollout.sampling)
    cut = [c for g in groups for c in g.completions if c.finish_reason == "length"]
    assert cut and {c.reward for c in cut} == {-1.0} and before == trainer.rollout.lowest == 0.0
    assert table[:, 1].sum() == sum(c.reward == 1.0 for g in groups for c in g.completions)


def test_the_lowest_survives_a_restart(negative, tmp_path):
    first = make_trainer(tmp_path / "first", *RUN, "--reward", negative)
    first.step()
    assert first.rollout.lowest == -1.0
    state = json.loads(json.dumps(first.state_dict()))
    second = make_trainer(tmp_path / "second", *RUN, "--reward", negative)
    second.load_state_dict(state, dict(first.learner.state_tensors()))
    assert second.rollout.lowest == -1.0


def test_the_lowest_is_that_of_all_ranks(file, tmp_path):
    script = f"""
from fastrl.base import ranks
from fastrl.base.types import Completion, Problem, RolloutGroup
from fastrl.engine.base import Sampling
from fastrl.models.loading import load_tokenizer
from fastrl.rewards import RewardSet
from fastrl.step.rollout import Rollout

ranks.start("cpu", 60)
text, finish = [("-2", "stop"), ("", "length")][ranks.rank()]
completion = Completion(token_ids=[1], rollout_logprobs=[0.0], finish_reason=finish, text=text)
group = RolloutGroup(problem=Problem(id="p", prompt="", answer="1"), completions=[completion], policy_version=0)
rewards = RewardSet([{str(file) + ":first"!r}])
rollout = Rollout(engine=None, rewards=rewards, tokenizer=load_tokenizer("embedded"), seed=0,
                  sampling=Sampling(temperature=1.0, max_new_tokens=8))
assert rollout.score([group]) == -2 and completion.reward == -2
print("agreed")
ranks.barrier()
ranks.stop()
ranks.leave(0)
"""
    assert together(tmp_path, script).count("agreed") == 2
