"""Loss of single tokens and its gradient in their log-probabilities; on CUDA in one launch (`vectors.py`).

    x     = logprob - old_logprob,   ratio = exp(clamp(x, -cap, cap));   no gradient through the ratio where |x| > cap
    clip    max(-A ratio, -A clip(ratio, 1 - low, 1 + high)),   for A < 0 at most -A dual_clip
    cispo   -A clip(ratio) logprob, with no gradient through the ratio
    pg      -A logprob
    loss  = sum_n w (the above + kl_coef kl(logprob - ref_logprob)),   coef = d loss / d logprob

w is the response mask over the one global denominator, so nothing is left to divide. Tokens of w = 0 are not looked at:
whatever they hold, they give zero. So do tokens of which something is not finite, and they are counted; only an
old_logprob of -inf is a ratio beyond the cap.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

KL_CAP = 20.0  # exp(20) is finite, exp of a broken reference is not
STATS = (
    "loss", "tokens", "logprob", "policy_kl", "kl", "clip_low", "clip_high", "capped", "nonfinite", "ratio", "ratio_sq",
    "log_ratio_max",
)  # fmt: skip

Mode = Literal["clip", "cispo", "pg"]
KlEstimator = Literal["k1", "k2", "k3", "k3+"]


class PolicyLoss(NamedTuple):
    """coef [N]; loss [], the sum; stats [len(STATS)]: loss and others summed over tokens, the last one a maximum."""

    coef: Tensor
    loss: Tensor
    stats: Tensor

    def named(self) -> dict[str, Tensor]:
        return dict(zip(STATS, self.stats, strict=True))


def kl_ref(x: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimate of KL(policy || reference) from x = logprob - ref_logprob; k3+ has k3's value and k2's gradient."""
    x = x.clamp(-KL_CAP, KL_CAP)
    k2, k3 = x.square() / 2, torch.expm1(-x) + x
    return {"k1": x, "k2": k2, "k3": k3, "k3+": k2 + (k3 - k2).detach()}[estimator]


def policy_loss_ref(
    logprobs: Tensor, old_logprobs: Tensor | None, advantage: Tensor, w: Tensor, *, ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0, kl_estimator: KlEstimator = "k3", mode: Mode = "clip",
    epsilon: tuple[float, float] = (0.2, 0.2), dual_clip: float | None = 3.0, log_ratio_cap: float = 20.0,
) -> PolicyLoss:  # fmt: skip
    """The definition, by autograd, in at least float32 (float64 stays float64)."""
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
        ratio = x.clamp(-log_ratio_cap, log_ratio_cap).exp()
        clipped = ratio.clamp(1 - epsilon[0], 1 + epsilon[1])
        low, high = ratio < 1 - epsilon[0], ratio > 1 + epsilon[1]
        if mode == "clip":
            loss = torch.maximum(-advantage * ratio, -advantage * clipped)
            if dual_clip is not None:
                loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * dual_clip), loss)
            low, high = low & (advantage < 0), high & (advantage > 0)
        elif mode == "cispo":
            loss = -advantage * clipped.detach() * logp
        else:
            loss = -advantage * logp
        kl = torch.zeros_like(logp)
        if ref_logprobs is not None:
            kl = kl_ref(logp - living(ref_logprobs), kl_estimator)
        total = (w * (loss + kl_coef * kl)).sum()
        (coef,) = torch.autograd.grad(total, logp)
    sums = dict(
        loss=total, tokens=alive, logprob=logp, policy_kl=-x, kl=kl, clip_low=low & used, clip_high=high & used,
        capped=x.abs() > log_ratio_cap, nonfinite=alive & ~used, ratio=ratio * used, ratio_sq=ratio.square() * used,
        log_ratio_max=x.abs().amax() if len(x) else x.new_zeros(()),
    )  # fmt: skip
    stats = torch.stack([sums[name].detach().to(logp.dtype).sum() for name in STATS])
    return PolicyLoss(coef, stats[0], stats)


def add_up(rows: list[Tensor] | Tensor) -> Tensor:
    """Stats of parts [parts, len(STATS)] -> of the whole [len(STATS)]: sums, and the largest of the last column."""
    rows = torch.stack(rows) if isinstance(rows, list) else rows
    return torch.cat([rows[:, :-1].sum(dim=0), rows[:, -1:].amax(dim=0)])


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor | None, advantage: Tensor, w: Tensor, *, ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0, kl_estimator: KlEstimator = "k3", mode: Mode = "clip",
    epsilon: tuple[float, float] = (0.2, 0.2), dual_clip: float | None = 3.0, log_ratio_cap: float = 20.0,
    out: Tensor | None = None, triton: bool | None = None,
) -> PolicyLoss:  # fmt: skip
    """Vectors [N] float32, contiguous, on one device -> coef [N], loss [] and stats; nats.

    old_logprobs None: on-policy, ratio 1. out [N]: receives coef. Nothing is differentiable: coef is the gradient.
    triton: whether to launch the kernel; None = on CUDA. Raises ValueError on other shapes or dtypes.
    """
    vectors = dict(logprobs=logprobs, old_logprobs=old_logprobs, advantage=advantage, w=w, ref_logprobs=ref_logprobs,
                   out=out)  # fmt: skip
    check_vectors("policy_loss", vectors)
    if mode not in ("clip", "cispo", "pg"):
        raise ValueError(f"policy_loss: mode must be clip, cispo or pg, got {mode!r}")
    if kl_estimator not in ("k1", "k2", "k3", "k3+"):
        raise ValueError(f"policy_loss: kl_estimator must be k1, k2, k3 or k3+, got {kl_estimator!r}")
    options = dict(
        ref_logprobs=ref_logprobs, kl_coef=kl_coef, kl_estimator=kl_estimator, mode=mode, epsilon=epsilon,
        dual_clip=dual_clip, log_ratio_cap=log_ratio_cap,
    )  # fmt: skip
    if not (logprobs.is_cuda if triton is None else triton) or len(logprobs) == 0:
        found = policy_loss_ref(logprobs, old_logprobs, advantage, w, **options)
        return found if out is None else found._replace(coef=out.copy_(found.coef))
    from fastrl.kernels.vectors import policy_loss_tokens

    coef = torch.empty_like(logprobs) if out is None else out
    stats = add_up(policy_loss_tokens(logprobs, old_logprobs, advantage, w, coef, kl_cap=KL_CAP, **options))
    return PolicyLoss(coef, stats[0], stats)


def check_vectors(operation: str, vectors: dict[str, Tensor | None]) -> None:
    """Raise ValueError unless all that are given are contiguous float32 [N] of the first one's length and device."""
    (first, head), *_ = vectors.items()
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
