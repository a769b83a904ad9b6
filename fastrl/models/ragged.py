"""The kernel that attends rows which stand one after the other, each in its own length, and whether it is right.

    flash    flash-attn 4, 3 or 2, the best for the GPU among those that are installed
    torch    PyTorch's own, torch.nn.attention.varlen
    padded   none: rows are right-padded, which is the definition

flash-attn is asked for a backward that gives the same gradient every time. PyTorch's adds up in any order.
"""

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fastrl.base.exhausted import means_out_of_memory

Ragged = Literal["auto", "flash", "torch", "padded"]
# by generation: the distribution, and the module of its `flash_attn_varlen_func`
FLASH = {
    4: ("flash-attn-4", "flash_attn.cute"),
    3: ("flash-attn-3", "flash_attn_interface"),
    2: ("flash-attn", "flash_attn"),
}
BEST = {8: (2,), 9: (3, 4, 2)}  # generations by compute capability, the fastest first
NEWER = (4, 2)  # the same from 10 on
LENGTHS = (1, 5, 64, 130, 77)  # rows of the self-test: shorter and longer than a tile
WINDOW = 48  # tokens of its window at most, so that it cuts something off
DIFFERENCE = 0.03  # of the norm; rounding to bfloat16 makes less than 0.01, a wrong mask or scale more than 0.1


class Attend(Protocol):
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float, window: int | None
    ) -> Tensor:
        """query [M, heads, d], key and value [M, key heads, d] -> [M, heads, d], differentiable; causal in each row.

        starts: [rows + 1] int32, where each row begins among the M, and M. longest: tokens of the longest row. window:
        tokens that each sees, itself among them; None: all before it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Kernel:
    key: str  # short name
    said: str  # what a run calls it
    attend: Attend


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer asks of attention."""

    heads: int
    key_heads: int
    head_dim: int  # of queries and keys
    value_dim: int
    scale: float
    window: int | None
    dtype: torch.dtype
    device: torch.device


def choose(layers: Collection[Layer], wanted: Ragged) -> tuple[Kernel | None, list[str]]:
    """The first kernel that gives all layers what the definition gives, or None for padded rows; and lines that say so.

    Raises ValueError where a kernel is asked for by name and none of that name can be had.
    """
    devices = {layer.device for layer in layers}
    if wanted == "padded" or (wanted == "auto" and all(device.type != "cuda" for device in devices)):
        return None, []
    kernel, reasons = None, [reason for layer in layers if (reason := unfit(layer))][:1]
    if not reasons:
        capability, _ = torch.cuda.get_device_capability(devices.pop())
        kernel, reasons = first_sound(layers, candidates(wanted, capability))
    if kernel is not None:
        return kernel, [*(f"attention: WARNING: {reason}" for reason in reasons), f"attention: {kernel.said}"]
    why = "; ".join(reasons) or "none is installed"
    if wanted != "auto":
        raise ValueError(f"--ragged {wanted} cannot be had: {why}; use --ragged auto")
    return None, [f"attention: rows are padded, which is slower: {why}"]


def first_sound(
    layers: Collection[Layer], kernels: Iterable[tuple[str, Callable[[], Kernel]]]
) -> tuple[Kernel | None, list[str]]:
    """The first that loads and passes the self-test for all layers, and what is wrong with those before it."""
    reasons = []
    for name, load in kernels:
        try:
            kernel = load()
        except Exception as error:  # a build for another torch fails as it likes: it is told, and the next is tried
            reasons.append(f"{name} does not load: {first_line(error)}")
            continue
        faults = [found for layer in layers if (found := fault(kernel.attend, layer))]
        if not faults:
            return kernel, reasons
        reasons.append(f"{name} is left out: {faults[0]}")
    return None, reasons


def unfit(layer: Layer) -> str:
    """Why no kernel takes a layer; empty where one may."""
    if layer.device.type != "cuda":
        return f"there are kernels for a GPU, but the device is {layer.device}"
    if layer.dtype not in (torch.bfloat16, torch.float16):
        return f"kernels take bfloat16 and float16, but the weights are {layer.dtype}"
    if layer.head_dim > 256 or layer.head_dim % 8:
        return f"kernels take heads of up to 256 numbers in steps of 8, but these have {layer.head_dim}"
    if layer.value_dim != layer.head_dim:
        return f"kernels take values as wide as keys, but here they have {layer.value_dim} and {layer.head_dim} numbers"
    capability = torch.cuda.get_device_capability(layer.device)
    if capability < (8, 0):
        return f"kernels need compute capability 8.0, but this GPU has {capability[0]}.{capability[1]}"
    return ""


def candidates(wanted: Ragged, capability: int) -> Iterator[tuple[str, Callable[[], Kernel]]]:
    """Names of the kernels that are installed, and what loads them, the best first."""
    if wanted in ("auto", "flash"):
        for generation in BEST.get(capability, NEWER):
            distribution, module = FLASH[generation]
            try:
                said = f"flash-attn {metadata.version(distribution)}"
            except metadata.PackageNotFoundError:
                continue
            yield said, lambda key=f"fa{generation}", said=said, module=module: Kernel(key, said, flash(module))
    if wanted in ("auto", "torch"):
        said = f"PyTorch's varlen_attn, torch {torch.__version__}"
        yield said, lambda: Kernel("varlen", said, varlen())


def flash(module: str) -> Attend:
    """flash_attn_varlen_func of a generation; arguments have the same names in all of them."""
    function = import_module(module).flash_attn_varlen_func

    def attend(query, key, value, starts, longest, scale, window):
        out = function(
            query,
            key,
            value,
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            deterministic=True,
        )
        return out[0] if isinstance(out, tuple) else out  # 4 gives the logsumexp as well, and 3 did once

    return attend


def varlen() -> Attend:
    """PyTorch's: since 2.11 with a scale and a window, since 2.12 with keys that heads share."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters

    def attend(query, key, value, starts, longest, scale, window) -> Any:
        options: dict[str, Any] = {}
        if "window_size" in known:
            options |= dict(scale=scale, window_size=(-1 if window is None else window - 1, 0))
        elif window is None and math.isclose(scale, query.shape[-1] ** -0.5):
            options |= dict(is_causal=True)
        else:
            raise ValueError("this version has neither a scale nor a window")
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and "enable_gqa" in known:
            options["enable_gqa"] = True
        elif groups > 1:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        return varlen_attn(query, key, value, starts, starts, longest, longest, **options)

    return attend


def definition(query, key, value, starts, longest, scale, window) -> Tensor:
    """What a kernel computes, row by row."""
    out = []
    for begin, end in pairwise(starts.tolist()):
        groups = query.shape[1] // key.shape[1]
        q, k, v = query[begin:end], *(x[begin:end].repeat_interleave(groups, dim=1) for x in (key, value))
        seen = torch.ones(end - begin, end - begin, dtype=torch.bool, device=query.device).tril()
        if window is not None:
            seen = seen.triu(1 - window)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(out)


def fault(attend: Attend, layer: Layer) -> str:
    """What is wrong with a kernel's outputs or gradients, empty if nothing: against the definition in float32."""
    generator = torch.Generator(device=layer.device).manual_seed(0)
    starts = torch.tensor([0, *LENGTHS], device=layer.device).cumsum(0).int()
    window = None if layer.window is None else min(layer.window, WINDOW)

    def drawn(heads: int) -> Tensor:
        shape = (sum(LENGTHS), heads, layer.head_dim)
        return torch.randn(shape, generator=generator, device=layer.device).to(layer.dtype)

    # queries that make some keys matter more than others, whatever the scale
    query = drawn(layer.heads) / (layer.scale * layer.head_dim**0.5)
    key, value, upstream = drawn(layer.key_heads), drawn(layer.key_heads), drawn(layer.heads)

    def run(function: Attend, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (query.detach(), key.detach(), value.detach())]
        with torch.enable_grad():
            out = function(leaves[0], leaves[1], leaves[2], starts, max(LENGTHS), layer.scale, window)
            return [x.float() for x in (out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype)))]

    try:
        found = run(attend, layer.dtype)
    except Exception as error:  # whatever a compiler, driver or library may say: it is told, and another kernel runs
        if means_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {first_line(error)}"
    names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
    for name, mine, right in zip(names, found, run(definition, torch.float32), strict=True):
        off = ((mine - right).norm() / right.norm()).item()
        if not off <= DIFFERENCE:
            return f"{name} off by {off:.3g} of its norm"
    return ""


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
