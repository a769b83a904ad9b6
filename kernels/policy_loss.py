"""Loss of single tokens and its gradient in their log-probabilities, in one launch.

    x     = logprob - old_logprob,   ratio = exp(clamp(x, -cap, cap));   no gradient through the ratio where |x| > cap
    clip    max(-A ratio, -A clip(ratio, 1 - low, 1 + high)),   for A < 0 at most -A dual_clip
    cispo   -A clip(ratio) logprob, with no gradient through the ratio
    pg      -A logprob
    loss  = sum_n w (the above + kl_coef kl(logprob - ref_logprob)),   coef = d loss / d logprob

w is the response mask over the one global denominator, so nothing is left to divide. Tokens of w = 0 are not looked at:
whatever they hold, they give zero. So do tokens of which something is not finite, and they are counted; only an
old_logprob of -inf is a ratio beyond the cap. 16 bytes are read and 4 written per token, 4 more with a reference.
"""

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 1024
KL_CAP = 20.0  # exp(20) is finite, exp of a broken reference is not
NO_DUAL_CLIP = 1e30  # finite: 0 * inf is NaN
STATS = (
    "loss", "tokens", "logprob", "policy_kl", "kl", "clip_low", "clip_high", "capped", "nonfinite", "ratio", "ratio_sq",
    "log_ratio_max",
)  # fmt: skip

Mode = Literal["clip", "cispo", "pg"]
KlEstimator = Literal["k1", "k2", "k3", "k3+"]


class PolicyLoss(NamedTuple):
    """coef [N] float32; stats [len(STATS)] float32: sums over tokens, the last one a maximum."""

    coef: Tensor
    stats: Tensor


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
    return PolicyLoss(coef, torch.stack([sums[name].detach().to(logp.dtype).sum() for name in STATS]))


@triton.jit
def policy_loss_kernel(
    logprobs_ptr, old_ptr, ref_ptr, advantage_ptr, w_ptr, coef_ptr, partials_ptr, N, kl_coef, low_edge, high_edge,
    dual_clip, cap, kl_cap, CLIP: tl.constexpr, CISPO: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    K1: tl.constexpr, K3: tl.constexpr, K3_GRADIENT: tl.constexpr, NUM_STATS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    n = program * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    w = tl.load(w_ptr + n, mask=n < N, other=0.0)
    alive = w != 0  # every other load is masked by it, so what such a token holds is never seen
    logp = tl.load(logprobs_ptr + n, mask=alive, other=0.0)
    advantage = tl.load(advantage_ptr + n, mask=alive, other=0.0)
    used = alive & (tl.abs(logp) + tl.abs(advantage) < float("inf"))  # false for NaN too
    x = tl.zeros_like(logp)
    if HAS_OLD:
        old = tl.load(old_ptr + n, mask=alive, other=0.0)
        used = used & (old == old)
        x = tl.where(used, logp - old, 0.0)
    d = tl.zeros_like(logp)
    if HAS_REF:
        d = logp - tl.load(ref_ptr + n, mask=alive, other=0.0)
        used = used & (tl.abs(d) < float("inf"))
        x = tl.where(used, x, 0.0)
        d = tl.where(used, d, 0.0)
    logp = tl.where(used, logp, 0.0)
    advantage = tl.where(used, advantage, 0.0)
    ratio = tl.exp(tl.minimum(tl.maximum(x, -cap), cap))
    clipped = tl.minimum(tl.maximum(ratio, low_edge), high_edge)
    low = used & (ratio < low_edge)
    high = used & (ratio > high_edge)
    capped = tl.abs(x) > cap
    if CLIP:
        low = low & (advantage < 0)
        high = high & (advantage > 0)
        loss = tl.maximum(-advantage * ratio, -advantage * clipped)
        bounded = (advantage < 0) & (loss > -advantage * dual_clip)
        loss = tl.where(bounded, -advantage * dual_clip, loss)
        coef = tl.where(low | high | bounded | capped, 0.0, -advantage * ratio)
    elif CISPO:
        coef = -advantage * clipped
        loss = coef * logp
    else:
        coef = -advantage
        loss = coef * logp
    kl = tl.zeros_like(logp)
    if HAS_REF:
        inside = tl.abs(d) <= kl_cap
        d = tl.minimum(tl.maximum(d, -kl_cap), kl_cap)
        if K1:
            kl = d
            slope = tl.full([BLOCK_N], 1.0, tl.float32)
        else:
            # exp(-d) - 1 + d cancels near 0 and would go negative: there its series, d^2/2 - d^3/6 + d^4/24
            series = d * d * (0.5 - d * (1.0 / 6 - d * (1.0 / 24 - d * (1.0 / 120))))
            k3 = tl.where(tl.abs(d) < 0.1, series, tl.exp(-d) - 1 + d)
            kl = k3 if K3 else d * d * 0.5
            slope = d - k3 if K3_GRADIENT else d  # 1 - exp(-d) = d - k3
        loss += kl_coef * kl
        coef += tl.where(inside, kl_coef * slope, 0.0)
    total = tl.where(used, w * loss, 0.0)
    tl.store(coef_ptr + n, tl.where(used, w * coef, 0.0), mask=n < N)
    row_ptr = partials_ptr + program * NUM_STATS
    tl.store(row_ptr + 0, tl.sum(total, 0))
    tl.store(row_ptr + 1, tl.sum(alive.to(tl.float32), 0))
    tl.store(row_ptr + 2, tl.sum(logp, 0))
    tl.store(row_ptr + 3, tl.sum(-x, 0))
    tl.store(row_ptr + 4, tl.sum(kl, 0))
    tl.store(row_ptr + 5, tl.sum(low.to(tl.float32), 0))
    tl.store(row_ptr + 6, tl.sum(high.to(tl.float32), 0))
    tl.store(row_ptr + 7, tl.sum(capped.to(tl.float32), 0))
    tl.store(row_ptr + 8, tl.sum((alive & (used == 0)).to(tl.float32), 0))
    tl.store(row_ptr + 9, tl.sum(tl.where(used, ratio, 0.0), 0))
    tl.store(row_ptr + 10, tl.sum(tl.where(used, ratio * ratio, 0.0), 0))
    tl.store(row_ptr + 11, tl.max(tl.abs(x), 0))


def reduced(partials: Tensor) -> Tensor:
    """[programs, len(STATS)] -> [len(STATS)]: sums, and the largest of the last column; zeros without a program."""
    if len(partials) == 0:
        return partials.new_zeros(len(STATS))
    return torch.cat([partials[:, :-1].sum(dim=0), partials[:, -1:].amax(dim=0)])


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor | None, advantage: Tensor, w: Tensor, *, ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0, kl_estimator: KlEstimator = "k3", mode: Mode = "clip",
    epsilon: tuple[float, float] = (0.2, 0.2), dual_clip: float | None = 3.0, log_ratio_cap: float = 20.0,
    out: Tensor | None = None,
) -> PolicyLoss:  # fmt: skip
    """Vectors [N] float32, contiguous, on one device -> coef [N] and stats; nats.

    old_logprobs None: on-policy, ratio 1. out [N]: receives coef. Nothing is differentiable: coef is the gradient.
    Raises ValueError on other shapes or dtypes.
    """
    vectors = dict(logprobs=logprobs, old_logprobs=old_logprobs, advantage=advantage, w=w, ref_logprobs=ref_logprobs,
                   out=out)  # fmt: skip
    check_vectors("policy_loss", vectors)
    if mode not in ("clip", "cispo", "pg"):
        raise ValueError(f"policy_loss: mode must be clip, cispo or pg, got {mode!r}")
    if kl_estimator not in ("k1", "k2", "k3", "k3+"):
        raise ValueError(f"policy_loss: kl_estimator must be k1, k2, k3 or k3+, got {kl_estimator!r}")
    N = len(logprobs)
    coef = torch.empty_like(logprobs) if out is None else out
    programs = triton.cdiv(N, BLOCK_N)
    partials = torch.empty(programs, len(STATS), dtype=torch.float32, device=logprobs.device)
    if N:
        policy_loss_kernel[(programs,)](
            logprobs, old_logprobs, ref_logprobs, advantage, w, coef, partials, N, kl_coef, 1 - epsilon[0],
            1 + epsilon[1], NO_DUAL_CLIP if dual_clip is None else dual_clip, log_ratio_cap, KL_CAP,
            CLIP=mode == "clip", CISPO=mode == "cispo", HAS_OLD=old_logprobs is not None,
            HAS_REF=ref_logprobs is not None, K1=kl_estimator == "k1", K3=kl_estimator in ("k3", "k3+"),
            K3_GRADIENT=kl_estimator == "k3", NUM_STATS=len(STATS), BLOCK_N=BLOCK_N, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return PolicyLoss(coef, reduced(partials))


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
