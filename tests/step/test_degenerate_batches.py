"""Batches at the edge: no tokens, end-of-text alone, all cut off, one token, the longest; and a rank without any.

The loss and gradient of the program against plain float64 arithmetic, a completion and a token at a time.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st

from fastrl.base.types import Completion, Problem, RolloutGroup
from fastrl.objectives.grpo import GRPO
from fastrl.step.batching import make_batch
from fastrl.step.learner import Minibatch
from support.cases import examples
from support.programs import together
from support.short_trainings import one_group_steps
from support.trainers import make_trainer

EOS, LONGEST = 0, 10
FORMS = st.sampled_from(["empty", "end", "one", "cut", "longest", "usual"])
ROWS = st.lists(
    st.lists(st.tuples(FORMS, st.sampled_from([0.0, 1.0, 0.25])), min_size=2, max_size=3), min_size=1, max_size=3
)
SETTINGS = st.fixed_dictionaries(
    {
        "loss_agg": st.sampled_from(["token", "seq", "const"]),
        "adv_norm": st.sampled_from(["group", "none"]),
        "drop_zero_std": st.booleans(),
        "overlong": st.sampled_from(["keep", "mask"]),
        "entropy": st.sampled_from([0.0, 0.01]),
    }
)


def completion(form: str, reward: float, salt: int) -> Completion:
    words = [1 + (salt * 7 + i * 3) % 13 for i in range(LONGEST)]
    ids = {
        "empty": [],
        "end": [EOS],
        "one": words[:1],
        "cut": words,
        "longest": [*words[:-1], EOS],
        "usual": [*words[:3], EOS],
    }[form]
    reason = "length" if form in ("cut", "one", "empty") else "stop"
    return Completion(token_ids=ids, rollout_logprobs=[-1.0] * len(ids), finish_reason=reason, reward=reward)


def groups_of(rows: list) -> list[RolloutGroup]:
    salt = iter(range(99))
    return [
        RolloutGroup(
            problem=Problem(id=str(g), prompt="", answer="", prompt_ids=[2 + g, 3, 5][: 1 + g]),
            policy_version=0,
            completions=[completion(form, reward, next(salt)) for form, reward in members],
        )
        for g, members in enumerate(rows)
    ]


def plainly(trainer, objective: GRPO, groups: list[RolloutGroup]) -> torch.Tensor:
    """Equation by equation: advantages of a group, sums over the tokens that count, one division."""
    num_tokens = len(trainer.learner.policy.tokenizer)
    total, tokens, completions = torch.zeros((), dtype=torch.float64), 0, 0
    for group in groups:
        rewards = [c.reward for c in group.completions]
        mean = sum(rewards) / len(rewards)
        std = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
        equal = max(rewards) == min(rewards)
        for one in group.completions:
            ids, prompt = one.token_ids, group.problem.prompt_ids
            if not ids or (objective.drop_zero_std and equal):
                continue
            if objective.overlong == "mask" and one.finish_reason == "length":
                continue
            advantage = 0.0 if equal else (one.reward - mean) / (std + 1e-6 if objective.adv_norm == "group" else 1.0)
            logits = trainer.learner.policy.model(torch.tensor([prompt + ids]), use_cache=False).logits[
                0, :, :num_tokens
            ]
            row = torch.zeros((), dtype=torch.float64)
            for t, token in enumerate(ids):
                logp = logits[len(prompt) + t - 1].double().log_softmax(dim=-1)
                ratio = (logp[token] - logp[token].detach()).exp()
                row = row - advantage * ratio + objective.entropy * (logp.exp() * logp).sum()
            tokens, completions = tokens + len(ids), completions + 1
            scale = {"token": 1.0, "seq": 1 / len(ids), "const": 1 / LONGEST}[objective.loss_agg]
            total = total + scale * row
    return total / max(1, tokens if objective.loss_agg == "token" else completions)


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(20, marks=pytest.mark.promise("B7", trials=20)),
        pytest.param(500, marks=[pytest.mark.soak, pytest.mark.slow, pytest.mark.promise("B7", trials=500)]),
    ],
)
def test_loss_and_gradient_are_those_of_plain_arithmetic(count, tmp_path, float64_norms):
    trainer = make_trainer(tmp_path, "--dtype", "float64", "--problems-per-step", 2, "--eval-limit", 2)
    named = dict(trainer.learner.policy.model.named_parameters())

    def check(rows, setting):
        trainer.learner.objective = GRPO(**setting)
        groups = groups_of(rows)
        batch = make_batch(groups, trainer.learner.objective.credit, pad_id=EOS, max_new_tokens=LONGEST)
        batch = replace(batch, credit=torch.cat([trainer.learner.objective.credit(g.rewards.double()) for g in groups]))
        batch = trainer.learner.objective.prepare(batch)
        metrics = trainer.learner.accumulate(Minibatch(batch))
        expected = plainly(trainer, trainer.learner.objective, groups)
        assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-6)
        if not expected.requires_grad:
            assert not trainer.learner.policy.flat.grads.any()
            return
        wanted = torch.autograd.grad(expected, list(named.values()), allow_unused=True)
        for (name, parameter), grad in zip(named.items(), wanted, strict=True):
            error = parameter.grad - (0 if grad is None else grad)
            assert error.abs().max() <= 1e-6, name

    examples(check, count, rows=ROWS, setting=SETTINGS)


RANKS = """
import torch
from pathlib import Path
from support.short_trainings import one_group_steps
from fastrl.base import ranks
ranks.start("cpu")
found = one_group_steps(Path({folder!r}) / str(ranks.rank()), *{flags!r})
torch.save(found, Path({folder!r}) / f"{{ranks.rank()}}.pt")
ranks.barrier()
ranks.stop()
ranks.leave(0)
"""


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.promise("B7", trials=2)
@pytest.mark.parametrize("flags", [[], ["--objective", "ppo", "--kl", 0.01]], ids=["grpo", "ppo"])
def test_a_rank_without_a_sample_takes_the_same_steps(flags, tmp_path):
    together(tmp_path, RANKS.format(folder=str(tmp_path), flags=[*map(str, flags)]))
    alone, history = one_group_steps(tmp_path / "alone", *flags)
    assert any(norm > 0 for _, norm, *_ in history)
    for rank in range(2):
        weights, seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert (weights[: len(alone)] - alone).abs().max() < 1e-9
        for one, other in zip(seen, history, strict=True):
            assert one == pytest.approx(other, abs=1e-9)
