"""Log-ratios that no exp can take: the loss and its gradient stay finite, and what was capped is counted.

An old log-probability of -inf is a ratio beyond the cap. A NaN, and an infinite log-probability of the reference, are
no ratios: they reach the loss, or the kernels' count, so that the guard sees them.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st

from fastrl.kernels.policy_loss import TokenLoss, kl_estimate, policy_loss, policy_loss_ref
from fastrl.objectives.grpo import GRPO
from fastrl.objectives.ppo import PPO
from support.batches import make
from support.cases import examples

CAP = 20.0
EXTREME = st.sampled_from([1e4, -1e4, math.inf, 1e30, 700.0, -700.0, 88.8, 20.001, -20.001])
RATIOS = st.lists(st.one_of(EXTREME, st.floats(-30, 30, width=32)), min_size=6, max_size=6)
ADVANTAGES = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0]), min_size=2, max_size=2)
OBJECTIVES = {
    "clip": GRPO(kl=0.1),
    "no dual clip": GRPO(dual_clip=None),
    "cispo": GRPO(surrogate="cispo"),
    "sequence": GRPO(ratio_level="sequence", dual_clip=None),
    "ppo": PPO(),
    **{f"corrected {kind}": GRPO(is_correction=kind) for kind in ("tis", "mis", "mask", "seq-mask")},
}


def cases(count: int, later: int):
    """Fewer of hypothesis' examples in `make test` than in `make soak`: two sets of marks for one test."""
    return [
        pytest.param(count, marks=pytest.mark.promise("B4", trials=count)),
        pytest.param(later, marks=[pytest.mark.soak, pytest.mark.promise("B4", trials=later)]),
    ]


def batch_of(log_ratios: list[float], advantages: list[float]):
    """Two rows of three tokens whose log-probabilities are -1 and differ from the old ones by `log_ratios`."""
    rows = torch.tensor(log_ratios).view(2, 3)
    old = (-1.0 - rows).tolist()
    batch = make([3, 3], advantages, old_logprobs=old, ref_logprobs=(-1 - rows.clamp(-1e4, 1e4)).tolist())
    rollout = torch.nan_to_num(batch.old_logprobs, nan=0.0) + torch.tensor([[0, 1e4, -1e4, 30.0]])
    rollout = rollout.nan_to_num(neginf=-1e4)
    advantages = batch.credit[:, None].expand(batch.response_mask.shape)
    batch = replace(batch, rollout_logprobs=rollout, advantages=advantages)
    logprobs = torch.where(batch.response_mask, -1.0, math.nan).requires_grad_()
    return batch, logprobs, torch.where(batch.response_mask, 0.5, math.nan)


@pytest.mark.parametrize("count", cases(40, 160))
def test_every_objective_stays_finite_and_counts_what_it_caps(count):
    def check(name, log_ratios, advantages):
        batch, logprobs, entropy = batch_of(log_ratios, advantages)
        loss, metrics = OBJECTIVES[name].loss_sum(logprobs, entropy, batch)
        loss.backward()
        assert loss.isfinite() and logprobs.grad.isfinite().all()
        actual = (-1 - batch.old_logprobs)[batch.response_mask]
        assert metrics["log_ratio_capped_frac"] == (actual.abs() > CAP).sum()
        beyond = batch.response_mask & ((logprobs - batch.old_logprobs).abs() > CAP)
        if name != "cispo" and not OBJECTIVES[name].__dict__.get("kl"):
            assert not logprobs.grad[beyond].any(), "no gradient through a ratio beyond the cap"

    examples(check, count, name=st.sampled_from(list(OBJECTIVES)), log_ratios=RATIOS, advantages=ADVANTAGES)


@pytest.mark.parametrize("count", cases(60, 140))
@pytest.mark.parametrize("function", [policy_loss_ref, policy_loss])
def test_so_does_the_fused_loss_in_its_definition_and_as_it_is_called(count, function):
    def check(surrogate, log_ratios, advantages, dual_clip):
        logp = torch.full((6,), -1.0)
        old = -1.0 - torch.tensor(log_ratios)
        advantage, w = torch.tensor(advantages).repeat_interleave(3), torch.full((6,), 0.25)
        loss = TokenLoss(surrogate=surrogate, dual_clip=dual_clip, kl=0.1)
        out = function(loss, logp, old, advantage, w, old.clamp(-1e4, 1e4))
        stats = out.named()
        assert out.loss.isfinite() and out.coef.isfinite().all() and stats["nonfinite"] == 0
        assert stats["capped"] == ((-1 - old).abs() > CAP).sum()

    examples(
        check,
        count,
        surrogate=st.sampled_from(["clip", "cispo"]),
        log_ratios=RATIOS,
        advantages=ADVANTAGES,
        dual_clip=st.sampled_from([None, 3.0]),
    )


@pytest.mark.parametrize("count", cases(10, 30))
def test_so_does_the_kernel(count):
    """Six examples in one launch, beside the definition."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def check(log_ratios, advantages):
        old = -1.0 - torch.tensor(log_ratios, device=device)
        logp, w = torch.full_like(old, -1.0), torch.full_like(old, 0.25)
        advantage = torch.tensor(advantages, device=device).repeat_interleave(3)
        ref = old.clamp(-1e4, 1e4)
        vectors = (TokenLoss(kl=0.1), logp, old, advantage, w, ref)
        ours, truth = policy_loss(*vectors, triton=True), policy_loss_ref(*vectors)
        assert ours.coef.isfinite().all() and ours.named()["capped"] == truth.named()["capped"]
        torch.testing.assert_close(ours.coef, truth.coef, rtol=1e-5, atol=1e-6)

    examples(check, count, log_ratios=RATIOS, advantages=ADVANTAGES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_ratio_that_is_none_reaches_the_loss(name):
    batch, logprobs, entropy = batch_of([0.0, math.nan, 0.1, 0.0, 0.0, 0.0], [1.0, -1.0])
    loss, _ = OBJECTIVES[name].loss_sum(logprobs, entropy, batch)
    assert loss.isnan()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k3+"])
def test_the_kl_caps_what_is_finite_and_shows_what_is_not(kind):
    capped = kl_estimate(torch.tensor([1e4, -1e4]), kind)
    assert torch.equal(capped, kl_estimate(torch.tensor([20.0, -20.0]), kind)) and capped.isfinite().all()
    assert kl_estimate(torch.tensor([math.inf, -math.inf, math.nan]), kind).isnan().all()


def test_a_cap_that_exp_cannot_take_is_refused():
    for objective in (GRPO, PPO):
        with pytest.raises(ValueError, match="--objective.log-ratio-cap must be at most 80, got 90"):
            objective(log_ratio_cap=90.0)
