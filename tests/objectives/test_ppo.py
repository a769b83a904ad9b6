"""PPO by hand: advantages from values, whitening, KL in the reward, the surrogate per token, the critic's loss."""

import math
from dataclasses import replace

import pytest
import torch

from fastrl.objectives.ppo import PPO
from support.batches import loss_and_grad, make


def prepared(objective, lengths, reward, **rows):
    """Response tokens of advantages and returns, one list per row, after `prepare`."""
    batch = make(lengths, reward, reward=reward, **rows)
    batch = objective.prepare(batch)
    for tensor in (batch.advantages, batch.returns):
        assert not tensor[~batch.response_mask].any()  # 0, not NaN
    return tuple(
        [row[mask].tolist() for row, mask in zip(tensor, batch.response_mask, strict=True)]
        for tensor in (batch.advantages, batch.returns)
    )


def test_advantages_of_three_tokens_by_hand():
    # delta: 0.9 * 0.25 - 0.5 = -0.275, 0.9 * 0.75 - 0.25 = 0.425, 1 - 0.75 = 0.25
    # A: 0.25, 0.425 + 0.72 * 0.25 = 0.605, -0.275 + 0.72 * 0.605 = 0.1606
    objective = PPO(gamma=0.9, lam=0.8, whiten=False)
    advantages, returns = prepared(objective, [3], [1.0], values=[[0.5, 0.25, 0.75]])
    assert advantages[0] == pytest.approx([0.1606, 0.605, 0.25])
    assert returns[0] == pytest.approx([0.6606, 0.855, 1.0])


def test_without_lambda_it_is_the_td_error():
    advantages, _ = prepared(PPO(gamma=0.9, lam=0.0, whiten=False), [3], [1.0], values=[[0.5, 0.25, 0.75]])
    assert advantages[0] == pytest.approx([-0.275, 0.425, 0.25])


def test_without_discount_it_is_reward_minus_value():
    lengths, reward = [5, 1, 3], [1.0, -0.5, 0.0]
    values = [torch.rand(n, generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    advantages, returns = prepared(PPO(whiten=False), lengths, reward, values=values)
    for row, r in enumerate(reward):
        assert advantages[row] == pytest.approx([r - v for v in values[row]], abs=1e-6)
        assert returns[row] == pytest.approx([r] * lengths[row], abs=1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_padding_and_prompt_may_hold_anything(poison):
    objective = PPO(gamma=0.9, lam=0.8, kl=0.1)
    rows = dict(
        values=[[0.5, 0.25, 0.75], [0.3]], old_logprobs=[[-1.0, -2, -3], [-1]], ref_logprobs=[[-2.0, -2, -2], [-2]]
    )
    batch = make([3, 1], [1.0, 0.0], **rows)
    for tensor in (batch.values, batch.old_logprobs, batch.ref_logprobs):
        tensor[~batch.response_mask] = poison
    batch = objective.prepare(batch)
    clean = make([3, 1], [1.0, 0.0], **rows)
    for tensor in (clean.values, clean.old_logprobs, clean.ref_logprobs):
        tensor[~clean.response_mask] = 0.0
    clean = objective.prepare(clean)
    assert torch.equal(batch.advantages, clean.advantages) and torch.equal(batch.returns, clean.returns)
    assert batch.advantages[batch.response_mask].all()

    batch.advantages[~batch.response_mask] = batch.returns[~batch.response_mask] = poison
    logprobs = torch.where(batch.response_mask, -1.5, poison).requires_grad_()
    values = torch.where(batch.response_mask, 0.4, poison).requires_grad_()
    loss, metrics = objective.loss_sum(logprobs, torch.full_like(logprobs, poison), batch)
    value_loss, _ = objective.value_loss_sum(values, batch)
    (loss + value_loss).backward()
    assert math.isfinite(loss.item()) and math.isfinite(value_loss.item()) and metrics["kl"].isfinite()
    for tensor in (logprobs, values):
        assert not tensor.grad[~batch.response_mask].any() and tensor.grad.isfinite().all()
    assert values.grad[batch.response_mask].all()


def test_whitening_by_hand():
    # values 0: A = 1, 1, 0; mean 2/3, unbiased variance (1/9 + 1/9 + 4/9) / 2 = 1/3; 1/3 over its root is 0.57735
    advantages, returns = prepared(PPO(), [2, 1], [1.0, 0.0], values=[[0.0, 0.0], [0.0]])
    assert advantages == [pytest.approx([0.57735, 0.57735], abs=1e-5), pytest.approx([-1.1547], abs=1e-4)]
    assert returns == [[1.0, 1.0], [0.0]]  # what the critic learns is not whitened


def test_equal_advantages_whiten_to_zero():
    assert prepared(PPO(), [2, 1], [1.0, 1.0], values=[[0.25, 0.25], [0.25]])[0] == [[0.0, 0.0], [0.0]]
    assert prepared(PPO(), [1], [1.0], values=[[0.25]])[0] == [[0.0]]  # one token has no variance


def test_kl_is_taken_off_the_reward_of_its_token():
    # x = 0.5 and -1: r = -0.1 * 0.5, 1 + 0.1; sums from behind: 1.1 and 1.05
    rows = dict(values=[[0.0, 0.0]], old_logprobs=[[-1.0, -2.0]], ref_logprobs=[[-1.5, -1.0]])
    advantages, returns = prepared(PPO(kl=0.1, whiten=False), [2], [1.0], **rows)
    assert advantages[0] == returns[0] == pytest.approx([1.05, 1.1])
    # the loss itself has no KL term: its gradient is that of the surrogate alone
    batch = make([2], [1.0], **rows)
    batch = PPO(kl=0.1, whiten=False).prepare(batch)
    loss, grad, metrics = loss_and_grad(PPO(kl=0.1), batch, [[0.0, 0.0, 0.0]])
    assert grad[0].tolist() == pytest.approx([0.0, -1.05, -1.1])
    assert metrics["kl"] == pytest.approx(0.5 + 0.0)  # the policy at -1, -1 now: x = 0.5 and 0


def test_each_token_has_its_own_advantage_and_clip():
    # A ratio: 2 * 1.1 = 2.2; 1 * 1.5 clipped to 1.2; -1 * 0.7 clipped to 0.8; -2 * 4 dual-clipped to 3
    batch = make([4])
    batch = replace(batch, advantages=torch.tensor([[math.nan, 2.0, 1.0, -1.0, -2.0]]))
    loss, grad, metrics = loss_and_grad(PPO(), batch, [[0.0, *map(math.log, (1.1, 1.5, 0.7, 4.0))]])
    assert loss == pytest.approx(-2.2 - 1.2 + 0.8 + 6.0, rel=1e-5)
    assert grad[0].tolist() == pytest.approx([0.0, -2.2, 0.0, 0.0, 0.0], rel=1e-5)
    assert (metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"]) == (1, 1)


def test_gradient_raises_good_tokens_and_lowers_bad_ones_of_one_completion():
    logits = torch.linspace(-1, 1, 5).repeat(1, 3, 1).requires_grad_()
    ids = torch.tensor([[0, 2, 4]])
    batch = make([2], [0.0], values=[[0.4, 0.8]])  # r - V = -0.4, -0.8: the second token was worse
    batch = PPO().prepare(batch)
    logprobs = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    PPO().loss_sum(logprobs, torch.zeros_like(logprobs), batch)[0].backward()
    with torch.no_grad():
        after = (logits - 0.1 * logits.grad).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    assert (after - logprobs)[0, 1] > 0 > (after - logprobs)[0, 2]


def test_entropy_is_rewarded():
    batch = make([2])
    batch = replace(batch, advantages=torch.zeros(1, 3))
    logprobs = torch.full((1, 3), -1.0)
    entropy = torch.full((1, 3), 0.5, requires_grad=True)
    loss, metrics = PPO(entropy=0.1).loss_sum(logprobs, entropy, batch)
    loss.backward()
    assert loss.item() == pytest.approx(-0.1) and metrics["entropy"] == 1.0
    assert entropy.grad.tolist() == [[0.0, pytest.approx(-0.1), pytest.approx(-0.1)]]


@pytest.mark.parametrize(
    "value, loss, grad, clipped",
    [
        (0.5, 0.125, -0.5, 0),  # within 0.5 of 0.2: (0.5 - 1)^2 / 2
        (1.0, 0.045, 0.0, 1),  # right, but it counts as 0.7: (0.7 - 1)^2 / 2, and nothing pulls
        (-0.6, 1.28, -1.6, 0),  # too far the wrong way: the plain loss is larger, and pulls back
        (2.0, 0.5, 1.0, 0),  # too far beyond: (2 - 1)^2 / 2 against 0.045
    ],
)
def test_a_value_gains_nothing_far_from_its_old_one(value, loss, grad, clipped):
    batch = make([1], values=[[0.2]])
    batch = replace(batch, returns=torch.tensor([[math.nan, 1.0]]))
    values = torch.tensor([[math.nan, value]], requires_grad=True)
    got, metrics = PPO().value_loss_sum(values, batch)
    got.backward()
    assert got.item() == pytest.approx(loss) and values.grad[0, 1].item() == pytest.approx(grad)
    assert metrics["clip_ratio"] == clipped
    free, metrics = PPO(value_clip=None).value_loss_sum(values, batch)
    assert free.item() == pytest.approx((value - 1) ** 2 / 2) and not metrics


def test_what_it_needs():
    assert PPO().needs(1) == {"values"}
    assert PPO().needs(2) == {"values", "old_logprobs"}
    assert PPO(kl=0.1).needs(1) == {"values", "old_logprobs", "ref_logprobs"}
    assert PPO().credit(torch.tensor([0.25, -1.0])).tolist() == [0.25, -1.0]


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"gamma": 1.1}, r"--objective.gamma must be at most 1, got 1.1"),
        ({"lam": -0.1}, r"--objective.lam must be at least 0, got -0.1"),
        ({"lam": math.nan}, r"--objective.lam must be at least 0 and at most 1, got nan"),
        ({"value_clip": 0.0}, r"--objective.value-clip must be above 0, got 0.0"),
        ({"clip_high": 0.0}, r"--objective.clip-high must be above 0, got 0.0"),
        ({"dual_clip": 1.0}, r"--objective.dual-clip must be above 1, got 1.0"),
        ({"kl": -0.1}, r"--objective.kl must be at least 0, got -0.1"),
    ],
)
def test_settings_that_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        PPO(**settings)
