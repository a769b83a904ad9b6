"""PPO: clipped policy gradient with an advantage per token from a learned critic."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrl.base import ranks
from fastrl.base.setting import check_bounds, setting
from fastrl.base.types import TrainBatch
from fastrl.kernels.policy_loss import TokenLoss, clip, kl_estimate
from fastrl.objectives.base import LARGEST_CAP, TokenObjective, TokenWeights, masked


@dataclass(frozen=True, kw_only=True)
class PPO(TokenObjective):
    """Proximal policy optimization (arXiv:1707.06347) with generalized advantage estimation (arXiv:1506.02438).

        r_t     = reward on the last token of a completion, 0 elsewhere, - kl (old_logprobs - ref_logprobs)
        delta_t = r_t + gamma V_{t+1} - V_t           V_t: the critic before token t; 0 after the last one
        A_t     = delta_t + gamma lam A_{t+1},  return_t = A_t + V_t
        loss    = clipped surrogate of GRPO with A whitened over the batch - entropy * H
        critic  : max((V - return)^2, (clip(V, V_old - value_clip, V_old + value_clip) - return)^2) / 2

    gamma = lam = 1: A_t = r - V_t and return_t = r. A completion cut off by the limit ends there like any other.
    Cost beside GRPO with one completion per problem: a second model under training and its forward per step for V_old.
    """

    gamma: float = setting(1.0, "[0, 1]")  # discount per token
    # 1: returns as sampled, no bias from the critic; 0: one token and the critic's next value
    lam: float = setting(1.0, "[0, 1]")
    clip_low: float = setting(0.2, "(0, 1e6]", known_as="epsilon")  # ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = setting(0.2, "(0, 1e6]", known_as="epsilon_high")  # the upper end of that
    # largest ratio that counts against a bad token; None = no limit
    dual_clip: float | None = setting(3.0, "(1, 1e6]", known_as="delta")
    log_ratio_cap: float = setting(20.0, f"(0, {LARGEST_CAP:g}]")  # nats; beyond it the gradient is zero
    # a value further than this from its old one is pulled no further; None = no limit
    value_clip: float | None = setting(0.5, "(0, 1e6]")
    whiten: bool = True  # advantages with mean 0 and variance 1 over the response tokens of the batch
    # coefficient of the KL to the reference, taken off the reward of each token
    kl: float = setting(0.0, "[0, 1e6]", known_as="beta")
    entropy: float = setting(0.0, "[0, 1e6]")  # coefficient of the entropy bonus

    def __post_init__(self):
        check_bounds(self, "objective.")

    def needs(self, num_minibatches: int) -> frozenset[str]:
        wanted = {"values": True, "old_logprobs": num_minibatches > 1 or self.kl > 0, "ref_logprobs": self.kl > 0}
        return frozenset(name for name, yes in wanted.items() if yes)

    def prepare(self, batch: TrainBatch) -> TrainBatch:
        assert batch.values is not None  # needs
        mask = batch.response_mask
        # values of padding and prompt never enter, not even as the next value of the last token
        values = masked(batch.values, mask)
        rewards = torch.where(mask & ~following(mask), batch.credit[:, None].to(values.dtype), 0.0)
        if self.kl > 0:
            assert batch.old_logprobs is not None and batch.ref_logprobs is not None  # needs
            rewards -= self.kl * kl_estimate(masked(batch.old_logprobs - batch.ref_logprobs, mask), "k1")
        delta = rewards + self.gamma * following(values) - values
        advantages = masked(discounted_sums(delta, self.gamma * self.lam), mask)
        return replace(
            batch, returns=advantages + values, advantages=whitened(advantages, mask) if self.whiten else advantages
        )

    @property
    def token_loss(self) -> TokenLoss:
        return TokenLoss(
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            log_ratio_cap=self.log_ratio_cap,
            entropy=self.entropy,
            kl_type="k1",
        )

    def weights(self, batch: TrainBatch) -> TokenWeights:
        assert batch.advantages is not None  # prepare
        return TokenWeights(masked(batch.advantages, batch.response_mask))

    def value_loss_sum(self, values: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """values [B, S] of the critic now -> its loss summed over the batch, and metrics over response tokens."""
        assert batch.values is not None and batch.returns is not None  # prepare
        mask = batch.response_mask
        values, old, returns = (masked(x, mask) for x in (values, batch.values, batch.returns))
        loss = (values - returns).square() / 2
        metrics = {}
        if self.value_clip is not None:
            near = old + clip(values - old, -self.value_clip, self.value_clip)
            clipped = (near - returns).square() / 2
            metrics["clip_ratio"] = (clipped > loss).sum()
            loss = torch.maximum(loss, clipped)
        return loss.sum(), metrics


def following(x: Tensor) -> Tensor:
    """x [B, S] -> what stands one column to the right, zero (or False) at the end."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


def discounted_sums(x: Tensor, discount: float) -> Tensor:
    """x [B, S] -> y [B, S] with y_s = x_s + discount y_{s+1}."""
    out = x.clone()
    for s in range(x.shape[1] - 2, -1, -1):
        out[:, s] += discount * out[:, s + 1]
    return out


def whitened(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, S], zero outside the mask -> mean 0 and unbiased variance 1 over the masked entries of all ranks."""
    n, total, squares = ranks.all_sum_(torch.stack([mask.sum(), x.double().sum(), x.double().square().sum()]))
    mean = total / n.clamp(min=1)
    variance = (squares - total * mean).clamp(min=0) / (n - 1).clamp(min=1)
    return masked((x - mean) * torch.rsqrt(variance + 1e-8), mask).to(x.dtype)
