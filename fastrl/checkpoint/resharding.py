"""Shards that other ranks have written -> this rank's: all of them are slices of one flat buffer."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fastrl.base.types import CheckpointError
from fastrl.checkpoint.tensor_form import rule_of, split_name
from fastrl.weights.buffer import ALIGN


def reslice(files: list[Path], sizes: dict[str, int], rank: int, ranks: int, device: str) -> dict[str, Tensor]:
    """files: one for each rank that wrote, in order; sizes: elements of this run's shards by prefix -> rank's tensors.

    Reads no more than what lies in this rank's shard. The buffers end in zeros that depend on the number of ranks.
    Raises CheckpointError for 8-bit states, whose scales belong to the shards they were taken in, and where the rest
    of a longer buffer is not zero.
    """
    readers = [safe_open(file, framework="pt", device=device) for file in files]
    first, tensors = readers[0], {}
    for name in first.keys():  # noqa: SIM118, a reader is no dict
        prefix, rest = split_name(name)
        rule = rule_of(rest)
        assert rule is not None, name  # check_tensors refuses others
        if rule.each == "same":
            tensors[name] = first.get_tensor(name)
            if any(not torch.equal(other.get_tensor(name), tensors[name]) for other in readers):
                raise CheckpointError(f"{files[0].parent}: {name} differs between ranks; use another checkpoint")
            continue
        slices = [reader.get_slice(name) for reader in readers]
        if rule.each == "block" or slices[0].get_dtype() == "U8":
            raise CheckpointError(
                f"{files[0].parent}: written by {len(files)} ranks, and this run has {ranks}: {name} is 8-bit state, "
                f"whose scales belong to the shards of {len(files)} ranks; start {len(files)}"
            )
        then, now = slices[0].get_shape()[0], sizes[prefix]
        if abs(then * len(files) - now * ranks) > ALIGN * max(len(files), ranks):
            raise CheckpointError(
                f"{files[0].parent}: {name} has {then * len(files)} elements and this model {now * ranks}; "
                "it belongs to another model"
            )
        found = cut(slices, then, rank * now, (rank + 1) * now)
        tensors[name] = torch.cat([*found, found[0].new_zeros(now - sum(map(len, found)))])
        if any(rest.any() for rest in cut(slices, then, ranks * now, then * len(files))):
            raise CheckpointError(f"{files[0].parent}: {name} does not end in zeros; it belongs to another model")
    return tensors


def cut(slices: list, each: int, start: int, stop: int) -> list[Tensor]:
    """Elements start to stop of what lies in slices of `each` elements; at least one tensor, that may be empty."""
    bounds = [(max(start - k * each, 0), min(stop - k * each, each)) for k in range(len(slices))]
    return [s[a:b] for s, (a, b) in zip(slices, bounds, strict=True) if a < b] or [slices[0][:1][:0]]
