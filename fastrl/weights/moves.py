"""In-place operations on flat shards: go partway to a point, or beyond it at a rate of each coordinate's own.

    interpolate_   theta <- anchor + alpha (theta - anchor)
    extrapolate_   theta <- anchor + alpha scale (theta - anchor)
                   scale = S_K(r) / S_2(r),   S_n(r) = 1 + r + ... + r^(n-1)

r is how much of a coordinate's first gradient (or optimizer direction) the second still is: two steps that shrink by r
begin a geometric series, and K of them go S_K / S_2 times as far (GXPO, arXiv:2605.06755). By Horner's rule: the closed
form (1 - r^K) / (1 - r) is 0 / 0 in float32 near r = 1, where the scale is K / 2.

On a GPU it is one pass over the shard, which also writes bfloat16 weights and sums the statistics; `backend_for` says
what runs there. Elsewhere, and in float64, it is the definition in torch. theta is a float32 vector, or a bfloat16 one
with the 16 bits that it lacks in `low` (`fastrl.weights.halves`), both of which are then written in place. Both are
operators of the dispatcher, torch.ops.fastrl, so that torch.compile and fake tensors see through them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.weights import backends
from fastrl.weights.backends import Backend
from fastrl.weights.buffer import BLOCK
from fastrl.weights.moves_ref import FlatStats, extrapolate_ref_, interpolate_ref_, series

Shards = tuple[Tensor, Tensor]
VECTOR_BYTES = 16  # of an access of the kernels
TINY = 1e-8


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """How far two steps lead: theta_0 + alpha scale (theta_2 - theta_0), scale = S_K(r) / S_2(r) in [1, scale_max].

    r: what is left of a gradient, or of an optimizer's direction, in the second step; clamped.
    """

    lookahead: int  # K >= 2
    alpha: float
    ratio_min: float = -2.0
    ratio_max: float = 3.0
    scale_max: float | None = None  # None: lookahead / 2 + 1
    active_threshold: float = 0.0  # times the tensor's root mean square; smaller coordinates have scale 1
    min_multiplier: float = 0.0  # mean of alpha scale below which the move is taken back

    def by_tensor(self, inner: Tensor, square: Tensor) -> Shards:
        """<g0, g1> and <g0, g0> of each tensor [tensors] -> r, clamped to [-1, 1.5], and scale [tensors]."""
        ratio = (inner / (square + 1e-300)).clamp(-1.0, 1.5)
        largest = self.lookahead / 2 + 1 if self.scale_max is None else self.scale_max
        scale = torch.where((ratio + 1).abs() > TINY, series(ratio, self.lookahead), 1.0).clamp(1.0, largest)
        return ratio, scale

    def multiplier(self, stats: dict[str, float]) -> float:
        """Sums of FlatStats over all ranks -> mean of alpha scale."""
        return self.alpha * stats["scale"] / stats["elements"]


def backend_for(theta: Tensor) -> Backend:
    """Which implementation moves this shard."""
    if theta.dtype not in (torch.float32, torch.bfloat16):
        return "torch"
    return backends.backend_on(theta.device)


@torch.no_grad()
def interpolate_(
    theta_k: Tensor,
    anchor: Tensor,
    alpha: float,
    *,
    low: Tensor | None = None,
    out_bf16: Tensor | None = None,
    backend: Backend | None = None,
) -> FlatStats:
    """theta_k, anchor [n] -> theta_k becomes anchor + alpha (theta_k - anchor), exactly either of them at 0 and 1.

    low [n] int16: what theta_k, then bfloat16, lacks of float32. out_bf16 [n]: receives the result rounded to nearest;
    not with low. Raises ValueError on shards that do not match, or do not start at a multiple of 16 bytes on a GPU.
    """
    check(theta_k, low, out_bf16, anchor=anchor)
    return FlatStats(torch.ops.fastrl.interpolate_(theta_k, anchor, alpha, low, out_bf16, backend))


@torch.no_grad()
def extrapolate_(
    theta_2: Tensor,
    anchor: Tensor,
    lookahead: int,
    alpha: float,
    *,
    grads: Shards | None = None,
    u0: Tensor | None = None,
    lr: float = 0.0,
    weight_decay: float = 0.0,
    ratio_min: float = -2.0,
    ratio_max: float = 3.0,
    scale_max: float | None = None,
    threshold: Tensor | None = None,
    segment: Tensor | None = None,
    low: Tensor | None = None,
    out_bf16: Tensor | None = None,
    backend: Backend | None = None,
) -> FlatStats:
    """theta_2 [n], two steps from anchor [n], becomes anchor + alpha scale (theta_2 - anchor).

    grads = (g0, g1) [n]: the gradients of the two steps, r = g1 / g0. Or u0 [n] = theta_1 - anchor: r is that of the
    directions of decoupled AdamW, d = ((1 - lr weight_decay) theta - theta') / lr; lr = 0 leaves every scale at 1.
    r is clamped to [ratio_min, ratio_max], the scale to [1, scale_max], lookahead / 2 + 1 unless given. The scale is 1
    where a gradient is not finite or r is -1, and on inactive coordinates: |g0| (or |d0|) at or below its tensor's
    threshold [tensors], found by segment [n / 1024, rounded up] (the tensor of each block), or below 1e-8 without them.
    low and out_bf16 as in `interpolate_`. Raises ValueError on shards that do not match or do not start at a multiple
    of 16 bytes on a GPU, lookahead below 2, or not exactly one of grads and u0.
    """
    if (grads is None) == (u0 is None):
        raise ValueError("extrapolate_ takes either grads=(g0, g1) or u0, got " + ("both" if grads else "neither"))
    if lookahead < 2:
        raise ValueError(f"extrapolate_ looks ahead at least 2 steps, got lookahead={lookahead}")
    x0, x1 = (u0, None) if grads is None else grads
    inputs = dict(u0=u0) if grads is None else dict(g0=x0, g1=x1)
    check(theta_2, low, out_bf16, anchor=anchor, **inputs)
    if (threshold is None) != (segment is None):
        raise ValueError("extrapolate_ takes threshold and segment together: a limit per tensor, a tensor per block")
    if threshold is not None and segment is not None:
        check_limits(anchor, threshold, segment)
    scale_max = lookahead / 2 + 1 if scale_max is None else scale_max
    sums = torch.ops.fastrl.extrapolate_(
        theta_2,
        anchor,
        x0,
        x1,
        lookahead,
        alpha,
        lr,
        weight_decay,
        ratio_min,
        ratio_max,
        scale_max,
        threshold,
        segment,
        low,
        out_bf16,
        backend,
    )
    return FlatStats(sums)


def interpolate_impl_(
    theta: Tensor, anchor: Tensor, alpha: float, low: Tensor | None, out_bf16: Tensor | None, backend: str | None
) -> Tensor:
    """-> the sums of FlatStats."""
    backend = backend or backend_for(theta)
    if backend == "torch":
        return interpolate_ref_(theta, anchor, alpha, low, out_bf16)
    check_aligned(backend, theta_k=theta, anchor=anchor, low=low, out_bf16=out_bf16)
    return backends.run(backend, theta, anchor, alpha, low=low, out_bf16=out_bf16)


def extrapolate_impl_(
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
    backend: str | None,
) -> Tensor:
    """-> the sums of FlatStats."""
    backend = backend or backend_for(theta)
    if backend == "torch":
        return extrapolate_ref_(
            theta,
            anchor,
            x0,
            x1,
            lookahead,
            alpha,
            lr,
            weight_decay,
            ratio_min,
            ratio_max,
            scale_max,
            threshold,
            segment,
            low,
            out_bf16,
        )
    inputs = dict(u0=x0) if x1 is None else dict(g0=x0, g1=x1)
    check_aligned(backend, theta_2=theta, anchor=anchor, **inputs, low=low, out_bf16=out_bf16)
    return backends.run(
        backend,
        theta,
        anchor,
        alpha,
        x0=x0,
        x1=x1,
        lookahead=lookahead,
        lr=lr,
        weight_decay=weight_decay,
        ratio_min=ratio_min,
        ratio_max=ratio_max,
        scale_max=scale_max,
        threshold=threshold,
        segment=None if segment is None else segment.int(),
        low=low,
        out_bf16=out_bf16,
    )


# by hand and not by torch.library.custom_op, whose wrapper takes longer on many arguments than a small shard does
for name, function in {"fastrl::interpolate_": interpolate_impl_, "fastrl::extrapolate_": extrapolate_impl_}.items():
    schema = torch.library.infer_schema(function, mutates_args=("theta", "low", "out_bf16"))
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, ("cpu", "cuda"), function)

    @torch.library.register_fake(name)
    def sums_of(theta: Tensor, *others: object) -> Tensor:
        return theta.new_empty(len(FlatStats.NAMES), dtype=torch.float64)


def check(theta: Tensor, low: Tensor | None, out_bf16: Tensor | None, **others: Tensor | None) -> None:
    """Raise ValueError unless all are vectors as long as theta and on its device, of the types that go together."""
    if theta.ndim != 1 or not theta.is_contiguous():
        raise ValueError(f"a shard is a contiguous vector, got shape {tuple(theta.shape)}")
    if (low is not None) != (theta.dtype == torch.bfloat16):
        raise ValueError(
            "a bfloat16 shard and low, the 16 bits that it lacks of float32, go together, "
            f"got a shard of {theta.dtype} {'without' if low is None else 'with'} low"
        )
    if low is not None and out_bf16 is not None:
        raise ValueError("out_bf16 must be None with low: the shard itself is the bfloat16 result")
    precision = theta.dtype if low is None else torch.float32
    check_vector("low", low, theta, torch.int16)
    check_vector("out_bf16", out_bf16, theta, torch.bfloat16)
    for name, tensor in others.items():
        check_vector(name, tensor, theta, precision)


def check_vector(name: str, tensor: Tensor | None, theta: Tensor, dtype: torch.dtype) -> None:
    if tensor is None:
        return
    fits = tensor.shape == theta.shape and tensor.dtype == dtype and tensor.device == theta.device
    if not fits or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be {dtype} {tuple(theta.shape)} on {theta.device}, "
            f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}" + gaps(tensor)
        )


def check_limits(anchor: Tensor, threshold: Tensor, segment: Tensor) -> None:
    """Raise ValueError unless there is a segment per block of a shard, and thresholds are of its type and device."""
    blocks = -(-len(anchor) // BLOCK)
    if segment.shape != (blocks,) or segment.device != anchor.device or not segment.is_contiguous():
        raise ValueError(
            f"segment must be [{blocks}], one tensor per {BLOCK} elements, on {anchor.device}, "
            f"got {tuple(segment.shape)} on {segment.device}" + gaps(segment)
        )
    fits = threshold.ndim == 1 and threshold.dtype == anchor.dtype and threshold.device == anchor.device
    if not fits or not threshold.is_contiguous():
        raise ValueError(
            f"threshold must be a {anchor.dtype} vector on {anchor.device}, "
            f"got {threshold.dtype} {tuple(threshold.shape)} on {threshold.device}" + gaps(threshold)
        )


def gaps(tensor: Tensor) -> str:
    return "" if tensor.is_contiguous() else f", not contiguous: strides {tensor.stride()}"


def check_aligned(backend: str, **vectors: Tensor | None) -> None:
    """Raise ValueError on a vector that the kernels cannot read 16 bytes at a time."""
    for name, vector in vectors.items():
        if vector is not None and vector.data_ptr() % VECTOR_BYTES:
            raise ValueError(
                f"{name} must start at a multiple of {VECTOR_BYTES} bytes on backend {backend}, got an address "
                f"{vector.data_ptr() % VECTOR_BYTES} beyond one: cut shards at multiples of {BLOCK} elements"
            )
