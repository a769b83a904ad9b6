"""GRPO before the first gradient: shaped rewards, dropped groups, cut-off completions, needs, refused settings."""

import math
import re
from dataclasses import replace

import pytest
import torch

from fastrl.base.types import TrainBatch
from fastrl.objectives import OBJECTIVES
from fastrl.objectives.grpo import GRPO
from fastrl.step.batching import denominator


def make(lengths, reward, group, *, truncated=None, max_new_tokens=8, **logprobs):
    """Rows of one prompt token and `lengths` response tokens, credit as make_batch fills it; padding is NaN."""
    B, S = len(lengths), 1 + max(lengths)
    column, end = torch.arange(S), 1 + torch.tensor(lengths)[:, None]
    rewards, group = torch.tensor(reward), torch.tensor(group)
    mask = (column >= 1) & (column < end)

    def spread(rows):
        flat = torch.tensor([value for row in rows for value in row])
        return torch.full((B, S), math.nan).masked_scatter(mask, flat)

    return TrainBatch(
        input_ids=torch.zeros(B, S, dtype=torch.int64),
        attention_mask=column < end,
        response_mask=mask,
        rollout_logprobs=torch.zeros(B, S),
        group=group,
        reward=rewards,
        credit=torch.cat([GRPO().credit(rewards[group == g]) for g in group.unique()]),
        truncated=torch.tensor(truncated or [False] * B),
        prompt_lengths=torch.ones(B, dtype=torch.int64),
        group_size=(group[:, None] == group).sum(dim=1),
        max_new_tokens=max_new_tokens,
        **{name: spread(rows) for name, rows in logprobs.items()},
    )


def test_kl_in_the_reward():
    # x = old - ref; sums per completion: k1 0.5 - 0.1 = 0.4 and 1.0; k2 0.125 + 0.005 = 0.13 and 0.5
    rows = dict(old_logprobs=[[-1.0, -2.0], [-1.0]], ref_logprobs=[[-1.5, -1.9], [-2.0]])
    for kind, sums in (("k1", (0.4, 1.0)), ("k2", (0.13, 0.5))):
        batch = make([2, 1], [1.0, 0.0], [0, 0], **rows)
        objective = GRPO(kl=0.5, kl_type=kind, kl_in="reward", adv_norm="none")
        batch = objective.prepare(batch)
        shaped = 1.0 - 0.5 * sums[0], 0.0 - 0.5 * sums[1]
        half = (shaped[0] - shaped[1]) / 2
        assert batch.credit.tolist() == pytest.approx([half, -half], rel=1e-5)
        assert batch.reward.tolist() == [1.0, 0.0]  # what is logged stays
        logprobs = torch.where(batch.response_mask, batch.old_logprobs, 0.0)
        loss, metrics = objective.loss_sum(logprobs, torch.zeros_like(logprobs), batch)
        assert loss.item() == pytest.approx(-2 * half + half, rel=1e-5)  # not in the loss as well
        assert metrics["kl"].item() == pytest.approx(sum(sums), rel=1e-5)


def test_kl_in_the_reward_of_equal_rewards_is_a_signal():
    batch = make([1, 1], [1.0, 1.0], [0, 0], old_logprobs=[[-1.0], [-1.0]], ref_logprobs=[[-1.0], [-3.0]])
    batch = GRPO(kl=0.1, kl_type="k1", kl_in="reward").prepare(batch)
    assert batch.credit.tolist() == pytest.approx([0.70711, -0.70711], rel=1e-4)


def test_soft_overlong_penalty():
    # DAPO: limit 10, buffer 4: nothing up to 6, then (length - 6) / 4, and 1 for a completion that was cut off
    lengths, cut_off = [3, 6, 7, 9, 10, 5], [False] * 5 + [True]
    penalties = torch.tensor([0, 0, 0.25, 0.75, 1.0, 1.0])
    batch = make(lengths, [1.0, 0, 1, 1, 1, 0], [0] * 6, truncated=cut_off, max_new_tokens=10)
    objective = GRPO(overlong="penalty", overlong_buffer=4, adv_norm="none")
    torch.testing.assert_close(objective.reward_penalty(batch), penalties)
    batch = objective.prepare(batch)
    shaped = [1.0, 0.0, 0.75, 0.25, 0.0, -1.0]  # mean 1/6
    assert batch.credit.tolist() == pytest.approx([s - 1 / 6 for s in shaped], abs=1e-6)
    assert batch.response_mask.sum(dim=1).tolist() == lengths
    # without a buffer it is a fifth of the limit: 4 of 20 tokens
    fifth = make([16, 17, 19, 20], [1.0, 0.0, 0.0, 0.0], [0] * 4, max_new_tokens=20)
    assert GRPO(overlong="penalty").reward_penalty(fifth).tolist() == [0.0, 0.25, 0.75, 1.0]
    short = make([1, 2], [1.0, 0.0], [0, 0], max_new_tokens=3)  # a fifth of 3 is 0, the buffer at least 1
    assert GRPO(overlong="penalty").reward_penalty(short).tolist() == [0.0, 0.0]
    assert GRPO(kl=0.1).reward_penalty(batch) is None


def test_both_penalties_add_up():
    rows = dict(old_logprobs=[[-1.0] * 5, [-1.0]], ref_logprobs=[[-1.2] * 5, [-1.1]])
    batch = make([5, 1], [1.0, 0.0], [0, 0], max_new_tokens=6, **rows)
    objective = GRPO(kl=0.5, kl_type="k1", kl_in="reward", overlong="penalty", overlong_buffer=2)
    assert objective.reward_penalty(batch).tolist() == pytest.approx([0.5 * 1.0 + 0.5, 0.5 * 0.1], rel=1e-5)


def test_shaped_rewards_are_compared_within_their_group():
    batch = make([8, 2, 8, 2], [1.0, 0.0, 1.0, 1.0], [0, 0, 1, 1], truncated=[True, False, True, False])
    batch = GRPO(overlong="penalty", adv_norm="none").prepare(batch)
    assert batch.credit.tolist() == [0.0, 0.0, -0.5, 0.5]


def test_shaped_rewards_are_divided_by_their_own_std():
    # every reward is 1, so the std of the unshaped rewards is 0 and the advantages were 5e5
    batch = make([8, 2, 2, 2], [1.0] * 4, [0, 0, 1, 1], truncated=[True, False, False, False])
    batch = GRPO(overlong="penalty", adv_norm="batch").prepare(batch)
    # shaped 0, 1, 1, 1: unbiased std 1/2; centred in the group -1/2, 1/2
    assert batch.credit.tolist() == pytest.approx([-1.0, 1.0, 0.0, 0.0], rel=1e-4)


def test_groups_without_a_signal_leave_the_denominator():
    # 0.5 has no advantage, but its group has
    rewards, group = [1.0, 0.5, 0.0, 1.0, 1.0, 0.0, 0.0], [0, 0, 0, 1, 1, 2, 2]
    for drop, tokens, completions in ((False, 16, 7), (True, 9, 3)):
        batch = make([2, 3, 4, 1, 1, 4, 1], rewards, group)
        batch = GRPO(drop_zero_std=drop).prepare(batch)
        assert denominator(batch, "token") == tokens
        assert denominator(batch, "completion") == completions
        assert batch.response_mask[:3].sum().item() == 9 and batch.credit[1] == 0
        assert batch.attention_mask.sum(dim=1).tolist() == [3, 4, 5, 2, 2, 5, 2]


def test_cut_off_completions():
    for overlong, tokens in (("keep", [2, 3, 4]), ("mask", [2, 0, 4])):
        batch = make([2, 3, 4], [1.0, 0.0, 0.0], [0, 0, 0], truncated=[False, True, False])
        credit = batch.credit.clone()
        batch = GRPO(overlong=overlong).prepare(batch)
        assert batch.response_mask.sum(dim=1).tolist() == tokens
        assert torch.equal(batch.credit, credit) and batch.credit[0] > 0.5  # masked ones still count in the mean


def test_entropy_bonus_is_rewarded():
    batch = make([2], [1.0], [0])
    batch = replace(batch, credit=torch.tensor([0.5]))
    logprobs = torch.full((1, 3), -1.0, requires_grad=True)
    entropy = torch.tensor([[9.0, 0.7, 0.3]], requires_grad=True)
    loss, metrics = GRPO(entropy=0.2, loss_agg="seq").loss_sum(logprobs, entropy, batch)
    assert loss.item() == pytest.approx((-0.5 * 2 - 0.2 * (0.7 + 0.3)) / 2)
    loss.backward()
    assert entropy.grad[0].tolist() == pytest.approx([0.0, -0.1, -0.1])  # descent raises the entropy
    assert metrics["entropy"].item() == pytest.approx(1.0)


def test_needs():
    old, ref = "old_logprobs", "ref_logprobs"
    for objective, once, more in (
        (GRPO(), set(), {old}),
        (GRPO(kl=0.1), {ref}, {old, ref}),
        (GRPO(kl=0.1, kl_in="reward"), {old, ref}, {old, ref}),
        (GRPO(kl=0.0, kl_in="reward"), set(), {old}),
    ):
        assert objective.needs(1) == once
        assert objective.needs(2) == objective.needs(16) == more


def test_registry_and_contract():
    assert OBJECTIVES["grpo"] is GRPO
    assert GRPO().min_group_size == 2 and GRPO().splits_groups


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"clip_low": 0.0}, "--objective.clip-low must be above 0, got 0.0"),
        ({"clip_high": -0.1}, "--objective.clip-high must be above 0, got -0.1"),
        ({"clip_high": math.nan}, "--objective.clip-high must be above 0 and at most 1e6, got nan"),
        ({"std_eps": 0}, "--objective.std-eps must be above 0, got 0"),
        ({"log_ratio_cap": -20.0}, "--objective.log-ratio-cap must be above 0, got -20.0"),
        ({"kl": -0.1}, "--objective.kl must be at least 0, got -0.1"),
        ({"entropy": -1e-9}, "--objective.entropy must be at least 0, got -1e-09"),
        ({"entropy": math.nan}, "--objective.entropy must be at least 0 and at most 1e6, got nan"),
        ({"overlong_buffer": -1}, "--objective.overlong-buffer must be at least 0, got -1"),
        ({"dual_clip": 1.0}, "--objective.dual-clip must be above 1, got 1.0"),
        ({"dual_clip": math.nan}, "--objective.dual-clip must be above 1 and at most 1e6, got nan"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GRPO(**settings)
