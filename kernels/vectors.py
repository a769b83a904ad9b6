"""Losses of log-probabilities, one launch each: the kernels of `policy_loss` and `apo_loss`.

policy_loss: 16 bytes are read and 4 written per token, 4 more with a reference; sums for metrics are a row per program.
apo_loss: a program per completion; 9 bytes are read per token, the mask once more, and 4 written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels.jit import jit
from fastrl.kernels.policy_loss import STATS, TokenLoss

BLOCK_N = 1024
NUM_STATS = len(STATS)
NO_DUAL_CLIP = 1e30  # finite: 0 * inf is NaN


@jit
def policy_loss_kernel(
    logprobs_ptr,
    old_ptr,
    ref_ptr,
    advantage_ptr,
    w_ptr,
    coef_ptr,
    partials_ptr,
    N,
    kl_coef,
    low_edge,
    high_edge,
    dual_clip,
    cap,
    kl_cap,
    CISPO: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    K1: tl.constexpr,
    K3: tl.constexpr,
    K3_GRADIENT: tl.constexpr,
    NUM_STATS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
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
    if CISPO:
        coef = -advantage * clipped
        loss = coef * logp
    else:
        low = low & (advantage < 0)
        high = high & (advantage > 0)
        loss = tl.maximum(-advantage * ratio, -advantage * clipped)
        bounded = (advantage < 0) & (loss > -advantage * dual_clip)
        loss = tl.where(bounded, -advantage * dual_clip, loss)
        coef = tl.where(low | high | bounded | capped, 0.0, -advantage * ratio)
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
    tl.store(row_ptr + 1, tl.sum(-x, 0))
    tl.store(row_ptr + 2, tl.sum(kl, 0))
    tl.store(row_ptr + 3, tl.sum(low.to(tl.float32), 0))
    tl.store(row_ptr + 4, tl.sum(high.to(tl.float32), 0))
    tl.store(row_ptr + 5, tl.sum(capped.to(tl.float32), 0))
    tl.store(row_ptr + 6, tl.sum((alive & (used == 0)).to(tl.float32), 0))


def policy_loss_tokens(
    loss: TokenLoss,
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantage: Tensor,
    w: Tensor,
    ref_logprobs: Tensor | None,
    coef: Tensor,
    kl_cap: float,
) -> Tensor:
    """float32 [N], N > 0 -> coef [N] in place, and a row of sums per program, float32 [programs, NUM_STATS]."""
    programs = triton.cdiv(len(logprobs), BLOCK_N)
    partials = torch.empty(programs, NUM_STATS, dtype=torch.float32, device=logprobs.device)
    policy_loss_kernel[(programs,)](
        logprobs,
        old_logprobs,
        ref_logprobs,
        advantage,
        w,
        coef,
        partials,
        len(logprobs),
        loss.kl,
        1 - loss.clip_low,
        1 + loss.clip_high,
        NO_DUAL_CLIP if loss.dual_clip is None else loss.dual_clip,
        loss.log_ratio_cap,
        kl_cap,
        CISPO=loss.surrogate == "cispo",
        HAS_OLD=old_logprobs is not None,
        HAS_REF=ref_logprobs is not None,
        K1=loss.kl_type == "k1",
        K3=loss.kl_type in ("k3", "k3+"),
        K3_GRADIENT=loss.kl_type == "k3",
        NUM_STATS=NUM_STATS,
        BLOCK_N=BLOCK_N,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return partials


@jit
def apo_loss_kernel(
    logprobs_ptr,
    ref_ptr,
    mask_ptr,
    target_ptr,
    loss_ptr,
    residual_ptr,
    u_ptr,
    coef_ptr,
    beta2,
    S,
    BLOCK_N: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    first = b * S
    # a sum per lane, and a tree over lanes at the end: a running float32 sum drifts over thousands of tokens
    lanes = tl.zeros([BLOCK_N], tl.float32)
    tokens = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, S, BLOCK_N):
        s = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        inside = tl.load(mask_ptr + first + s, mask=s < S, other=0) != 0
        logp = tl.load(logprobs_ptr + first + s, mask=inside, other=0.0)
        lanes += logp - tl.load(ref_ptr + first + s, mask=inside, other=0.0)
        tokens += inside.to(tl.int32)
    u = tl.sum(lanes, 0)
    residual = tl.where(tl.sum(tokens, 0) != 0, beta2 * u - tl.load(target_ptr + b), 0.0)
    tl.store(u_ptr + b, u)
    tl.store(residual_ptr + b, residual)
    tl.store(loss_ptr + b, residual * residual)
    for start in range(0, S, BLOCK_N):
        s = start + tl.arange(0, BLOCK_N)
        inside = tl.load(mask_ptr + first + s, mask=s < S, other=0) != 0
        tl.store(coef_ptr + first + s, tl.where(inside, 2 * beta2 * residual, 0.0), mask=s < S)


def apo_loss_completions(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    target: Tensor,
    beta2: float,
    loss: Tensor,
    residual: Tensor,
    u: Tensor,
    coef: Tensor,
) -> None:
    """Rows [B, S], B and S > 0, targets [B] -> loss, residual, u [B] and coef [B, S] in place."""
    apo_loss_kernel[(len(target),)](
        logprobs,
        ref_logprobs,
        mask.view(torch.uint8),
        target,
        loss,
        residual,
        u,
        coef,
        beta2,
        logprobs.shape[1],
        BLOCK_N=BLOCK_N,
        num_warps=4,
        enable_fp_fusion=True,
    )
