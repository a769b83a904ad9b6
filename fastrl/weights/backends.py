"""Which implementation of the flat updates a GPU runs: the first of three that does a small one right.

    cuda    the library that nvcc built with the package
    nvrtc   the same source, compiled for this device when it is first needed
    triton  its twin
    torch   the definition, if none of them does

The choice is made once per device and process, when it is first asked for. One that fails says so in a warning.
"""

import importlib.util
import warnings
from functools import cache
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor

from fastrl.weights import library, nvrtc
from fastrl.weights.moves_ref import FlatStats

Backend = Literal["cuda", "nvrtc", "triton", "torch"]
NUM_STATS = len(FlatStats.NAMES)  # FASTRL_FLAT_STATS
PROGRAMS_PER_MULTIPROCESSOR = 2


class Move(TypedDict):
    """What every implementation is given beside theta, anchor and alpha."""

    x0: Tensor | None
    x1: Tensor | None
    lookahead: int
    lr: float
    weight_decay: float
    ratio_min: float
    ratio_max: float
    scale_max: float
    threshold: Tensor | None
    segment: Tensor | None
    low: Tensor | None
    out_bf16: Tensor | None


@cache
def backend_on(device: torch.device) -> Backend:
    """What moves float32 shards, and bfloat16 halves, on this device; the first call tries it out."""
    if device.type != "cuda":
        return "torch"
    for backend in ("cuda", "nvrtc", "triton"):
        if backend == "cuda" and library.find() is None:
            continue  # a package without it was made where there is no nvcc, which is no failure
        if backend == "triton" and importlib.util.find_spec("triton") is None:
            continue
        try:
            try_out(backend, device)
        except Exception as error:  # whatever a compiler or a driver finds to object to
            warnings.warn(f"flat updates do not run on {backend} ({device}): {error}", stacklevel=2)
            continue
        return backend
    return "torch"


def try_out(backend: Backend, device: torch.device) -> None:
    """Raise unless one of each kind comes out right to the bit. Numbers are small integers, so nothing is rounded."""
    n = 8 * 1024 + 5
    anchor = torch.arange(n, device=device).remainder(512).float()
    ones = torch.ones_like(anchor)
    # halfway from anchor to anchor + 2; r = 1 and K = 6: scale 3, halfway 3 from anchor
    for moved, x0, after in ((anchor + 1, None, 1), (anchor + 3, ones, 9)):
        theta = anchor + 2
        sums = run(backend, theta, anchor, 0.5, x0=x0, x1=x0, lookahead=6, scale_max=4.0)
        if not torch.equal(theta, moved) or sums[:3].tolist() != [n, 4 * n, after * n]:
            wrong = int((theta != moved).sum())
            raise RuntimeError(f"{wrong} of {n} elements came out wrong, sums {sums.tolist()}")


def run(
    backend: str,
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
    """One pass over shards [n] that `moves.py` has checked -> theta in place, and the sums of FlatStats, [9] float64.

    x0 None: interpolation. x0, x1: gradients of two steps; x0 alone: the first displacement. segment: int32.
    Raises RuntimeError with the error of CUDA.
    """
    given = Move(
        x0=x0,
        x1=x1,
        lookahead=lookahead,
        lr=lr,
        weight_decay=weight_decay,
        ratio_min=ratio_min,
        ratio_max=ratio_max,
        scale_max=scale_max,
        threshold=threshold,
        segment=segment,
        low=low,
        out_bf16=out_bf16,
    )
    # autograd does not see a kernel write
    torch.autograd.graph.increment_version([v for v in (theta, low, out_bf16) if v is not None])
    if backend == "triton":
        from fastrl.kernels.flat_update import flat_update

        return flat_update(theta, anchor, alpha, **given)
    launch = {"cuda": library.launch, "nvrtc": nvrtc.launch}[backend]
    with torch.cuda.device(theta.device):
        grid = PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(theta.device).multi_processor_count
        partials = torch.zeros(grid, NUM_STATS, dtype=torch.float64, device=theta.device)
        if len(theta):
            arguments = kernel_arguments(theta=theta, anchor=anchor, alpha=alpha, partials=partials, **given)
            launch(arguments, grid, torch.cuda.current_stream().cuda_stream)
    return partials.sum(dim=0)


def kernel_arguments(
    theta: Tensor, anchor: Tensor, alpha: float, partials: Tensor, **given: Unpack[Move]
) -> library.Arguments:
    """Vectors become addresses: they must outlive the launch."""
    vectors = {"theta": theta, "anchor": anchor, "partials": partials}
    values = {name: x.data_ptr() if isinstance(x, Tensor) else x for name, x in (vectors | given).items()}
    return library.Arguments(n=len(theta), alpha=alpha, **values)
