"""AdamW (arXiv:1711.05101) over float32 weights that are kept in two halves of 16 bits, in one pass.

read    halves 4, gradient 4 (or 2), moments 8 bytes per element
written halves 4, moments 8; the gradient too where it is clipped
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels.jit import jit

BLOCK = 1024  # elements of a program


@jit
def split_adamw_kernel(
    high_ptr,
    low_ptr,
    grad_ptr,
    first_ptr,
    second_ptr,
    n,
    divisor,
    kept,
    weight_1,
    beta_2,
    weight_2,
    step_size,
    root_2,
    eps,
    CLIPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = i < n
    high = tl.load(high_ptr + i, mask=inside, other=0).to(tl.int32)
    low = tl.load(low_ptr + i, mask=inside, other=0).to(tl.int32)
    theta = ((high << 16) + low).to(tl.float32, bitcast=True)
    grad = tl.load(grad_ptr + i, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(first_ptr + i, mask=inside, other=0.0)
    second = tl.load(second_ptr + i, mask=inside, other=0.0)
    if CLIPPED:
        grad = tl.div_rn(grad, divisor)
        tl.store(grad_ptr + i, grad, mask=inside)
    theta = theta * kept
    # two forms, as torch.lerp has it: the gradient itself at weight 1
    change = grad - first
    first = tl.where(weight_1 < 0.5, first + weight_1 * change, grad - (1 - weight_1) * change)
    second = second * beta_2 + weight_2 * grad * grad
    theta = theta - step_size * first / (tl.sqrt_rn(second) / root_2 + eps)
    bits = theta.to(tl.int32, bitcast=True)
    # NaN without its payload: the quiet one of its sign
    bits = tl.where(theta != theta, ((bits >> 31) << 31) | 0x7FC00000, bits)
    tl.store(high_ptr + i, ((bits + 0x8000) >> 16).to(tl.int16), mask=inside)
    tl.store(low_ptr + i, bits.to(tl.int16), mask=inside)
    tl.store(first_ptr + i, first, mask=inside)
    tl.store(second_ptr + i, second, mask=inside)


def split_adamw_(
    high: Tensor,
    low: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    *,
    divisor: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Step number `step` (from 1 on) of halves high [n] bfloat16 and low [n] int16, moments float32 [n], in place.

    grad: float32 [n], divided by `divisor` in place first; or bfloat16 [n] with divisor 1.
    """
    programs = triton.cdiv(len(high), BLOCK)
    if programs:
        split_adamw_kernel[(programs,)](
            high.view(torch.int16),  # bits, not the value
            low,
            grad,
            first,
            second,
            len(high),
            divisor,
            1 - lr * weight_decay,
            1 - betas[0],
            betas[1],
            1 - betas[1],
            lr / (1 - betas[0] ** step),
            (1 - betas[1] ** step) ** 0.5,
            eps,
            CLIPPED=divisor != 1,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
