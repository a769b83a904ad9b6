"""A*-PO: the optimal value by table and limits, the regression's gradient, and where it leads."""

import math
from dataclasses import replace

import pytest
import torch

from fastrl.base.types import Problem
from fastrl.objectives.apo import APO, optimal_value
from support.batches import make

F64 = torch.float64


def solved(s, n=8, dtype=F64):
    return torch.tensor([1.0] * s + [0.0] * (n - s), dtype=dtype)


def test_table_of_optimal_values():
    # beta1 ln(1 + (s / 8) (e^2 - 1)) at beta1 = 0.5
    table = [0.0, 0.2935, 0.4772, 0.6113, 0.7169, 0.8040, 0.8782, 0.9428, 1.0]
    for s, value in enumerate(table):
        assert optimal_value(solved(s), 0.5).item() == pytest.approx(value, abs=5e-5)
        closed = 0.5 * math.log(1 + s / 8 * (math.exp(2) - 1))
        assert optimal_value(solved(s), 0.5).item() == pytest.approx(closed, abs=1e-14)


def test_limits_of_beta1():
    rewards = torch.tensor([0.0, 0, 0, 1, 0, 0, 1, 0], dtype=F64)
    assert optimal_value(rewards, 1e4).item() == pytest.approx(0.25, abs=1e-4)
    assert optimal_value(rewards, 1e-4).item() == pytest.approx(1.0, abs=2e-4)
    # short of the maximum by beta1 ln(N / s), at most beta1 ln N
    assert 1 - optimal_value(rewards, 1e-2).item() == pytest.approx(1e-2 * math.log(4), abs=1e-12)
    assert optimal_value(rewards, 0.5, "mean") == 0.25 and optimal_value(rewards, 0.5, "max") == 1.0
    # exp(1 / beta1) is beyond float32 and float64
    assert optimal_value(solved(1, dtype=torch.float32), 1e-3).item() == pytest.approx(1 - 1e-3 * math.log(8), abs=1e-6)
    assert optimal_value(-solved(8), 1e-4).item() == -1.0


def profiled(rewards):
    return Problem(id="p", prompt="", answer="", profile_rewards=torch.tensor(rewards))


def test_credit_is_reward_minus_value():
    rewards = torch.tensor([1.0, 0.0])
    value = 0.5 * math.log(1 + (math.exp(2) - 1) / 2)
    assert APO().credit(rewards, profiled([0.0, 1.0])).tolist() == pytest.approx([1 - value, -value], abs=1e-6)
    assert APO(value_mode="mean").credit(rewards, profiled([0.0, 1.0, 0.0, 0.0])).tolist() == [0.75, -0.25]
    assert APO(value_mode="max").credit(rewards, profiled([0.0, 1.0])).tolist() == [0.0, -1.0]
    assert APO(value_mode="zero").credit(rewards, Problem(id="p", prompt="", answer="")).tolist() == [1.0, 0.0]
    assert APO().needs_profile and not APO(value_mode="zero").needs_profile
    assert APO().needs(1) == APO().needs(8) == {"ref_logprobs"}


def test_loss_and_gradient_by_hand():
    # u: (-1 + 1.5) + (-1 + 2) = 1.5 and (-1 + 0.5) = -0.5; residuals 2 * 1.5 - 0.5 = 2.5 and 2 * -0.5 + 0.25 = -0.75
    batch = make([2, 1, 1], [0.5, -0.25, 9.0], ref_logprobs=[[-1.5, -2.0], [-0.5], [-7.0]])
    batch.response_mask[2] = False  # a completion that is masked takes no part
    batch = replace(batch, counts={"token": 3.0, "completion": 2.0})
    logprobs = torch.where(batch.response_mask, -1.0, math.nan).requires_grad_()
    entropy = torch.where(batch.response_mask, 0.5, math.nan).requires_grad_()
    loss, metrics = APO(beta2=2.0, entropy=0.1).loss_sum(logprobs, entropy, batch)
    # 6.25 + 0.5625, and 0.1 times the mean entropy 0.5 times 2 completions
    assert loss.item() == pytest.approx(6.8125 - 0.1)
    loss.backward()
    # 2 beta2 residual on every token of the completion
    assert logprobs.grad.tolist() == [[0.0, 10.0, 10.0], [0.0, -3.0, 0.0], [0.0, 0.0, 0.0]]
    assert entropy.grad[0].tolist() == pytest.approx([0.0, -0.1 * 2 / 3, -0.1 * 2 / 3])
    assert entropy.grad[2].tolist() == [0.0, 0.0, 0.0]
    per_token = {name: value.item() / 3 for name, value in metrics.items()}
    assert per_token["entropy"] == pytest.approx(0.5) and per_token["kl"] == pytest.approx(1.0 / 3)
    # means over completions
    assert per_token["apo/residual"] == pytest.approx((2.5 - 0.75) / 2)
    assert per_token["apo/residual_abs"] == pytest.approx((2.5 + 0.75) / 2)
    assert per_token["apo/log_ratio_abs"] == pytest.approx((1.5 + 0.5) / 2)


def enumerable(seed=0, n=7):
    generator = torch.Generator().manual_seed(seed)
    z, ref = torch.randn(2, n, generator=generator, dtype=F64)
    reward = (torch.rand(n, generator=generator) > 0.5).to(F64)
    return z.requires_grad_(), ref.log_softmax(0), reward


def regression(objective, logp, ref, credit):
    """Losses of one-token completions, one per action: loss_sum of each row alone."""
    batch = make([1] * len(logp), credit.tolist())
    batch = replace(
        batch,
        credit=credit,
        counts={"token": 1.0, "completion": 1.0},
        ref_logprobs=torch.stack([torch.full_like(ref, math.nan), ref], dim=1),
    )
    padded = torch.stack([torch.zeros_like(logp), logp], dim=1)
    return objective.loss_sum(padded, torch.zeros_like(padded), batch)[0]


@pytest.mark.parametrize("value", [-3.0, 0.0, 0.7])
def test_expected_gradient_is_that_of_regularised_reward_whatever_the_value(value):
    z, ref, reward = enumerable()
    beta2 = 0.05
    logp = z.log_softmax(0)
    wanted = torch.autograd.grad((logp.exp() * reward).sum() - beta2 * (logp.exp() * (logp - ref)).sum(), z)[0]
    # loss_sum adds up rows; their expectation weighs row y by pi(y), here as copies of the gradient in logp
    logp = z.log_softmax(0)
    leaf = logp.detach().requires_grad_()
    regression(APO(beta2=beta2, entropy=0.0), leaf, ref, reward - value).backward()
    gradient = torch.autograd.grad((logp * (logp.exp().detach() * leaf.grad)).sum(), z)[0]
    assert (gradient + 2 * beta2 * wanted).abs().max() < 1e-12


def test_the_optimal_policy_has_no_loss_and_a_bandit_finds_it():
    z, ref, reward = enumerable(seed=3)
    beta2 = 0.5
    value = beta2 * torch.logsumexp(ref + reward / beta2, 0)
    optimal = ref + (reward - value) / beta2
    assert optimal.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    assert regression(APO(beta2=beta2, entropy=0.0), optimal, ref, reward - value).item() < 1e-28

    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        logp = z.log_softmax(0)
        drawn = torch.multinomial(logp.exp().detach(), 16, replacement=True, generator=generator)
        loss = regression(APO(beta2=beta2, entropy=0.0), logp[drawn], ref[drawn], (reward - value)[drawn]) / 16
        (gradient,) = torch.autograd.grad(loss, z)
        with torch.no_grad():
            z -= 0.1 * gradient
    assert (z.detach().softmax(0) - optimal.exp()).abs().max() < 1e-3


BAD = [
    (dict(beta1=0.0), "--objective.beta1 must be above 0 and at most 1e6, got 0.0; for the mean or the maximum"),
    (dict(beta2=-1.0), "--objective.beta2 must be above 0, got -1.0"),
    (dict(entropy=-1.0), "--objective.entropy must be at least 0"),
]


@pytest.mark.parametrize("options, text", BAD, ids=[str(o) for o, _ in BAD])
def test_bad_settings(options, text):
    with pytest.raises(ValueError, match=text):
        APO(**options)
