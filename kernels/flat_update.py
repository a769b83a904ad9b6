"""The Triton twin of csrc/flat_update.cu, for a GPU without the CUDA library: same arithmetic, one program per 1024.

    theta <- anchor + alpha scale (theta - anchor),   scale = 1 or as `fastrl.weights.moves.extrapolate_` says

Statistics are rows of a partial sum per program, to be added up in float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels.jit import jit

BLOCK = 1024  # elements of a program; a tensor starts at a multiple of it, so a program has one threshold
NUM_STATS = 9  # fastrl.weights.moves.FlatStats.NAMES


@jit
def direction(start, step, lr, weight_decay):
    return tl.where(lr == 0, 0.0, -(step + lr * weight_decay * start) / tl.where(lr == 0, 1.0, lr))


@jit
def flat_update_kernel(
    theta_ptr,
    low_ptr,
    anchor_ptr,
    x0_ptr,
    x1_ptr,
    out_bf16_ptr,
    threshold_ptr,
    segment_ptr,
    partials_ptr,
    n,
    lookahead,
    alpha,
    lr,
    weight_decay,
    ratio_min,
    ratio_max,
    scale_max,
    EXTRAPOLATE: tl.constexpr,
    GRADIENTS: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_BF16: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    NUM_STATS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside_n = i < n
    if HAS_LOW:
        high = tl.load(theta_ptr + i, mask=inside_n, other=0).to(tl.int32)
        low = tl.load(low_ptr + i, mask=inside_n, other=0).to(tl.int32)
        theta = ((high << 16) + low).to(tl.float32, bitcast=True)
    else:
        theta = tl.load(theta_ptr + i, mask=inside_n, other=0.0)
    start = tl.load(anchor_ptr + i, mask=inside_n, other=0.0)
    row_ptr = partials_ptr + program * NUM_STATS
    before = theta - start
    weight = alpha + tl.zeros([BLOCK], tl.float32)
    if EXTRAPOLATE:
        x0 = tl.load(x0_ptr + i, mask=inside_n, other=0.0)
        if GRADIENTS:
            first = x0
            second = tl.load(x1_ptr + i, mask=inside_n, other=0.0)
        else:
            theta_1 = start + x0
            first = direction(start, x0, lr, weight_decay)
            second = direction(theta_1, theta - theta_1, lr, weight_decay)
        least = 1e-8
        if HAS_THRESHOLD:
            least = tl.load(threshold_ptr + tl.load(segment_ptr + program))
        finite = (tl.abs(first) < float("inf")) & (tl.abs(second) < float("inf"))  # false for NaN too
        active = inside_n & finite & (tl.abs(first) > least)
        r = tl.where(active, second, 1.0) / tl.where(active, first, 1.0)
        clamped = tl.minimum(tl.maximum(r, ratio_min), ratio_max)
        active = active & (tl.abs(clamped + 1) > 1e-8)
        total = tl.full([BLOCK], 1.0, tl.float32)
        for _ in range(1, lookahead):  # Horner's rule: the closed form is 0 / 0 near r = 1
            total = total * clamped + 1
        total = total / tl.where(active, 1 + clamped, 1.0)
        scale = tl.where(active, tl.minimum(tl.maximum(total, 1.0), scale_max), 1.0)
        weight = alpha * scale
        ratio = tl.where(active, clamped, 0.0)
        tl.store(row_ptr + 3, tl.sum(active.to(tl.float32), 0))
        tl.store(row_ptr + 4, tl.sum(ratio, 0))
        tl.store(row_ptr + 5, tl.sum(ratio * ratio, 0))
        tl.store(row_ptr + 6, tl.sum(tl.where(inside_n, scale, 0.0), 0))
        tl.store(row_ptr + 7, tl.sum((active & (clamped != r)).to(tl.float32), 0))
        tl.store(row_ptr + 8, tl.sum((inside_n & (finite == 0)).to(tl.float32), 0))
    # two forms, as torch.lerp has it: one alone is an ulp or two off at weight 1
    moved = tl.where(tl.abs(weight) < 0.5, start + weight * before, theta - before * (1 - weight))
    # the ends themselves, whatever the other is: 0 * inf is NaN, and -0 + 0 is 0
    moved = tl.where(weight == 0, start, tl.where(weight == 1, theta, moved))
    after = moved - start
    if HAS_LOW:
        bits = moved.to(tl.int32, bitcast=True)
        # NaN without its payload: the quiet one of its sign
        bits = tl.where(moved != moved, ((bits >> 31) << 31) | 0x7FC00000, bits)
        tl.store(theta_ptr + i, ((bits + 0x8000) >> 16).to(tl.int16), mask=inside_n)
        tl.store(low_ptr + i, bits.to(tl.int16), mask=inside_n)
    else:
        tl.store(theta_ptr + i, moved, mask=inside_n)
    if HAS_BF16:
        tl.store(out_bf16_ptr + i, moved.to(tl.bfloat16), mask=inside_n)
    tl.store(row_ptr + 0, tl.sum(inside_n.to(tl.float32), 0))
    tl.store(row_ptr + 1, tl.sum(before * before, 0))
    tl.store(row_ptr + 2, tl.sum(after * after, 0))


def flat_update(
    theta: Tensor,
    anchor: Tensor,
    alpha: float,
    *,
    x0: Tensor | None = None,
    x1: Tensor | None = None,
    lookahead: int = 2,
    lr: float = 0.0,
    weight_decay: float = 0.0,
    ratio_min: float = -2.0,
    ratio_max: float = 3.0,
    scale_max: float = 1.0,
    threshold: Tensor | None = None,
    segment: Tensor | None = None,
    low: Tensor | None = None,
    out_bf16: Tensor | None = None,
) -> Tensor:
    """float32 shards [n] -> theta in place, and the sums of FlatStats, float64 [9]. `moves.py` has checked them.

    x0 None: interpolation. x0, x1: gradients of two steps; x0 alone: the first displacement. With low, int16 [n], theta
    is bfloat16 [n]: the halves of `fastrl.weights.halves`.
    """
    programs = triton.cdiv(len(theta), BLOCK)
    partials = torch.zeros(programs, NUM_STATS, dtype=torch.float32, device=theta.device)
    if programs:
        # bits of the upper half, not its value: a cast of Triton's may round otherwise, and its interpreter cuts off
        master = theta if low is None else theta.view(torch.int16)
        flat_update_kernel[(programs,)](
            master,
            low,
            anchor,
            x0,
            x1,
            out_bf16,
            threshold,
            segment,
            partials,
            len(theta),
            lookahead,
            alpha,
            lr,
            weight_decay,
            ratio_min,
            ratio_max,
            scale_max,
            EXTRAPOLATE=x0 is not None,
            GRADIENTS=x1 is not None,
            HAS_LOW=low is not None,
            HAS_BF16=out_bf16 is not None,
            HAS_THRESHOLD=threshold is not None,
            NUM_STATS=NUM_STATS,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return partials.double().sum(dim=0)
