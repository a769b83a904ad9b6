"""In-place operations on flat shards: go partway to a point, or beyond it at a rate of each coordinate's own.

    interpolate_   theta <- anchor + alpha (theta - anchor)
    extrapolate_   theta <- anchor + alpha scale (theta - anchor)
                   scale = S_K(r) / S_2(r),   S_n(r) = 1 + r + ... + r^(n-1)

r is how much of a coordinate's first gradient (or optimizer direction) the second still is: two steps that shrink by r
begin a geometric series, and K of them go S_K / S_2 times as far (GXPO, arXiv:2605.06755). By Horner's rule: the closed
form (1 - r^K) / (1 - r) is 0 / 0 in float32 near r = 1, where the scale is K / 2.

On a GPU it is one pass over the shard, which also writes bfloat16 weights and sums the statistics: csrc/flat_update.cu
where it was built, else its Triton twin. Elsewhere, and in float64, it is the definition in torch.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastrl import flat_library

BLOCK = 1024  # elements; tensors start at multiples of it, so a block belongs to one tensor
CHUNK = 1 << 20  # elements worked on at a time, so temporaries do not grow with the model

Shards = tuple[Tensor, Tensor]
Backend = Literal["cuda", "triton", "torch"]


@dataclass(frozen=True, slots=True)
class FlatStats:
    """Sums over the elements of a shard, float64, so that shards can be added up."""

    sums: Tensor  # [9], in the order of NAMES

    NAMES = ("elements", "before_sq", "after_sq", "active", "ratio", "ratio_sq", "scale", "clamped", "nonfinite")

    def named(self) -> dict[str, float]:
        """before_sq, after_sq: squared distance to the anchor; ratio, ratio_sq, scale: over active coordinates."""
        return dict(zip(self.NAMES, self.sums.tolist(), strict=True))


def backend_for(theta: Tensor) -> Backend:
    """Which implementation moves this shard."""
    if theta.device.type != "cuda" or theta.dtype != torch.float32:
        return "torch"
    if flat_library.find():
        return "cuda"
    return "triton" if importlib.util.find_spec("triton") else "torch"


@torch.no_grad()
def interpolate_(
    theta_k: Tensor, anchor: Tensor, alpha: float, *, out_bf16: Tensor | None = None, backend: Backend | None = None
) -> FlatStats:
    """theta_k, anchor [n] -> theta_k becomes anchor + alpha (theta_k - anchor), exactly either of them at 0 and 1.

    out_bf16 [n]: receives the result rounded to nearest. Raises ValueError on shards that do not match.
    """
    check(theta_k, anchor=anchor, out_bf16=out_bf16)
    backend = backend or backend_for(theta_k)
    if backend == "torch":
        return interpolate_ref_(theta_k, anchor, alpha, out_bf16)
    if backend == "cuda":
        return FlatStats(flat_library.run("fastrl_interpolate", theta_k, anchor, out_bf16, len(theta_k), alpha))
    from fastrl.kernels.flat_update import flat_update

    return FlatStats(flat_update(theta_k, anchor, alpha, out_bf16=out_bf16))


@torch.no_grad()
def extrapolate_(
    theta_2: Tensor, anchor: Tensor, lookahead: int, alpha: float, *,
    grads: Shards | None = None, u0: Tensor | None = None, lr: float = 0.0, weight_decay: float = 0.0,
    ratio_min: float = -2.0, ratio_max: float = 3.0, scale_max: float | None = None,
    threshold: Tensor | None = None, segment: Tensor | None = None, out_bf16: Tensor | None = None,
    backend: Backend | None = None,
) -> FlatStats:  # fmt: skip
    """theta_2 [n], two steps from anchor [n], becomes anchor + alpha scale (theta_2 - anchor).

    grads = (g0, g1) [n]: the gradients of the two steps, r = g1 / g0. Or u0 [n] = theta_1 - anchor: r is that of the
    directions of decoupled AdamW, d = ((1 - lr weight_decay) theta - theta') / lr; lr = 0 leaves every scale at 1.
    r is clamped to [ratio_min, ratio_max], the scale to [1, scale_max], lookahead / 2 + 1 unless given. The scale is 1
    where a gradient is not finite or r is -1, and on inactive coordinates: |g0| (or |d0|) at or below its tensor's
    threshold [tensors], found by segment [n / 1024, rounded up] (the tensor of each block), or below 1e-8 without them.
    Raises ValueError on shards that do not match, lookahead below 2, or not exactly one of grads and u0.
    """
    if (grads is None) == (u0 is None):
        raise ValueError("extrapolate_ takes either grads=(g0, g1) or u0, got " + ("both" if grads else "neither"))
    if lookahead < 2:
        raise ValueError(f"extrapolate_ looks ahead at least 2 steps, got lookahead={lookahead}")
    check(theta_2, anchor=anchor, u0=u0, out_bf16=out_bf16, **dict(zip(("g0", "g1"), grads or (), strict=False)))
    if (threshold is None) != (segment is None):
        raise ValueError("extrapolate_ takes threshold and segment together: a limit per tensor, a tensor per block")
    if threshold is not None:
        check_limits(theta_2, threshold, segment)
    scale_max = lookahead / 2 + 1 if scale_max is None else scale_max
    x0, x1 = grads or (u0, None)
    settings = dict(lr=lr, weight_decay=weight_decay, ratio_min=ratio_min, ratio_max=ratio_max, scale_max=scale_max)
    backend = backend or backend_for(theta_2)
    if backend == "torch":
        return extrapolate_ref_(theta_2, anchor, lookahead, alpha, x0, x1, threshold, segment, out_bf16, **settings)
    segment = None if segment is None else segment.int()
    if backend == "cuda":
        sums = flat_library.run(
            "fastrl_extrapolate", theta_2, anchor, x0, x1, out_bf16, threshold, segment, len(theta_2), lookahead,
            alpha, *settings.values(),
        )  # fmt: skip
        return FlatStats(sums)
    from fastrl.kernels.flat_update import flat_update

    sums = flat_update(
        theta_2, anchor, alpha, x0=x0, x1=x1, lookahead=lookahead, threshold=threshold, segment=segment,
        out_bf16=out_bf16, **settings,
    )  # fmt: skip
    return FlatStats(sums)


def interpolate_ref_(theta_k: Tensor, anchor: Tensor, alpha: float, out_bf16: Tensor | None = None) -> FlatStats:
    """The definition of `interpolate_`, a chunk at a time."""
    sums = theta_k.new_zeros(len(FlatStats.NAMES), dtype=torch.float64)
    for part in chunks(theta_k):
        before = theta_k[part] - anchor[part]
        theta_k[part] = torch.lerp(anchor[part], theta_k[part], alpha)
        after = theta_k[part] - anchor[part]
        sums += gather(elements=after.numel(), before_sq=square_sum(before), after_sq=square_sum(after), like=sums)
        if out_bf16 is not None:
            out_bf16[part] = theta_k[part]
    return FlatStats(sums)


def extrapolate_ref_(
    theta_2: Tensor, anchor: Tensor, lookahead: int, alpha: float, x0: Tensor, x1: Tensor | None,
    threshold: Tensor | None, segment: Tensor | None, out_bf16: Tensor | None, *, lr: float, weight_decay: float,
    ratio_min: float, ratio_max: float, scale_max: float,
) -> FlatStats:  # fmt: skip
    """The definition of `extrapolate_`, a chunk at a time: x0, x1 the gradients, or x0 = theta_1 - anchor alone."""
    sums = theta_2.new_zeros(len(FlatStats.NAMES), dtype=torch.float64)
    for part in chunks(theta_2):
        start, before = anchor[part], theta_2[part] - anchor[part]
        if x1 is not None:
            first, second = x0[part], x1[part]
        else:
            theta_1 = start + x0[part]
            first = direction(start, x0[part], lr, weight_decay)
            second = direction(theta_1, theta_2[part] - theta_1, lr, weight_decay)
        least = 1e-8 if threshold is None else spread(threshold, segment, part)[: len(first)]
        ratio = second / first
        finite = first.isfinite() & second.isfinite()
        active = (first.abs() > least) & finite & (ratio.clamp(ratio_min, ratio_max) + 1).abs().gt(1e-8)
        ratio = torch.where(active, ratio, 1.0)
        inside = ratio.clamp(ratio_min, ratio_max)
        scale = torch.where(active, series(inside, lookahead).clamp(1.0, scale_max), 1.0)
        theta_2[part] = torch.lerp(start, theta_2[part], alpha * scale)
        sums += gather(
            elements=scale.numel(), before_sq=square_sum(before), after_sq=square_sum(theta_2[part] - start),
            active=active.sum(), ratio=inside[active].sum(dtype=torch.float64), ratio_sq=square_sum(inside[active]),
            scale=scale.sum(dtype=torch.float64), clamped=(active & (inside != ratio)).sum(),
            nonfinite=(~finite).sum(), like=sums,
        )  # fmt: skip
        if out_bf16 is not None:
            out_bf16[part] = theta_2[part]
    return FlatStats(sums)


def series(ratio: Tensor, lookahead: int) -> Tensor:
    """S_K(r) / S_2(r), elementwise."""
    total = torch.ones_like(ratio)
    for _ in range(lookahead - 1):
        total = total * ratio + 1
    return total / (1 + ratio)


def direction(start: Tensor, step: Tensor, lr: float, weight_decay: float) -> Tensor:
    """The d of a decoupled AdamW step: start + step = (1 - lr weight_decay) start - lr d. Zero at lr = 0."""
    return torch.zeros_like(step) if lr == 0 else -(step + lr * weight_decay * start) / lr


def chunks(shard: Tensor) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, len(shard), CHUNK))


def spread(threshold: Tensor, segment: Tensor, part: slice) -> Tensor:
    """The threshold of each element of a chunk, up to the end of its last block."""
    blocks = segment[part.start // BLOCK : part.stop // BLOCK]
    return threshold[blocks.long()].repeat_interleave(BLOCK)


def square_sum(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()


def gather(like: Tensor, **sums) -> Tensor:
    """Sums by name -> a row in the order of FlatStats.NAMES; what is not given is 0."""
    return torch.stack([torch.as_tensor(sums.get(name, 0.0)).to(like) for name in FlatStats.NAMES])


def check(theta: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless all are vectors as long as theta, on its device, of its dtype (out_bf16: bfloat16)."""
    if theta.ndim != 1 or not theta.is_contiguous():
        raise ValueError(f"a shard is a contiguous vector, got shape {tuple(theta.shape)}")
    for name, tensor in others.items():
        if tensor is None:
            continue
        wanted = torch.bfloat16 if name == "out_bf16" else theta.dtype
        if tensor.shape != theta.shape or tensor.dtype != wanted or tensor.device != theta.device:
            raise ValueError(
                f"{name} must be {wanted} {tuple(theta.shape)} on {theta.device}, "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )


def check_limits(theta: Tensor, threshold: Tensor, segment: Tensor) -> None:
    """Raise ValueError unless there is a segment per block of theta, and thresholds are of its type and device."""
    blocks = -(-len(theta) // BLOCK)
    if segment.shape != (blocks,) or segment.device != theta.device:
        raise ValueError(
            f"segment must be [{blocks}], one tensor per {BLOCK} elements, on {theta.device}, "
            f"got {tuple(segment.shape)} on {segment.device}"
        )
    if threshold.ndim != 1 or threshold.dtype != theta.dtype or threshold.device != theta.device:
        raise ValueError(
            f"threshold must be a {theta.dtype} vector on {theta.device}, "
            f"got {threshold.dtype} {tuple(threshold.shape)} on {threshold.device}"
        )
