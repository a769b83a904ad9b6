"""Batches for tests: rows by hand, groups of completions, and what a trainer has sampled and prepared."""

import math
from dataclasses import replace

import torch

from fastrl.base.types import Completion, Problem, RolloutGroup, TrainBatch
from fastrl.step.batching import make_batch, select

PROMPT = 1  # tokens of prompt in every row


def make(lengths, credit=None, *, reward=None, group=None, max_new_tokens=8, truncated=None, **logprobs):
    """Rows of one prompt token and `lengths` response tokens; padding of every log-probability is NaN."""
    B, S = len(lengths), PROMPT + max(lengths)
    column, length = torch.arange(S), torch.tensor(lengths)[:, None]
    mask = (column >= PROMPT) & (column < PROMPT + length)
    zeros = [0.0] * B

    def spread(rows):
        out = torch.full((B, S), math.nan)
        for b, row in enumerate(rows):
            out[b, PROMPT : PROMPT + len(row)] = torch.tensor(row)
        return out

    return TrainBatch(
        input_ids=torch.zeros(B, S, dtype=torch.int64),
        attention_mask=column < PROMPT + length,
        response_mask=mask,
        rollout_logprobs=torch.zeros(B, S),
        group=torch.tensor(group or [0] * B),
        reward=torch.tensor(reward or zeros),
        credit=torch.tensor(credit or zeros),
        truncated=torch.tensor(truncated or [False] * B),
        prompt_lengths=torch.full((B,), PROMPT),
        group_size=torch.tensor([(group or [0] * B).count(g) for g in group or [0] * B]),
        max_new_tokens=max_new_tokens,
        **{name: spread(rows) for name, rows in logprobs.items()},
    )


def loss_and_grad(objective, batch, log_ratio=None, entropy=0.0):
    """Loss, gradient to logprobs and metrics where logprobs = old + log_ratio (old is filled with -1 if absent)."""
    if log_ratio is not None:
        batch = replace(batch, old_logprobs=torch.where(batch.response_mask, -1.0, math.nan))
        logprobs = batch.old_logprobs + torch.nan_to_num(torch.tensor(log_ratio))
    else:
        logprobs = torch.where(batch.response_mask, -1.0, math.nan)
    logprobs = logprobs.clone().requires_grad_()
    loss, metrics = objective.loss_sum(logprobs, torch.full_like(logprobs, entropy), batch)
    loss.backward()
    return loss.item(), logprobs.grad, {name: value.item() for name, value in metrics.items()}


def completion(ids, reward=0.0, finish="stop"):
    return Completion(token_ids=ids, rollout_logprobs=[-i / 8 for i in ids], finish_reason=finish, reward=reward)


def group(prompt_ids, *completions):
    problem = Problem(id=f"p{prompt_ids[0]}", prompt="", answer="", prompt_ids=prompt_ids)
    return RolloutGroup(problem=problem, completions=list(completions), policy_version=0)


def numbered(lengths, groups):
    """A batch whose row b has lengths[b] tokens b+1, the first of them the prompt; padding is 0 and NaN."""
    B, S = len(lengths), max(lengths, default=1)
    column, end = torch.arange(S), torch.tensor(lengths, dtype=torch.int64)[:, None]
    row = torch.arange(B)[:, None]
    real = column < end
    return TrainBatch(
        input_ids=torch.where(real, row + 1, 0),
        attention_mask=real,
        response_mask=real & (column > 0),
        rollout_logprobs=torch.where(real, -(row + 1.0), torch.nan),
        group=torch.tensor(groups, dtype=torch.int64),
        reward=torch.arange(B) / 8,
        credit=torch.arange(B) / 4,
        truncated=torch.arange(B) % 3 == 1,
        prompt_lengths=torch.ones(B, dtype=torch.int64),
        group_size=torch.tensor([groups.count(g) for g in groups], dtype=torch.int64),
        max_new_tokens=50,
        ref_logprobs=torch.where(real, -(row + 2.0), torch.nan),
    )


def prepared_batch(trainer, *, noise: float = 0.05):
    """A sampled batch whose old and reference log-probabilities differ from the policy's, and whose old values from
    those of the critic, which gets a random head, so that every term counts."""
    if trainer.learner.critic:
        with torch.no_grad():
            trainer.learner.critic.model.value_head.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    plan = trainer.allocator.take(trainer.completions_per_step)
    groups = trainer.rollout.run(plan, step=0)
    batch = make_batch(
        groups, trainer.learner.objective.credit, pad_id=trainer.learner.policy.pad_id, max_new_tokens=10
    )
    batch = replace(batch, **{name: getattr(batch, name).double() for name in ("reward", "credit", "rollout_logprobs")})
    needs, generator = {"old_logprobs"} | trainer.learner.objective.needs(2), torch.Generator().manual_seed(1)
    scores = {}
    for name in sorted(needs, key=["old_logprobs", "ref_logprobs", "values"].index):
        values = trainer.learner.scored(name, batch)
        scores[name] = values + noise * torch.randn(values.shape, generator=generator, dtype=values.dtype)
    return trainer.learner.objective.prepare(replace(batch, **scores))


def padded(batch, extra: int):
    """The same rows with more padding; what padding holds is poison wherever the type can hold it."""
    out, wider = select(batch, torch.arange(len(batch))), {}
    names = ["input_ids", "attention_mask", "response_mask", "rollout_logprobs", "old_logprobs", "ref_logprobs"]
    for name in [*names, "values", "advantages", "returns"]:
        value = getattr(out, name)
        if value is None:
            continue
        fill = {torch.bool: False, torch.int64: 7}.get(value.dtype, float("nan"))
        wide = torch.cat([value, torch.full((len(value), extra), fill, dtype=value.dtype)], dim=1)
        if value.dtype.is_floating_point:
            wide[~torch.nn.functional.pad(batch.attention_mask, (0, extra))] = fill
        wider[name] = wide
    wider["input_ids"][~torch.nn.functional.pad(batch.attention_mask, (0, extra))] = 7
    return replace(out, **wider)
