"""What an objective is, and the loss of single tokens that several of them share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.base.types import Problem, TrainBatch
from fastrl.kernels.policy_loss import TokenLoss, clip, kl_estimate

LARGEST_CAP = 80.0  # nats; exp(88) is the last that float32 holds


class Objective(ABC):
    """A frozen dataclass of one file; its fields are its configuration. It returns sums, the trainer divides once."""

    normalizer = "token"  # what the summed loss is divided by: "token", "completion" or "group"
    min_group_size = 1  # completions of a prompt that `credit` compares
    splits_groups = True  # whether a microbatch may hold part of a group
    needs_current = False  # whether rows depend on each other at the present weights: then `couple` is called
    needs_profile = False  # whether `credit` reads problem.profile_rewards

    def needs(self, num_minibatches: int) -> frozenset[str]:
        """What `prepare` or `loss_sum` read of old_logprobs, ref_logprobs, values.

        With one minibatch, old_logprobs only if they are read before its first pass has ended: it leaves them behind.
        """
        return frozenset()

    def credit(self, rewards: Tensor, problem: Problem | None = None) -> Tensor:
        """rewards [G] of one group -> credit [G]."""
        return rewards

    def prepare(self, batch: TrainBatch) -> TrainBatch:
        """The whole batch with its last changes (credit, response_mask, advantages), without gradients."""
        return batch

    def couple(self, minibatch: TrainBatch, current_logprobs: Tensor | None) -> TrainBatch:
        """The minibatch with its `residual` at the present weights; current_logprobs None: nothing is old yet."""
        raise NotImplementedError(f"{type(self).__name__} has needs_current and no couple()")

    def silent(self, batch: TrainBatch) -> Tensor:
        """[B] bool: rows whose loss has no gradient, whatever the log-probabilities; they skip the backward."""
        return torch.zeros_like(batch.truncated)

    @abstractmethod
    def loss_sum(self, logprobs: Tensor, entropy: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """logprobs, entropy [B, S] -> loss summed over the batch, and metrics summed over response tokens.

        `entropy` is among the metrics: the step line shows it. Mask before you sum, padding may hold NaN.
        """

    def value_loss_sum(self, values: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """values [B, S] of the critic now -> its loss, in the form of `loss_sum`; of one that needs values."""
        raise NotImplementedError(f"{type(self).__name__} needs values and has no value_loss_sum()")

    def fused(self, batch: TrainBatch) -> "FusedLoss | None":
        """What `loss_sum` says, for the kernel of head and loss; None where only `loss_sum` says it."""
        return None


class TokenWeights(NamedTuple):
    """How much each token counts. advantage [B, 1] or [B, S]; row: factor of a completion, [B, 1] or a number.

    correction: factor of the policy loss alone, [B, S] or [B, 1]; None = 1.
    """

    advantage: Tensor
    row: Tensor | float = 1.0
    correction: Tensor | None = None


@dataclass(frozen=True, slots=True)
class FusedLoss:
    """A `TokenLoss` and its vectors, [B, S] label-aligned, with all factors but the denominator in w."""

    loss: TokenLoss
    advantage: Tensor
    w: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None


class TokenObjective(Objective):
    """An objective whose loss is a `TokenLoss`: loss_sum and the fused head both read it."""

    @property
    @abstractmethod
    def token_loss(self) -> TokenLoss: ...

    @abstractmethod
    def weights(self, batch: TrainBatch) -> TokenWeights: ...

    @property
    def fuses(self) -> bool:
        """Whether the kernel, where a token has one weight for everything, can take it."""
        return self.token_loss.ratio_level == "token"

    def loss_sum(self, logprobs: Tensor, entropy: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        how, weights, mask = self.token_loss, self.weights(batch), batch.response_mask
        log_ratio = old_log_ratio(logprobs, batch)
        sums = {"policy_kl": -log_ratio.detach(), "capped": log_ratio.detach().abs() > how.log_ratio_cap}
        if how.ratio_level == "sequence":
            log_ratio = sequence_mean(log_ratio, mask, how.log_ratio_cap)
            sums["policy_kl"] = -log_ratio.detach()
        loss, sums["clip_low"], sums["clip_high"] = how.policy(log_ratio, logprobs, weights.advantage)
        if weights.correction is not None:
            loss = loss * weights.correction
        if how.entropy:
            loss = loss - how.entropy * entropy
        if batch.ref_logprobs is not None:
            kl = kl_estimate(masked(logprobs - batch.ref_logprobs, mask), how.kl_type)
            sums["kl"] = kl.detach()
            if how.kl:
                loss = loss + how.kl * kl
        summed = {name: masked(x, mask).sum() for name, x in sums.items()}
        metrics = how.metrics(summed, has_reference=batch.ref_logprobs is not None)
        return (masked(loss, mask) * weights.row).sum(), {"entropy": masked(entropy.detach(), mask).sum(), **metrics}

    def fused(self, batch: TrainBatch) -> FusedLoss | None:
        if not self.fuses:
            return None
        weights, mask = self.weights(batch), batch.response_mask
        factor = weights.row if weights.correction is None else weights.row * weights.correction
        return FusedLoss(
            loss=self.token_loss,
            advantage=weights.advantage.expand(mask.shape),
            w=masked(mask * factor, mask),
            old_logprobs=batch.old_logprobs,
            ref_logprobs=batch.ref_logprobs,
        )


def sequence_mean(log_ratio: Tensor, mask: Tensor, cap: float) -> Tensor:
    """log_ratio [B, S] -> the mean of its completion for every token, each capped first.

    One infinite token would cancel another to NaN.
    """
    capped = clip(log_ratio, -cap, cap)
    mean = capped.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return masked(mean.expand_as(log_ratio), mask)


def old_log_ratio(logprobs: Tensor, batch: TrainBatch) -> Tensor:
    """[B, S] nats, logprobs - old_logprobs, 0 outside the response mask and, where nothing is old yet, everywhere."""
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    return masked(logprobs - old, batch.response_mask)  # before any exp: padding may hold anything, and 0 * inf is NaN


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where the mask is set and 0 elsewhere, whatever was there: padding may hold NaN."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
