"""GRPO: clipped policy gradient with a group-relative advantage, and its relatives as settings."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastrl.base import ranks
from fastrl.base.setting import check_bounds, setting
from fastrl.base.types import Problem, TrainBatch
from fastrl.objectives.base import LARGEST_CAP, clipped_surrogate, clipped_weight, kl_estimate, masked, old_log_ratio


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """Group-relative policy optimization (arXiv:2402.03300).

        A_i     = (r_i - mean(r)) / (std(r) + std_eps) within a group, unbiased std; exactly 0 when all are equal
        ratio   = exp(logprobs - old_logprobs) per token
        loss    = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)), for A < 0 at most -A dual_clip
                  + kl * KL(policy, reference) - entropy * H

    DAPO (arXiv:2503.14476): clip_high=0.28, loss_agg=token, drop_zero_std, overlong=mask or penalty.
    Dr. GRPO (arXiv:2503.20783): adv_norm=none, loss_agg=const. GRPO as published: loss_agg=seq, kl=0.04.
    GSPO (arXiv:2507.18071): ratio_level=sequence, clip_low=3e-4, clip_high=4e-4, loss_agg=seq, dual_clip=None; the
    ratio of all tokens is exp(mean of the completion's log-ratios).
    CISPO (arXiv:2506.13585): surrogate=cispo, clip_low=10, clip_high=0.2; -A clip(ratio) logp with the clipped ratio as
    a constant, so that clipped tokens keep their gradient.
    """

    clip_low: float = setting(0.2, "(0, 1e6]", known_as="epsilon")  # ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = setting(0.2, "(0, 1e6]", known_as="epsilon_high")  # the upper end of that
    # largest ratio that counts against a bad completion; None = no limit
    dual_clip: float | None = setting(3.0, "(1, 1e6]", known_as="delta")
    log_ratio_cap: float = setting(20.0, f"(0, {LARGEST_CAP:g}]")  # nats; beyond it the gradient is zero
    surrogate: Literal["clip", "cispo"] = "clip"  # clip: PPO; cispo: the clipped ratio as a weight
    ratio_level: Literal["token", "sequence"] = "token"  # per token, or one ratio per completion (GSPO)
    # divide by the std of the group, of the batch, or not
    adv_norm: Literal["group", "batch", "none"] = setting("group", known_as="scale_rewards")
    std_eps: float = setting(1e-6, "(0, 1e6]")  # added to the standard deviation
    loss_agg: Literal["token", "seq", "const"] = "token"  # mean over tokens; of completion means; sum / max_new_tokens
    kl: float = setting(0.0, "[0, 1e6]", known_as="beta")  # coefficient of the KL to the reference
    kl_type: Literal["k1", "k2", "k3", "k3+"] = "k3"  # estimator of the KL; docs/methods.md
    kl_in: Literal["loss", "reward"] = "loss"  # added to the loss, or taken off the reward
    entropy: float = setting(0.0, "[0, 1e6]")  # coefficient of the entropy bonus
    drop_zero_std: bool = False  # leave groups with equal rewards out of the denominator
    # completions cut off by max_new_tokens
    overlong: Literal["keep", "mask", "penalty"] = setting("keep", known_as="mask_truncated_completions")
    # for the distribution of the engine, w = old / rollout. tis: min(w, cap); mis: w, 0 above the cap; mask: 1 between
    # 1 / cap and cap, else 0; seq-mask: w of the completion, 0 above the cap
    is_correction: Literal["none", "tis", "mis", "mask", "seq-mask"] = "none"
    is_cap: float = setting(3.0, "[1, 1e6]")  # largest weight of is_correction
    # tokens before the limit over which the penalty grows to -1; 0 = a fifth of the limit
    overlong_buffer: int = setting(0, "[0, 1e7]")

    min_group_size = 2
    splits_groups = True
    needs_current = needs_profile = False

    def __post_init__(self):
        check_bounds(self, "objective.")

    @property
    def normalizer(self) -> str:
        return "token" if self.loss_agg == "token" else "completion"

    def needs(self, num_minibatches: int) -> frozenset[str]:
        old = num_minibatches > 1 or (self.kl > 0 and self.kl_in == "reward") or self.is_correction != "none"
        return frozenset({"old_logprobs"} if old else ()) | frozenset({"ref_logprobs"} if self.kl > 0 else ())

    def credit(self, rewards: Tensor, problem: Problem | None = None) -> Tensor:
        """rewards [G] -> advantages [G]. Equal rewards give exactly zero, not a rounding error over std_eps."""
        if rewards.max() == rewards.min():
            return torch.zeros_like(rewards)
        centered = rewards - rewards.mean()
        return centered / (rewards.std() + self.std_eps) if self.adv_norm == "group" else centered

    def prepare(self, batch: TrainBatch) -> None:
        shaped = batch.reward
        penalty = self.reward_penalty(batch)
        if penalty is not None:
            shaped = batch.reward - penalty.to(batch.reward.dtype)
            for group in batch.group.unique():
                rows = batch.group == group
                batch.credit[rows] = self.credit(shaped[rows])
        if self.adv_norm == "batch":
            n, total, squares = ranks.all_sum_(
                torch.stack([torch.ones_like(shaped), shaped, shaped.square()]).double().sum(dim=1)
            )
            variance = (squares - total.square() / n).clamp(min=0) / (n - 1).clamp(min=1)
            batch.credit /= variance.sqrt().to(batch.credit.dtype) + self.std_eps
        if self.drop_zero_std:
            alive = torch.zeros_like(batch.truncated)
            for group in batch.group.unique():
                rows = batch.group == group
                alive[rows] = (batch.credit[rows] != 0).any()
            batch.response_mask &= alive[:, None]
        if self.overlong == "mask":
            batch.response_mask &= ~batch.truncated[:, None]

    def reward_penalty(self, batch: TrainBatch) -> Tensor | None:
        """[B], what is taken off the reward before the advantage, or None."""
        penalty = None
        if self.kl > 0 and self.kl_in == "reward":
            x = masked(batch.old_logprobs - batch.ref_logprobs, batch.response_mask)
            penalty = self.kl * kl_estimate(x, self.kl_type).sum(dim=1)
        if self.overlong == "penalty":
            # DAPO eq. 13: 0 up to limit - buffer, then linear, 1 for a completion that was cut off
            limit = batch.max_new_tokens
            buffer = self.overlong_buffer or max(1, limit // 5)
            over = (batch.response_mask.sum(dim=1) - (limit - buffer)) / buffer
            soft = torch.where(batch.truncated, 1.0, over.clamp(0, 1))
            penalty = soft if penalty is None else penalty + soft
        return penalty

    def silent(self, batch: TrainBatch) -> Tensor:
        always = self.entropy > 0 or (self.kl > 0 and self.kl_in == "loss")
        return torch.zeros_like(batch.truncated) if always else batch.credit == 0

    def loss_sum(self, logprobs: Tensor, entropy: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        mask = batch.response_mask
        log_ratio, advantage = old_log_ratio(logprobs, batch), batch.credit[:, None]
        beyond = log_ratio.detach().abs() > self.log_ratio_cap
        if self.ratio_level == "sequence":
            # capped before the mean: one infinite token would cancel another to NaN
            capped = log_ratio.clamp(-self.log_ratio_cap, self.log_ratio_cap)
            mean = capped.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
            log_ratio = masked(mean.expand_as(log_ratio), mask)
        clips = dict(clip_low=self.clip_low, clip_high=self.clip_high, log_ratio_cap=self.log_ratio_cap)
        if self.surrogate == "cispo":
            loss, clipped = clipped_weight(log_ratio, logprobs, advantage, **clips)
        else:
            loss, clipped = clipped_surrogate(log_ratio, advantage, dual_clip=self.dual_clip, **clips)
        if self.is_correction != "none":
            loss = loss * self.sampler_weight(batch)
        metrics = {"entropy": entropy.detach(), **clipped, "log_ratio_capped_frac": beyond}
        if self.entropy:
            loss = loss - self.entropy * entropy
        if batch.ref_logprobs is not None:
            kl = kl_estimate(masked(logprobs - batch.ref_logprobs, mask), self.kl_type)
            metrics["kl"] = kl.detach()
            if self.kl_in == "loss":
                loss = loss + self.kl * kl
        return (masked(loss, mask) * self.row_weight(batch)).sum(), {
            k: masked(v, mask).sum() for k, v in metrics.items()
        }

    def fused(self, batch: TrainBatch) -> dict | None:
        """The same loss as arguments of `linear_policy_loss`, vectors still [B, S]."""
        # a token has one weight there: of the surrogate and of what is added to it
        weighted = self.is_correction != "none"
        alone = self.entropy == 0 and (self.kl == 0 or self.kl_in == "reward")
        if self.ratio_level == "sequence" or (weighted and not (self.is_correction == "tis" and alone)):
            return None
        mask = batch.response_mask
        weight = self.row_weight(batch) * (self.sampler_weight(batch) if weighted else 1.0)
        return dict(
            advantage=batch.credit[:, None].expand(mask.shape), w=masked(mask * weight, mask),
            mode=self.surrogate, epsilon=(self.clip_low, self.clip_high), dual_clip=self.dual_clip,
            log_ratio_cap=self.log_ratio_cap, entropy_coef=self.entropy, kl_estimator=self.kl_type,
            kl_coef=self.kl if self.kl_in == "loss" else 0.0,
        )  # fmt: skip

    def sampler_weight(self, batch: TrainBatch) -> Tensor:
        """[B, S] or [B, 1], how much likelier the trainer's old policy found what the engine sampled; 0 if refused."""
        difference = masked(batch.old_logprobs - batch.rollout_logprobs, batch.response_mask)
        if self.is_correction == "seq-mask":
            difference = difference.sum(dim=1, keepdim=True)
        weight = difference.clamp(-20, 20).exp()
        if self.is_correction == "tis":
            return weight.clamp(max=self.is_cap)
        if self.is_correction == "mask":
            return ((weight <= self.is_cap) & (weight >= 1 / self.is_cap)).to(weight.dtype)
        return torch.where(weight > self.is_cap, torch.zeros_like(weight), weight)

    def row_weight(self, batch: TrainBatch) -> Tensor | float:
        """[B, 1] factor of a completion's token sum, before the division by the denominator."""
        if self.loss_agg == "token":
            return 1.0
        if self.loss_agg == "const":
            return 1.0 / batch.max_new_tokens
        return 1.0 / batch.response_mask.sum(dim=1, keepdim=True).clamp(min=1)
