"""Loss of single tokens: what it is (`TokenLoss`), its definition, and its gradient in one launch on CUDA.

    x     = logprob - old_logprob,   ratio = exp(clamp(x, -cap, cap));   no gradient through the ratio where |x| > cap
    clip    max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)),   for A < 0 at most -A dual_clip
    cispo   -A clip(ratio) logprob, with no gradient through the ratio
    loss  = sum_n w (the above + kl KL(logprob - ref_logprob) - entropy H),   coef = d loss / d logprob

w is the response mask over the one global denominator, so nothing is left to divide. Tokens of w = 0 are not looked at:
whatever they hold, they give zero. So do tokens of which something is not finite, and they are counted; only an
old_logprob of -inf is a ratio beyond the cap. The entropy is a matter of the head, `linear_policy_loss`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

KL_CAP = 20.0  # exp(20) is finite, exp of a broken reference is not
STATS = ("loss", "policy_kl", "kl", "clip_low", "clip_high", "capped", "nonfinite")

Surrogate = Literal["clip", "cispo"]
KlEstimator = Literal["k1", "k2", "k3", "k3+"]


def clip(x: Tensor, low: float, high: float) -> Tensor:
    """x within [low, high]; the gradient is 1 there, bounds included. That of torch.clamp is 0 at them since 2.15."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """A clipped policy gradient of single tokens, with a KL and an entropy term: GRPO's and PPO's, and relatives.

    Example: TokenLoss(clip_high=0.28) is DAPO's; TokenLoss(surrogate="cispo", clip_low=10) that of CISPO.
    """

    surrogate: Surrogate = "clip"
    clip_low: float = 0.2  # ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2
    dual_clip: float | None = 3.0  # largest ratio that counts against a bad token; None = no limit
    log_ratio_cap: float = 20.0  # nats
    ratio_level: Literal["token", "sequence"] = "token"  # sequence: the mean of the completion's log-ratios for each
    kl: float = 0.0  # coefficient of the KL to the reference
    kl_type: KlEstimator = "k3"
    entropy: float = 0.0  # coefficient of the entropy bonus

    def __post_init__(self):
        for name, allowed in {"surrogate": ("clip", "cispo"), "kl_type": ("k1", "k2", "k3", "k3+")}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"TokenLoss: {name} must be {', '.join(allowed)}, got {getattr(self, name)!r}")

    def policy(self, log_ratio: Tensor, logprobs: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log_ratio [...] nats, logprobs, advantage that broadcast to it -> policy loss [...], where clipped low, high.

        The definition. Differentiable in log_ratio (clip) or logprobs (cispo).
        """
        cap, low_edge, high_edge = self.log_ratio_cap, 1 - self.clip_low, 1 + self.clip_high
        if self.surrogate == "cispo":
            ratio = log_ratio.detach().clamp(-cap, cap).exp()
            return -advantage * ratio.clamp(low_edge, high_edge) * logprobs, ratio < low_edge, ratio > high_edge
        ratio = clip(log_ratio, -cap, cap).exp()
        clipped = clip(ratio, low_edge, high_edge)
        loss = torch.maximum(-advantage * ratio, -advantage * clipped)
        if self.dual_clip is not None:
            loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * self.dual_clip), loss)
        return loss, (ratio < clipped) & (advantage < 0), (ratio > clipped) & (advantage > 0)

    def metrics(self, sums: dict[str, Tensor], *, has_reference: bool) -> dict[str, Tensor]:
        """Sums by the names of STATS -> by the names of the log."""
        kl = {"kl": sums["kl"]} if has_reference else {}
        return {
            "policy_kl": sums["policy_kl"],
            "clip_ratio/low_mean": sums["clip_low"],
            "clip_ratio/high_mean": sums["clip_high"],
            "clip_ratio/region_mean": sums["clip_low"] + sums["clip_high"],
            "log_ratio_capped_frac": sums["capped"],
            **kl,
        }


class PolicyLoss(NamedTuple):
    """coef [N]; loss [], the sum; stats [len(STATS)]: loss and others summed over tokens."""

    coef: Tensor
    loss: Tensor
    stats: Tensor

    def named(self) -> dict[str, Tensor]:
        return dict(zip(STATS, self.stats, strict=True))


def kl_estimate(log_ratio: Tensor, kind: KlEstimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) from log_ratio = logprobs - ref_logprobs, for tokens of the policy.

    k1 = x; k2 = x^2 / 2; k3 = exp(-x) - 1 + x, never negative; k3+ has k3's value and k2's gradient, which is that of
    KL(policy || reference). As a loss, k1 has expected gradient zero and k3 that of KL(reference || policy).
    """
    # an infinite log-probability is no number to clamp, and the guard must see it
    x = torch.where(log_ratio.isfinite(), clip(log_ratio, -KL_CAP, KL_CAP), torch.nan)
    if kind == "k1":
        return x
    k2 = x.square() / 2
    if kind == "k2":
        return k2
    k3 = torch.expm1(-x) + x  # expm1: exp(-x) - 1 + x goes negative near 0 in float32
    return k3 if kind == "k3" else k2 + (k3 - k2).detach()


def policy_loss_ref(
    loss: TokenLoss,
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantage: Tensor,
    w: Tensor,
    ref_logprobs: Tensor | None = None,
) -> PolicyLoss:
    """The definition on vectors, by autograd, in at least float32 (float64 stays float64)."""
    alive = w != 0
    old_logprobs = logprobs if old_logprobs is None else old_logprobs
    size = logprobs.abs() + advantage.abs() + (0 if ref_logprobs is None else ref_logprobs.abs())
    used = alive & size.isfinite() & ~old_logprobs.isnan()

    def living(x: Tensor) -> Tensor:
        return torch.where(used, x.to(torch.promote_types(x.dtype, torch.float32)), 0.0)

    advantage, w = living(advantage), living(w)
    with torch.enable_grad():
        logp = living(logprobs.detach()).requires_grad_()
        x = logp - living(old_logprobs.detach())
        token, low, high = loss.policy(x, logp, advantage)
        kl = torch.zeros_like(logp)
        if ref_logprobs is not None:
            kl = kl_estimate(logp - living(ref_logprobs), loss.kl_type)
        total = (w * (token + loss.kl * kl)).sum()
        (coef,) = torch.autograd.grad(total, logp)
    capped = x.abs() > loss.log_ratio_cap
    sums = (total, -x, kl, low & used, high & used, capped, alive & ~used)
    stats = torch.stack([x.detach().to(logp.dtype).sum() for x in sums])
    return PolicyLoss(coef, stats[0], stats)


def policy_loss(
    loss: TokenLoss,
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantage: Tensor,
    w: Tensor,
    ref_logprobs: Tensor | None = None,
    *,
    triton: bool | None = None,
) -> PolicyLoss:
    """Vectors [N] float32, contiguous, on one device -> coef [N], loss [] and stats; nats.

    old_logprobs None: on-policy, ratio 1. Nothing is differentiable: coef is the gradient. triton: whether to launch
    the kernel; None = on CUDA. Raises ValueError on other shapes or dtypes, and on a ratio of whole sequences.
    """
    vectors = dict(logprobs=logprobs, old_logprobs=old_logprobs, advantage=advantage, w=w, ref_logprobs=ref_logprobs)
    check_vectors("policy_loss", vectors)
    if loss.ratio_level != "token":
        raise ValueError("policy_loss: the ratio of a sequence is not known here; use ratio_level='token'")
    if not (logprobs.is_cuda if triton is None else triton) or len(logprobs) == 0:
        return policy_loss_ref(loss, logprobs, old_logprobs, advantage, w, ref_logprobs)
    from fastrl.kernels.vectors import policy_loss_tokens

    coef = torch.empty_like(logprobs)
    partials = policy_loss_tokens(loss, logprobs, old_logprobs, advantage, w, ref_logprobs, coef=coef, kl_cap=KL_CAP)
    stats = partials.sum(dim=0)
    return PolicyLoss(coef, stats[0], stats)


def check_vectors(operation: str, vectors: dict[str, Tensor | None]) -> None:
    """Raise ValueError unless all that are given are contiguous float32 [N] of the first one's length and device."""
    (first, head), *_ = vectors.items()
    assert head is not None, first
    for name, x in vectors.items():
        if x is None:
            continue
        if x.ndim != 1 or x.shape != head.shape or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(
                f"{operation}: {name} must be a contiguous float32 vector as long as {first}, [{head.numel()}], "
                f"got {x.dtype} {tuple(x.shape)}" + ("" if x.is_contiguous() else ", strided")
            )
        if x.device != head.device:
            raise ValueError(f"{operation}: {name} is on {x.device} and {first} on {head.device}")
