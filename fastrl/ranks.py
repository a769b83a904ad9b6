"""Which process of how many this is, and the three collectives the trainer needs. Without torchrun: rank 0 of 1."""

import os

import torch
import torch.distributed as dist
from torch import Tensor


def start() -> None:
    """Join the process group that torchrun describes in the environment; nothing to do without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def stop() -> None:
    if dist.is_initialized():
        dist.barrier()  # a rank that leaves early can abort the others' last collective
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum_(values: Tensor) -> Tensor:
    """Replace `values` by their sum over ranks, in place."""
    if size() > 1:
        dist.all_reduce(values)
    return values


def all_max(value: float) -> float:
    """The largest of the ranks' values."""
    if size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    values = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.item()


def reduce_shard(full: Tensor) -> Tensor:
    """full [P] on every rank -> this rank's slice [P / ranks] of the sum over ranks; a view when there is one rank."""
    if size() == 1:
        return full
    if dist.get_backend() == "gloo":  # gloo has no reduce-scatter
        dist.all_reduce(full)
        return full.chunk(size())[rank()]
    shard = torch.empty(full.numel() // size(), dtype=full.dtype, device=full.device)
    dist.reduce_scatter(shard, list(full.chunk(size())))
    return shard


def gather_shards(full: Tensor) -> None:
    """Fill `full` [P] on every rank from the slices that each rank has written into its own part."""
    if size() > 1:
        own = full.chunk(size())[rank()].clone()
        dist.all_gather(list(full.chunk(size())), own)


def barrier() -> None:
    if size() > 1:
        dist.barrier()


def gather_rows(table: Tensor) -> Tensor:
    """Put the rows of every rank's table [n, C] together, in rank order; the ranks' n may differ."""
    if size() == 1:
        return table
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size())]
    dist.all_gather(counts, torch.tensor([len(table)], device=device))
    longest = max(int(c) for c in counts)
    padded = torch.zeros(longest, table.shape[1], dtype=table.dtype, device=device)
    padded[: len(table)] = table
    parts = [torch.zeros_like(padded) for _ in range(size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)]).to(table.device)
