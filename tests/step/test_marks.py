"""A row with bad numbers costs its step, whatever an objective makes of rewards and masks."""

import itertools
from dataclasses import replace

import pytest
import torch

from support.trainers import make_trainer

RUN = ("--problems-per-step", 2, "--group-size", 4, "--eval-limit", 1, "--eval-k", 1, "--max-new-tokens", 6)
OPTIONS = {
    "grpo": [
        {},
        *({"overlong": x} for x in ("mask", "penalty")),
        *({"adv_norm": x} for x in ("batch", "none")),
        {"overlong": "penalty", "adv_norm": "batch"},
        {"kl_in": "reward"},
        {"kl_in": "reward", "overlong": "penalty", "adv_norm": "none"},
        {"kl_in": "reward", "overlong": "penalty", "adv_norm": "batch", "drop_zero_std": True},
        {"drop_zero_std": True},
        {"dual_clip": None},
        {"surrogate": "cispo"},
        {"ratio_level": "sequence", "loss_agg": "seq"},
        {"loss_agg": "const"},
        *({"is_correction": x} for x in ("tis", "mis", "mask", "seq-mask")),
        {"is_correction": "mask", "overlong": "penalty"},
        {"entropy": 0.01, "overlong": "penalty"},
        *({"preset": x} for x in ("dapo", "dr-grpo", "gspo", "cispo")),
    ],
    "ppo": [{}, {"whiten": False}, {"lam": 0.5, "gamma": 0.9}, {"value_clip": None, "dual_clip": None}, {"kl": 0.0}],
    "rebel": [{}, {"paired": True}, {"kl": 0.0}, {"kl": 0.0, "paired": True}],
    "apo": [{}, {"value_mode": "zero"}, {"entropy": 0.0}, {"beta2": 1.0}],
}
KL = {"grpo": ["--kl", 0.01], "ppo": ["--kl", 0.01], "rebel": ["--kl", 0.01], "apo": ["--num-profile-completions", 2]}


@pytest.fixture(scope="module", params=OPTIONS)
def trainer(request, tmp_path_factory):
    flags = (*RUN, "--limit", 30, "--objective", request.param, *KL[request.param])
    one = make_trainer(tmp_path_factory.mktemp("run") / "run", *flags)
    one.objective_name, one.mismatch_watch.max_in_a_row = request.param, 1000
    yield one
    one.rollout.rewards.close()


def taken(trainer, poison) -> bool:
    """Whether a step whose completions `poison` has spoilt is taken; where it is not, nothing may have moved."""
    run, before = trainer.rollout.run, {n: t.clone() for n, t in trainer.learner.policy.state_tensors()}
    trainer.rollout.run = lambda plan, step: poison(run(plan, step))
    try:
        metrics = trainer.step()
    finally:
        trainer.rollout.run = run
    trainer.learner.policy.guard.in_a_row = 0
    after = dict(trainer.learner.policy.state_tensors())
    same = all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert same or not metrics["skipped"]
    return not (metrics["skipped"] and same)


def cut_off(groups):
    """A row that some options mask."""
    completion = groups[0].completions[0]
    completion.finish_reason, completion.rollout_logprobs[-1] = "length", float("nan")
    return groups


def first(groups):
    groups[0].completions[0].rollout_logprobs[0] = float("nan")
    return groups


def infinite(groups):
    groups[-1].completions[-1].rollout_logprobs[0] = float("-inf")
    return groups


def reward(groups):
    groups[0].completions[0].reward = float("nan")
    return groups


@pytest.mark.promise("B1", trials=4)
def test_no_option_loses_the_mark(trainer):
    """Each option with one of the poisons in turn; what may mask a row, with one in such a row too."""
    objective, others = trainer.learner.objective, itertools.cycle([first, infinite, reward])
    try:
        for options in OPTIONS[trainer.objective_name]:
            made = type(objective)(**options) if "preset" in options else replace(objective, **options)
            trainer.learner.objective = made
            for poison in (cut_off, next(others)) if "overlong" in options or not options else (next(others),):
                assert not taken(trainer, poison), (options, poison.__name__)
        assert taken(trainer, lambda groups: groups)  # it is the mark that costs the step
    finally:
        trainer.learner.objective = objective
