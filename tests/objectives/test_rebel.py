"""REBEL: equal to the loop over pairs, whole groups or completions alone."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from fastrl.objectives.rebel import REBEL
from fastrl.step.batching import select
from support.batches import make

F64 = torch.float64
LENGTHS, GROUPS = [2, 3, 1, 2, 2], [0, 0, 0, 1, 1]
REWARDS = [1.0, 0.0, 0.5, 0.0, 2.0]


def batch_and_logprobs(old=True):
    """Two groups, of three and of two; log-ratios that differ from token to token."""
    generator = torch.Generator().manual_seed(0)
    batch = make(LENGTHS, REWARDS, group=GROUPS)
    batch = replace(batch, credit=batch.credit.double())
    noise = torch.randn(2, *batch.response_mask.shape, generator=generator, dtype=F64)
    logprobs = torch.where(batch.response_mask, noise[0] - 2, math.nan)
    if old:
        batch = replace(batch, old_logprobs=torch.where(batch.response_mask, noise[1] - 2, math.nan))
    return batch, logprobs.requires_grad_()


def loop_over_pairs(batch, logprobs, eta):
    """mean over pairs of ((u_i - u_j) - eta (r_i - r_j))^2, summed over groups, written from the paper."""
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    u = [(logprobs - old)[b][batch.response_mask[b]].sum() for b in range(len(batch))]
    total = 0
    for group in set(GROUPS):
        rows = [b for b, g in enumerate(GROUPS) if g == group]
        pairs = list(itertools.combinations(rows, 2))
        for i, j in pairs:
            total += ((u[i] - u[j]) - eta * (REWARDS[i] - REWARDS[j])) ** 2 / len(pairs)
    return total


@pytest.mark.parametrize("old", [True, False], ids=["moved", "first step"])
@pytest.mark.parametrize("paired", [True, False])
def test_loss_and_gradient_are_those_of_the_loop(paired, old):
    batch, logprobs = batch_and_logprobs(old)
    expected = loop_over_pairs(batch, logprobs, eta=0.7)
    (wanted,) = torch.autograd.grad(expected, logprobs)
    objective = REBEL(eta=0.7, paired=paired)
    if not paired:
        batch = objective.couple(batch, logprobs.detach() if old else None)
    loss, _ = objective.loss_sum(logprobs, torch.zeros_like(logprobs), batch)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    inside = batch.response_mask
    assert (gradient - wanted)[inside].abs().max() < 1e-14 and not gradient[~inside].any()
    assert gradient[inside].abs().max() > 0.1


def test_completions_alone_add_up_to_the_group():
    batch, logprobs = batch_and_logprobs()
    objective = REBEL(eta=0.7)
    batch = objective.couple(batch, logprobs.detach())
    whole, _ = objective.loss_sum(logprobs, torch.zeros_like(logprobs), batch)
    (wanted,) = torch.autograd.grad(whole, logprobs)
    total, gradient = 0.0, torch.zeros_like(wanted)
    for row in range(len(batch)):
        part = select(batch, torch.tensor([row]))
        width = part.input_ids.shape[1]
        own = logprobs[row : row + 1, :width]
        loss, _ = objective.loss_sum(own, torch.zeros_like(own), part)
        total += loss.item()
        gradient += torch.autograd.grad(loss, logprobs)[0]
    assert total == pytest.approx(whole.item(), abs=1e-12) and (gradient - wanted).abs().max() < 1e-15


def test_two_completions_by_hand():
    # u = 0.5 and -0.25, r = 1 and 0, eta 2: (0.75 - 2)^2 = 1.5625; d/du = +-2 (0.75 - 2) = -+2.5
    batch = make([1, 1], [1.0, 0.0], old_logprobs=[[-1.5], [-0.75]])
    logprobs = torch.where(batch.response_mask, -1.0, math.nan).requires_grad_()
    objective = REBEL(eta=2.0)
    batch = objective.couple(batch, logprobs.detach())
    loss, metrics = objective.loss_sum(logprobs, torch.ones_like(logprobs), batch)
    loss.backward()
    assert loss.item() == pytest.approx(1.5625)
    assert logprobs.grad[:, 1].tolist() == pytest.approx([-2.5, 2.5])  # descent raises the better one
    assert metrics["policy_kl"].item() == pytest.approx(-0.25) and metrics["entropy"] == 2


def test_expected_gradient_on_policy_is_four_eta_times_that_of_the_reward():
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(7, generator=generator, dtype=F64, requires_grad=True)
    reward = (torch.rand(7, generator=generator) > 0.5).to(F64)
    logp = z.log_softmax(0)
    (wanted,) = torch.autograd.grad((logp.exp() * reward).sum(), z)
    total = torch.zeros_like(z)
    probs = z.detach().softmax(0)
    for i, j in itertools.product(range(7), repeat=2):
        batch = make([1, 1], [0.0, 0.0])
        batch = replace(batch, credit=reward[[i, j]])
        logp = z.log_softmax(0)
        rows = torch.stack([torch.zeros(2, dtype=F64), logp[[i, j]]], dim=1)
        objective = REBEL(eta=0.7)
        batch = objective.couple(batch, None)
        loss, _ = objective.loss_sum(rows, torch.zeros_like(rows), batch)
        total += probs[i] * probs[j] * torch.autograd.grad(loss, z, allow_unused=True)[0]
    assert (total + 4 * 0.7 * wanted).abs().max() < 1e-14


def test_equal_rewards_are_silent_until_the_policy_moves():
    batch = make([2, 2], [0.1, 0.1])
    objective = REBEL()
    batch = objective.couple(batch, None)
    assert batch.residual.tolist() == [0.0, 0.0] and objective.silent(batch).all()
    batch = replace(batch, old_logprobs=torch.where(batch.response_mask, -1.0, math.nan))
    batch = objective.couple(batch, batch.old_logprobs + torch.tensor([[0.1], [-0.1]]))
    assert batch.residual.tolist() == pytest.approx([0.2, -0.2]) and not objective.silent(batch).any()


def test_kl_is_taken_off_the_reward():
    batch = make([2, 1], [1.0, 0.0], old_logprobs=[[-1.0, -1.0], [-2.0]], ref_logprobs=[[-1.5, -2.0], [-1.0]])
    batch = REBEL(kl=0.1).prepare(batch)
    assert batch.credit.tolist() == pytest.approx([1.0 - 0.1 * 1.5, 0.0 + 0.1])
    assert REBEL(kl=0.1).needs(1) == {"old_logprobs", "ref_logprobs"}
    assert REBEL().needs(1) == frozenset() and REBEL().needs(4) == {"old_logprobs"}


def test_bad_settings():
    with pytest.raises(ValueError, match="--objective.eta must be above 0, got 0.0"):
        REBEL(eta=0.0)
    with pytest.raises(ValueError, match="--objective.kl must be at least 0, got -1.0"):
        REBEL(kl=-1.0)
