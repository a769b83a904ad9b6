"""Models of real widths on the pretended device: what is large is allocated as on a GPU and never computed.

    with hollow(label): ...      operators on large tensors, and Triton's launches over them, only allocate

Outputs are the zero pages of a fresh block. Small results of large inputs, such as the norm of a gradient, are ones, so
that a step goes on with finite numbers. What CUDA's kernels allocate for themselves and give back is not seen.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pretended  # pyright: ignore[reportMissingImports]
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

LARGE = 1 << 18  # elements
# they change a tensor's memory or shape, not its numbers
OF_STORAGE = {"set_", "resize_", "detach_", "squeeze_", "unsqueeze_", "t_", "transpose_", "as_strided_"}
MADE = {"zeros", "ones", "full"}  # of sizes alone


class Hollow(TorchDispatchMode):
    """label: of what an operator allocates, asked before each one, in the thread that calls it."""

    def __init__(self, label: Callable[[], int]):
        super().__init__()
        self.label = label

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        device = kwargs.get("device") or torch.device("cpu")
        if device.type != "cuda" and not any(x.is_cuda for x in tensors):
            return function(*args, **kwargs)
        before = pretended.label(self.label())
        try:
            if is_large(function, tensors, args):
                return allocated(function, args, kwargs)
            return function(*args, **kwargs)
        finally:
            pretended.label(before)


def is_large(function, tensors: list[Tensor], args: tuple) -> bool:
    name = function._schema.name.partition("::")[2]
    if not tensors:
        return name in MADE and math.prod(args[0]) >= LARGE
    if any("Tensor" not in str(returned.type) for returned in function._schema.returns):  # a choice, such as a kernel's
        return False
    return function.is_view is False and name not in OF_STORAGE and any(x.numel() >= LARGE for x in tensors)


def allocated(function, args: tuple, kwargs: dict):
    """What the operator returns, without its numbers; computed after all where nothing else tells its shape."""
    written = [x for x, how in zip(args, function._schema.arguments, strict=False) if is_written(how)]
    written += [kwargs[how.name] for how in function._schema.arguments if is_written(how) and how.name in kwargs]
    if written:
        returned = function._schema.returns
        if any(how.alias_info is None for how in returned):  # one of ours, whose kernels are skipped inside
            return function(*args, **kwargs)
        return None if not returned else written[0] if len(returned) == 1 else tuple(written)
    try:
        shapes = function(*on_meta(args), **{**on_meta(kwargs), **({"device": "meta"} if "device" in kwargs else {})})
    except (NotImplementedError, RuntimeError):  # of the numbers: how many are not zero, which rows a mask picks
        return function(*args, **kwargs)
    first = next((x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and x.is_cuda), None)
    device = kwargs.get("device") or (first.device if first is not None else "cpu")
    return tree_map(lambda x: made(x, device) if isinstance(x, Tensor) else x, shapes)


def is_written(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def on_meta(values):
    return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, values)


def made(like: Tensor, device) -> Tensor:
    size, stride = like.size(), like.stride()
    if torch.device(device).type == "cpu":
        return torch.zeros(size, dtype=like.dtype)
    out = torch.empty_strided(size, stride, dtype=like.dtype, device=device)
    return out.fill_(1) if like.numel() < LARGE and like.is_floating_point() else out


def skipped(launch: Callable) -> Callable:
    def call(self, *args, **kwargs):
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        # the interpreter copies the whole storage of each tensor
        if not any(isinstance(x, Tensor) and x.untyped_storage().nbytes() >= LARGE for x in given.values()):
            return launch(self, *args, **kwargs)
        if "partials_ptr" in given:  # sums of the flat updates, of which some are divisors
            given["partials_ptr"].fill_(1)

    return call


@contextmanager
def hollow(label: Callable[[], int] = lambda: 0) -> Iterator[None]:
    launch = interpreter.GridExecutor.__call__
    interpreter.GridExecutor.__call__ = skipped(launch)
    pretended.poison(False)
    try:
        with Hollow(label):
            yield
    finally:
        interpreter.GridExecutor.__call__ = launch
        pretended.poison(True)
