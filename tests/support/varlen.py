"""What stand-ins of kernels for rows of their own lengths compute with: PyTorch's SDPA, row by row."""

import torch
from torch import Tensor

Sides = tuple[int | None, int | None]


def by_row(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float | None, sides: Sides) -> Tensor:
    """[M, heads, d]. sides: tokens that are seen to the left and to the right, None for all."""
    out, bounds = [], starts.tolist()
    for a, b in zip(bounds, bounds[1:], strict=False):
        place = torch.arange(b - a, device=q.device)
        far = place[:, None] - place
        seen = torch.ones_like(far, dtype=torch.bool)
        for side, distance in zip(sides, (far, -far), strict=True):
            seen &= True if side is None else distance <= side
        x = (y[a:b].transpose(0, 1)[None] for y in (q, k, v))
        row = torch.nn.functional.scaled_dot_product_attention(
            *x, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        out.append(row[0].transpose(0, 1))
    return torch.cat(out)


def sides(window_size: Sides, causal: bool) -> Sides:
    """As flash-attn reads them: negative or None is no limit, and causal is none to the right."""
    left, right = (None if side is None or side < 0 else side for side in window_size)
    return left, 0 if causal else right
