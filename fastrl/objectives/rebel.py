"""REBEL (arXiv:2404.16767): regress differences of log-ratios on differences of rewards, over all pairs of a group.

    u_i   = sum_t (logprobs - old_logprobs),   d_i = u_i - eta r_i
    loss  = mean over groups of the mean over pairs of (d_i - d_j)^2  =  2 / (G - 1) sum_i (d_i - mean d)^2

On-policy the expected gradient is -4 eta grad E[r]. A pair couples its completions only through d_i - d_j, so each can
be differentiated alone with that as a constant: half the activations of a pair in one graph, and exact.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrl.base.setting import check_bounds, setting
from fastrl.base.types import TrainBatch
from fastrl.objectives.base import Objective, masked, old_log_ratio


@dataclass(frozen=True, kw_only=True)
class REBEL(Objective):
    """The authors take groups of 2, 4 epochs per batch (--epochs-per-batch) and eta 1, or 1e6 with large batches."""

    eta: float = setting(1.0, "(0, 1e6]")  # scale of the rewards
    paired: bool = False  # whole groups in one graph, as published; costs memory and saves a forward per backward
    # coefficient of log(old / reference) of the completion, taken off the reward
    kl: float = setting(0.0, "[0, 1e6]", known_as="beta")

    normalizer = "group"
    min_group_size = 2

    def __post_init__(self):
        check_bounds(self, "objective.")

    @property
    def splits_groups(self) -> bool:
        return not self.paired

    @property
    def needs_current(self) -> bool:
        return not self.paired

    def needs(self, num_minibatches: int) -> frozenset[str]:
        old = {"old_logprobs"} if num_minibatches > 1 or self.kl else set()
        return frozenset(old | ({"ref_logprobs"} if self.kl else set()))

    def prepare(self, batch: TrainBatch) -> TrainBatch:
        if not self.kl:
            return batch
        assert batch.old_logprobs is not None and batch.ref_logprobs is not None  # needs
        penalty = self.kl * masked(batch.old_logprobs - batch.ref_logprobs, batch.response_mask).sum(dim=1)
        return replace(batch, credit=batch.credit - penalty)

    def couple(self, minibatch: TrainBatch, current_logprobs: Tensor | None) -> TrainBatch:
        """residual = d - mean of its group, at the present weights."""
        u = torch.zeros_like(minibatch.credit)
        if current_logprobs is not None:
            u = old_log_ratio(current_logprobs, minibatch).sum(dim=1)
        return replace(minibatch, residual=centered(u - self.eta * minibatch.credit, minibatch))

    def silent(self, batch: TrainBatch) -> Tensor:
        return torch.zeros_like(batch.truncated) if self.paired else batch.residual == 0

    def loss_sum(self, logprobs: Tensor, entropy: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = old_log_ratio(logprobs, batch)
        u = log_ratio.sum(dim=1)
        weight = 2.0 / (batch.group_size - 1)
        if self.paired:
            loss = weight * centered(u - self.eta * batch.credit, batch).square()
        else:
            # the value of the square, and its gradient in this row's own u: residuals of a group sum to zero
            assert batch.residual is not None  # couple
            loss = weight * (batch.residual.square() + 2 * batch.residual * (u - u.detach()))
        metrics = {"entropy": entropy.detach(), "policy_kl": -log_ratio.detach()}
        return loss.sum(), {name: masked(value, batch.response_mask).sum() for name, value in metrics.items()}


def centered(values: Tensor, batch: TrainBatch) -> Tensor:
    """values [B] minus the mean over the group's rows, all of which are in the batch; exactly 0 where all are equal."""
    if not len(values):
        return values
    mates = batch.group[:, None] == batch.group  # [B, B]; to count groups instead, the host would wait for a GPU
    low, high = torch.where(mates, values, torch.inf).amin(1), torch.where(mates, values, -torch.inf).amax(1)
    mean = torch.where(mates, values, 0.0).sum(1) / mates.sum(1)
    return torch.where(low == high, torch.zeros_like(values), values - mean)
