"""Losses over vectors of tokens, one launch each: the kernels of `policy_loss` and `apo_loss`.

policy_loss: 16 bytes are read and 4 written per token, 4 more with a reference; sums for metrics are a row per program.
apo_loss: a program per completion; 8 bytes are read per token, and 4 written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels.policy_loss import STATS

BLOCK_N = 1024
NUM_STATS = len(STATS)
NO_DUAL_CLIP = 1e30  # finite: 0 * inf is NaN


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


def policy_loss_tokens(
    logprobs: Tensor, old_logprobs: Tensor | None, advantage: Tensor, w: Tensor, coef: Tensor, *,
    ref_logprobs: Tensor | None, kl_coef: float, kl_estimator: str, mode: str, epsilon: tuple[float, float],
    dual_clip: float | None, log_ratio_cap: float, kl_cap: float,
) -> Tensor:  # fmt: skip
    """float32 [N], N > 0 -> coef [N] in place, and a row of sums per program, float32 [programs, NUM_STATS]."""
    programs = triton.cdiv(len(logprobs), BLOCK_N)
    partials = torch.empty(programs, NUM_STATS, dtype=torch.float32, device=logprobs.device)
    policy_loss_kernel[(programs,)](
        logprobs, old_logprobs, ref_logprobs, advantage, w, coef, partials, len(logprobs), kl_coef, 1 - epsilon[0],
        1 + epsilon[1], NO_DUAL_CLIP if dual_clip is None else dual_clip, log_ratio_cap, kl_cap, CLIP=mode == "clip",
        CISPO=mode == "cispo", HAS_OLD=old_logprobs is not None, HAS_REF=ref_logprobs is not None,
        K1=kl_estimator == "k1", K3=kl_estimator in ("k3", "k3+"), K3_GRADIENT=kl_estimator == "k3",
        NUM_STATS=NUM_STATS, BLOCK_N=BLOCK_N, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return partials


@triton.jit
def apo_loss_kernel(
    logprobs_ptr, ref_ptr, cu_seqlens_ptr, value_ptr, reward_ptr, w_ptr, loss_ptr, coef_ptr, u_ptr, beta2,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + b + 1).to(tl.int64)
    # a sum per lane, and a tree over lanes at the end: a running float32 sum drifts over thousands of tokens
    lanes = tl.zeros([BLOCK_N], tl.float32)
    for first in range(start, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        logp = tl.load(logprobs_ptr + n, mask=n < end, other=0.0)
        lanes += logp - tl.load(ref_ptr + n, mask=n < end, other=0.0)
    u = tl.sum(lanes, 0)
    w = tl.load(w_ptr + b)
    residual = beta2 * u + tl.load(value_ptr + b) - tl.load(reward_ptr + b)
    weighted = tl.where(w != 0, w * residual, 0.0)  # a completion of weight 0 may hold anything
    tl.store(loss_ptr + b, tl.where(w != 0, weighted * residual, 0.0))
    tl.store(u_ptr + b, u)
    for first in range(start, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        tl.store(coef_ptr + n, tl.zeros([BLOCK_N], tl.float32) + 2 * beta2 * weighted, mask=n < end)


def apo_loss_completions(
    logprobs: Tensor, ref_logprobs: Tensor, cu_seqlens: Tensor, optimal_value: Tensor, reward: Tensor, w_seq: Tensor,
    beta2: float, loss: Tensor, coef: Tensor, u: Tensor,
) -> None:  # fmt: skip
    """Completions [B], B > 0, their tokens [N] -> loss [B], coef [N], u [B] in place."""
    apo_loss_kernel[(len(reward),)](
        logprobs, ref_logprobs, cu_seqlens, optimal_value, reward, w_seq, loss, coef, u, beta2, BLOCK_N=BLOCK_N,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
