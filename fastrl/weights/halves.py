"""A float32 vector as bfloat16 weights and the 16 bits that they lack: 4 bytes per element where copies take 6.

    high  bfloat16   float32 rounded to nearest, ties away from zero: what a model runs on
    low   int16      bits32(theta) - (bits16(high) << 16), from -0x8000 to 0x7fff

theta is got back bit for bit, the largest floats too, whose high half is infinite. Ties cannot go to even: a tie is
0x8000 away from both of its neighbours, so each even value would need 0x8000 as well as -0x8000, which is one value
more than 16 bits have. NaN comes back as the quiet NaN of its sign, without its payload.
"""

import torch
from torch import Tensor

QUIET_NAN, SIGN, HALF = 0x7FC00000, -0x80000000, 0x8000


def split(theta: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> high bfloat16, low int16, both of its shape. Raises ValueError on another dtype."""
    if theta.dtype != torch.float32:
        raise ValueError(f"only float32 is split, got {theta.dtype}")
    bits = theta.view(torch.int32)
    bits = torch.where(theta.isnan(), bits & SIGN | QUIET_NAN, bits)
    high = (bits + HALF >> 16).to(torch.int16)
    low = (bits << 16 >> 16).to(torch.int16)
    return high.view(torch.bfloat16), low


def join(high: Tensor, low: Tensor) -> Tensor:
    """What `split` gave -> float32. Raises ValueError on other dtypes, or shapes that differ."""
    if (high.dtype, low.dtype) != (torch.bfloat16, torch.int16) or high.shape != low.shape:
        raise ValueError(
            "the halves must be torch.bfloat16 and torch.int16 of one shape, "
            f"got {high.dtype} {tuple(high.shape)} and {low.dtype} {tuple(low.shape)}"
        )
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)
