"""A*-PO (arXiv:2505.20686): regress beta2 log(pi / ref) of one completion on its reward minus the optimal value.

    V(x)     = beta1 ln mean_i exp(r_i / beta1)      over N completions of the reference, sampled once, offline
    u        = sum_t (logprobs - ref_logprobs)       the whole completion; no mean, no clip, no old log-probabilities
    loss     = mean over completions of (beta2 u + V(x) - r)^2  -  entropy * token mean of H

At the optimum of max E[r] - beta KL(pi || ref), beta log(pi / ref) = r - V. On-policy the expected gradient is
-2 beta2 grad(E[r] - beta2 KL(pi || ref)) whatever V is. One completion per problem is enough; needs the reference and a
profile of it.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastrl.base.setting import check_bounds, setting
from fastrl.base.types import Problem, TrainBatch
from fastrl.kernels.apo_loss import apo_loss
from fastrl.objectives.base import Objective, masked


@dataclass(frozen=True, kw_only=True)
class APO(Objective):
    """The authors' settings. Their program reads beta1 = 0 as the mean and a missing profile as 0; here value_mode
    says which, and a missing profile is made."""

    # temperature of the optimal value
    beta1: float = setting(0.5, "(0, 1e6]", hint="for the mean or the maximum use --objective.value-mode")
    beta2: float = setting(1e-3, "(0, 1e6]")  # scale of the log-ratio
    value_mode: Literal["lse", "mean", "max", "zero"] = "lse"  # mean and max: the limits of beta1; zero: no profile
    # coefficient of the entropy bonus, inherited in the authors' configuration
    entropy: float = setting(0.001, "[0, 1e6]")

    normalizer = "completion"

    def __post_init__(self):
        check_bounds(self, "objective.")

    @property
    def needs_profile(self) -> bool:
        return self.value_mode != "zero"

    def needs(self, num_minibatches: int) -> frozenset[str]:
        return frozenset({"ref_logprobs"})

    def credit(self, rewards: Tensor, problem: Problem) -> Tensor:
        """rewards [G] -> r - V [G], the target of beta2 u."""
        if self.value_mode == "zero":
            return rewards
        assert problem.profile_rewards is not None, f"{problem.id} has no profile"
        return rewards - optimal_value(problem.profile_rewards, self.beta1, self.value_mode)

    def loss_sum(self, logprobs: Tensor, entropy: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.ref_logprobs is not None  # needs
        mask = batch.response_mask
        regression = apo_loss(logprobs, batch.ref_logprobs, mask, batch.credit, self.beta2)
        # the trainer divides by completions; entropy is a mean over tokens, metrics are means over tokens
        completions_per_token = batch.counts["completion"] / batch.counts["token"]
        token_entropy = masked(entropy, mask).sum()
        loss = regression.loss.sum() - self.entropy * completions_per_token * token_entropy
        return loss, {
            "entropy": token_entropy.detach(),
            "kl": masked(logprobs.detach() - batch.ref_logprobs, mask).sum(),
            "apo/residual": regression.residual.sum() / completions_per_token,
            "apo/residual_abs": regression.residual.abs().sum() / completions_per_token,
            "apo/log_ratio_abs": regression.u.abs().sum() / completions_per_token,
        }


def optimal_value(rewards: Tensor, beta1: float, mode: str = "lse") -> Tensor:
    """rewards [N] of the reference's completions -> V [], at most beta1 ln N below their maximum."""
    if mode == "mean":
        return rewards.mean()
    top = rewards.max()
    if mode == "max":
        return top
    # the largest taken out: exp(1 / beta1) alone overflows float32 below beta1 = 0.0113
    return top + beta1 * ((rewards - top) / beta1).exp().mean().log()
