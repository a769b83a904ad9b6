"""Which process of how many this is, and the collectives the trainer needs. Without torchrun: rank 0 of 1."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl.base.exhausted import means_out_of_memory
from fastrl.base.types import EngineError

# torch 2.13 has new names for these and warns at the old ones, which torch 2.10 to 2.12 alone have
gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def start(device: str, timeout_s: float = 0.0) -> None:
    """Join the process group that torchrun describes in the environment; nothing to do without it.

    Tensors on the CPU travel by gloo, those on a GPU by NCCL. timeout_s: how long a collective waits for the others;
    0 = torch's own limits. Raises EngineError if they do not come.
    """
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():
        wait: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)} if timeout_s else {}
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        with reaching_others():
            store, own, count = next(dist.rendezvous("env://", **wait))
            dist.init_process_group(backend, store=of_this_start(store), rank=own, world_size=count, **wait)


def of_this_start(store: dist.Store) -> dist.Store:
    """torchrun has one store for all its restarts, in which a new rank can find the address of one that is dead.

    On several boxes the counts of restarts may differ: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a new store.
    """
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return store
    return dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


@contextmanager
def reaching_others() -> Iterator[None]:
    """Around a collective: one that fails, for a rank is dead or stuck, is an EngineError.

    gloo notices a closed connection at once and raises a plain RuntimeError, as it does when the time is up.
    """
    try:
        yield
    except RuntimeError as error:
        if means_out_of_memory(error):
            raise
        said = re.sub(r"^\[\S*\] ", "", str(error)).partition(". ")[0]  # without the line of C++ it comes from
        raise EngineError(
            f"rank {os.environ.get('RANK')} of {world_size()} cannot reach the others any more: one of them has ended, "
            f"or stands still ({said})"
        ) from error


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> None:
    """End this process without tearing the interpreter down, which gloo's threads can abort (pytorch#179291)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end(code: int) -> int:
    """The exit code of a program that is through; with several ranks, the end of this process."""
    if world_size() > 1:
        leave(code)
    return code


def world_size() -> int:
    """Processes that torchrun has started, known before `start`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum_(values: Tensor) -> Tensor:
    """Replace `values` by their sum over ranks, in place."""
    if size() > 1:
        with reaching_others():
            dist.all_reduce(values)
    return values


def all_max(value: float) -> float:
    """The largest of the ranks' values."""
    if size() == 1:
        return value
    values = torch.tensor([value], dtype=torch.float64)
    with reaching_others():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.item()


def all_sum(value: float) -> float:
    """The sum of the ranks' values."""
    return all_sum_(torch.tensor([value], dtype=torch.float64)).item()


def first_text(text: str) -> str:
    """The lowest rank's text that is not empty, on every rank; empty where all are."""
    return next(filter(None, gather(text)), "")


def all_counts(counts: dict[str, float]) -> dict[str, float]:
    """Sum dicts of numbers over ranks; a name that some rank lacks counts as 0 there."""
    if size() == 1:
        return counts
    parts = gather(counts)
    return {name: sum(part.get(name, 0) for part in parts) for name in dict.fromkeys(n for p in parts for n in p)}


def all_means(means: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Means by name, each with the count of what it is a mean over -> means over all that was counted on any rank.

    A rank that lacks a name, or counted nothing, adds nothing: {"a": (1.0, 6)} and {"a": (0.0, 2)} -> {"a": 0.75}.
    """
    parts, found = gather(means), {}
    for name in dict.fromkeys(n for part in parts for n in part):
        counted = [part[name] for part in parts if name in part and part[name][1]]
        if len(counted) == 1:
            found[name] = counted[0][0]  # to the bit
        elif counted:
            found[name] = sum(mean * count for mean, count in counted) / sum(count for _, count in counted)
    return found


def gather(value: object) -> list:
    """What every rank has, in rank order, on every rank; anything that can be pickled."""
    parts: list = [value] * size()
    if size() > 1:
        with reaching_others():
            dist.all_gather_object(parts, value)
    return parts


def reduce_shard(full: Tensor) -> Tensor:
    """full [P] on every rank -> this rank's slice [P / ranks] of the sum over ranks; a view when there is one rank."""
    if size() == 1:
        return full
    if not full.is_cuda:  # gloo has no reduce-scatter
        return all_sum_(full).chunk(size())[rank()]
    shard = torch.empty(full.numel() // size(), dtype=full.dtype, device=full.device)
    with reaching_others():
        reduce_scatter_flat(shard, full)  # the form with a list of slices copies them all
    return shard


def gather_shards(full: Tensor) -> None:
    """Fill `full` [P] on every rank from the slices that each rank has written into its own part."""
    if size() > 1:
        own = full.chunk(size())[rank()]
        with reaching_others():
            gather_flat(full, own if full.is_cuda else own.clone())  # NCCL gathers in place


def gather_rows(table: Tensor) -> Tensor:
    """Put the rows of every rank's table [n, C] (on the CPU) together, in rank order; the ranks' n may differ."""
    if size() == 1:
        return table
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
    with reaching_others():
        dist.all_gather(counts, torch.tensor([len(table)]))
    longest = max(int(c) for c in counts)
    padded = torch.zeros(longest, table.shape[1], dtype=table.dtype)
    padded[: len(table)] = table
    parts = [torch.zeros_like(padded) for _ in range(size())]
    with reaching_others():
        dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


def barrier() -> None:
    if size() > 1:
        with reaching_others():
            dist.barrier()
