"""GRPO: clipped policy gradient with a group-relative advantage, and its relatives as settings."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fastrl.base import ranks
from fastrl.base.setting import check_bounds, setting
from fastrl.base.types import Problem, TrainBatch
from fastrl.kernels.policy_loss import TokenLoss, kl_estimate
from fastrl.objectives.base import LARGEST_CAP, TokenObjective, TokenWeights, masked

PRESETS = {
    "dapo": dict(clip_high=0.28, dual_clip=None, loss_agg="token", drop_zero_std=True, overlong="penalty"),
    "dr-grpo": dict(adv_norm="none", loss_agg="const", dual_clip=None),
    "gspo": dict(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4, loss_agg="seq", dual_clip=None),
    "cispo": dict(surrogate="cispo", clip_low=10.0, clip_high=0.2, loss_agg="token"),
}


@dataclass(frozen=True, kw_only=True)
class GRPO(TokenObjective):
    """Group-relative policy optimization (arXiv:2402.03300).

        A_i     = (r_i - mean(r)) / (std(r) + std_eps) within a group, unbiased std; exactly 0 when all are equal
        ratio   = exp(logprobs - old_logprobs) per token
        loss    = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)), for A < 0 at most -A dual_clip
                  + kl * KL(policy, reference) - entropy * H

    A preset is a paper's settings under its name (PRESETS); single flags win over it. What is not in them:
    dapo (arXiv:2503.14476): no dynamic sampling, which samples until every group has a signal; equal groups leave the
    denominator instead. Of its two ways with long completions the soft penalty, not the mask: with both, what is
    masked is never penalised.
    dr-grpo (arXiv:2503.20783): the sum is divided by max_new_tokens times completions, a constant as in its code.
    gspo (arXiv:2507.18071): the ratio of all tokens is exp(mean of the completion's log-ratios); not GSPO-token, whose
    gradient is the same.
    cispo (arXiv:2506.13585): the paper publishes no upper clip, so it is that of verl's example; no lower clip.
    GRPO as published is no preset: loss_agg=seq, kl=0.04.
    """

    # a paper's settings under its name; single flags win over it
    preset: Literal["none", "dapo", "dr-grpo", "gspo", "cispo"] = setting("none", free=True)
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
    PRESETS = PRESETS

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

    def prepare(self, batch: TrainBatch) -> TrainBatch:
        shaped, credit, mask = batch.reward, batch.credit, batch.response_mask
        penalty = self.reward_penalty(batch)
        if penalty is not None:
            shaped, credit = batch.reward - penalty.to(batch.reward.dtype), credit.clone()
            for group in batch.group.unique():
                rows = batch.group == group
                credit[rows] = self.credit(shaped[rows])
        if self.adv_norm == "batch":
            n, total, squares = ranks.all_sum_(
                torch.stack([torch.ones_like(shaped), shaped, shaped.square()]).double().sum(dim=1)
            )
            variance = (squares - total.square() / n).clamp(min=0) / (n - 1).clamp(min=1)
            credit = credit / (variance.sqrt().to(credit.dtype) + self.std_eps)
        if self.drop_zero_std:
            alive = torch.zeros_like(batch.truncated)
            for group in batch.group.unique():
                rows = batch.group == group
                alive[rows] = (credit[rows] != 0).any()
            mask = mask & alive[:, None]
        if self.overlong == "mask":
            mask = mask & ~batch.truncated[:, None]
        return replace(batch, credit=credit, response_mask=mask)

    def reward_penalty(self, batch: TrainBatch) -> Tensor | None:
        """[B], what is taken off the reward before the advantage, or None."""
        penalty = None
        if self.kl > 0 and self.kl_in == "reward":
            assert batch.old_logprobs is not None and batch.ref_logprobs is not None  # needs
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

    @property
    def token_loss(self) -> TokenLoss:
        return TokenLoss(
            surrogate=self.surrogate,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            log_ratio_cap=self.log_ratio_cap,
            ratio_level=self.ratio_level,
            entropy=self.entropy,
            kl=self.kl if self.kl_in == "loss" else 0.0,
            kl_type=self.kl_type,
        )

    def weights(self, batch: TrainBatch) -> TokenWeights:
        correction = None if self.is_correction == "none" else self.sampler_weight(batch)
        return TokenWeights(batch.credit[:, None], self.row_weight(batch), correction)

    @property
    def fuses(self) -> bool:
        # a correction weighs the policy loss alone, and one of zero must not hide the token from the metrics
        loss = self.token_loss
        alone = self.is_correction == "tis" and loss.entropy == 0 and loss.kl == 0
        return super().fuses and (self.is_correction == "none" or alone)

    def sampler_weight(self, batch: TrainBatch) -> Tensor:
        """[B, S] or [B, 1], how much likelier the trainer's old policy found what the engine sampled; 0 if refused."""
        assert batch.old_logprobs is not None  # needs
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
