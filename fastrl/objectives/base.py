"""What an objective is, and the estimators that several of them share."""

from typing import Protocol

import torch
from torch import Tensor

from fastrl.base.types import Problem, TrainBatch

LARGEST_CAP = 80.0  # nats; exp(88) is the last that float32 holds


class Objective(Protocol):
    """A frozen dataclass; its fields are its configuration. It returns sums, the trainer divides once.

    normalizer: what the summed loss is divided by: "token", "completion" or "group".
    min_group_size: completions of a prompt that `credit` compares.
    splits_groups: whether a microbatch may hold part of a group.
    needs_current: whether rows depend on each other through the present weights. Then `current_logprobs` of the whole
        minibatch are filled before each backward (an extra forward, left out as long as nothing is old), and
        `couple(minibatch)` puts what `loss_sum` needs of them into `residual`, without gradients.
    needs_profile: whether `credit` reads `problem.profile_rewards`.

    One that needs `values` also has value_loss_sum(values [B, S], batch), the critic's loss in the form of `loss_sum`.
    One whose loss is a sum over single tokens may have fused(batch): arguments of `linear_policy_loss` that say what
    `loss_sum` says, or None where its settings do not allow it. On a GPU the head then takes gradients in the forward.
    """

    normalizer: str
    min_group_size: int
    splits_groups: bool
    needs_current: bool
    needs_profile: bool

    def needs(self, num_minibatches: int) -> frozenset[str]:
        """TrainBatch fields to fill before `prepare`: old_logprobs, ref_logprobs, values.

        With one minibatch, old_logprobs only if they are read before its first pass has ended: it leaves them behind.
        """

    def credit(self, rewards: Tensor, problem: Problem) -> Tensor:
        """rewards [G] of one group -> credit [G]."""

    def prepare(self, batch: TrainBatch) -> None:
        """Last changes to the whole batch (credit, response_mask), without gradients; nothing else writes to it."""

    def silent(self, batch: TrainBatch) -> Tensor:
        """[B] bool: rows whose loss has no gradient, whatever the log-probabilities; they skip the backward."""

    def loss_sum(self, logprobs: Tensor, entropy: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """logprobs, entropy [B, S] -> loss summed over the batch, and metrics summed over response tokens.

        `entropy` is among the metrics: the step line shows it.
        """


def kl_estimate(log_ratio: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from log_ratio = logprobs - ref_logprobs, for tokens of the policy.

    k1 = x; k2 = x^2 / 2; k3 = exp(-x) - 1 + x, never negative; k3+ has k3's value and k2's gradient, which is that of
    KL(policy || reference). As a loss, k1 has expected gradient zero and k3 that of KL(reference || policy).
    """
    # exp(20) is finite; an infinite log-probability is no number to clamp, and the guard must see it
    x = torch.where(log_ratio.isfinite(), log_ratio.clamp(-20, 20), torch.nan)
    if kind == "k1":
        return x
    k2 = x.square() / 2
    if kind == "k2":
        return k2
    k3 = torch.expm1(-x) + x  # expm1: exp(-x) - 1 + x goes negative near 0 in float32
    return k3 if kind == "k3" else k2 + (k3 - k2).detach()


def old_log_ratio(logprobs: Tensor, batch: TrainBatch) -> Tensor:
    """[B, S] nats, logprobs - old_logprobs, 0 outside the response mask and, where nothing is old yet, everywhere."""
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    return masked(logprobs - old, batch.response_mask)  # before any exp: padding may hold anything, and 0 * inf is NaN


def clipped_surrogate(
    log_ratio: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None,
    log_ratio_cap: float,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """log_ratio [B, S] nats, advantage [B, 1] or [B, S] -> loss per token [B, S] and where it was clipped [B, S].

    ratio = exp(log_ratio); loss = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)), for A < 0 at most
    -A dual_clip. Beyond +-log_ratio_cap the gradient is zero.
    """
    ratio = log_ratio.clamp(-log_ratio_cap, log_ratio_cap).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    if dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * dual_clip), loss)
    low, high = (ratio < clipped) & (advantage < 0), (ratio > clipped) & (advantage > 0)
    return loss, {
        "policy_kl": -log_ratio.detach(),
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low | high,
    }


def clipped_weight(
    log_ratio: Tensor, logprobs: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float, log_ratio_cap: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `clipped_surrogate`, but -A logprobs weighted by the clipped ratio, which has no gradient (CISPO)."""
    ratio = log_ratio.detach().clamp(-log_ratio_cap, log_ratio_cap).exp()
    low, high = ratio < 1 - clip_low, ratio > 1 + clip_high
    return -advantage * ratio.clamp(1 - clip_low, 1 + clip_high) * logprobs, {
        "policy_kl": -log_ratio.detach(),
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low | high,
    }


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where the mask is set and 0 elsewhere, whatever was there: padding may hold NaN."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
