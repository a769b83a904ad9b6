"""The flat updates in torch: what they mean, and what runs without a GPU, in float64 and in bfloat16 halves too."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.weights.buffer import BLOCK
from fastrl.weights.halves import join, split

CHUNK = 1 << 20  # elements worked on at a time, so temporaries do not grow with the model


@dataclass(frozen=True, slots=True)
class FlatStats:
    """Sums over the elements of a shard, float64, so that shards can be added up."""

    sums: Tensor  # [9], in the order of NAMES

    NAMES = ("elements", "before_sq", "after_sq", "active", "ratio", "ratio_sq", "scale", "clamped", "nonfinite")

    def named(self) -> dict[str, float]:
        """before_sq, after_sq: squared distance to the anchor; ratio, ratio_sq, scale: over active coordinates."""
        return dict(zip(self.NAMES, self.sums.tolist(), strict=True))


def interpolate_ref_(
    theta: Tensor, anchor: Tensor, alpha: float, low: Tensor | None, out_bf16: Tensor | None
) -> Tensor:
    """The definition of `fastrl.weights.moves.interpolate_`, a chunk at a time -> the sums of FlatStats."""
    sums = theta.new_zeros(len(FlatStats.NAMES), dtype=torch.float64)
    for part in chunks(theta):
        start, end = anchor[part], read(theta, low, part)
        moved = lerp(start, end, alpha)
        before, after = end - start, moved - start
        write(moved, part, theta, low, out_bf16)
        sums += gather(elements=after.numel(), before_sq=square_sum(before), after_sq=square_sum(after), like=sums)
    return sums


def extrapolate_ref_(
    theta: Tensor,
    anchor: Tensor,
    x0: Tensor,
    x1: Tensor | None,
    lookahead: int,
    alpha: float,
    lr: float,
    weight_decay: float,
    ratio_min: float,
    ratio_max: float,
    scale_max: float,
    threshold: Tensor | None,
    segment: Tensor | None,
    low: Tensor | None,
    out_bf16: Tensor | None,
) -> Tensor:
    """The definition of `fastrl.weights.moves.extrapolate_`, a chunk at a time -> the sums of FlatStats.

    x0, x1: the gradients, or x0 = theta_1 - anchor alone.
    """
    sums = theta.new_zeros(len(FlatStats.NAMES), dtype=torch.float64)
    for part in chunks(theta):
        start, end = anchor[part], read(theta, low, part)
        if x1 is not None:
            first, second = x0[part], x1[part]
        else:
            theta_1 = start + x0[part]
            first = direction(start, x0[part], lr, weight_decay)
            second = direction(theta_1, end - theta_1, lr, weight_decay)
        least = 1e-8
        if threshold is not None and segment is not None:
            least = spread(threshold, segment, part)[: len(first)]
        ratio = second / first
        finite = first.isfinite() & second.isfinite()
        active = (first.abs() > least) & finite & (ratio.clamp(ratio_min, ratio_max) + 1).abs().gt(1e-8)
        ratio = torch.where(active, ratio, 1.0)
        inside = ratio.clamp(ratio_min, ratio_max)
        scale = torch.where(active, series(inside, lookahead).clamp(1.0, scale_max), 1.0)
        moved = lerp(start, end, alpha * scale)
        before, after = end - start, moved - start
        write(moved, part, theta, low, out_bf16)
        sums += gather(
            elements=scale.numel(),
            before_sq=square_sum(before),
            after_sq=square_sum(after),
            active=active.sum(),
            ratio=inside[active].sum(dtype=torch.float64),
            ratio_sq=square_sum(inside[active]),
            scale=scale.sum(dtype=torch.float64),
            clamped=(active & (inside != ratio)).sum(),
            nonfinite=(~finite).sum(),
            like=sums,
        )
    return sums


def read(theta: Tensor, low: Tensor | None, part: slice) -> Tensor:
    return theta[part] if low is None else join(theta[part], low[part])


def write(moved: Tensor, part: slice, theta: Tensor, low: Tensor | None, out_bf16: Tensor | None) -> None:
    if low is None:
        theta[part] = moved
    else:
        theta[part], low[part] = split(moved)
    if out_bf16 is not None:
        out_bf16[part] = moved


def lerp(start: Tensor, end: Tensor, weight: float | Tensor) -> Tensor:
    """torch.lerp, and an end itself at 0 and 1 whatever the other is: 0 * inf is NaN, and -0 + 0 is 0."""
    if not isinstance(weight, Tensor):
        return torch.lerp(start, end, weight) if weight not in (0, 1) else end if weight else start
    return torch.where(weight == 0, start, torch.where(weight == 1, end, torch.lerp(start, end, weight)))


def series(ratio: Tensor, lookahead: int) -> Tensor:
    """S_K(r) / S_2(r), elementwise."""
    total = torch.ones_like(ratio)
    for _ in range(lookahead - 1):
        total = total * ratio + 1
    return total / (1 + ratio)


def direction(start: Tensor, step: Tensor, lr: float, weight_decay: float) -> Tensor:
    """The d of a decoupled AdamW step: start + step = (1 - lr weight_decay) start - lr d. Zero at lr = 0."""
    return torch.zeros_like(step) if lr == 0 else -(step + lr * weight_decay * start) / lr


def chunks(shard: Tensor, size: int = CHUNK) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, len(shard), size))


def spread(threshold: Tensor, segment: Tensor, part: slice) -> Tensor:
    """The threshold of each element of a chunk, up to the end of its last block."""
    blocks = segment[part.start // BLOCK : part.stop // BLOCK]
    return threshold[blocks.long()].repeat_interleave(BLOCK)


def square_sum(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()


def gather(like: Tensor, **sums) -> Tensor:
    """Sums by name -> a row in the order of FlatStats.NAMES; what is not given is 0."""
    return torch.stack([torch.as_tensor(sums.get(name, 0.0)).to(like) for name in FlatStats.NAMES])
