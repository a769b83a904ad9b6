"""Collectives of several processes that each have the pretended device: gloo's, on the memory that both see."""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor


def install(host: Callable[[Tensor], Tensor]) -> None:
    """Let torch.distributed take tensors of the device. host: the same memory as a tensor of the CPU."""
    start, all_reduce = dist.init_process_group, dist.all_reduce
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def init_process_group(backend: str, **options) -> None:
        start(backend.replace("cuda:nccl", "cuda:gloo"), **options)

    def reduced(tensor: Tensor, *args, **options):
        return all_reduce(host(tensor), *args, **options)

    def gathered(output: Tensor, own: Tensor, *args, **options):
        return gather(host(output), host(own).clone(), *args, **options)  # gloo takes no slice of the output

    def scattered(output: Tensor, whole: Tensor, *args, **options) -> None:
        total = host(whole).clone()  # gloo has no reduce-scatter
        all_reduce(total)
        host(output).copy_(total.chunk(dist.get_world_size())[dist.get_rank()])

    dist.init_process_group, dist.all_reduce = init_process_group, reduced
    for name, function in (
        ("all_gather_single", gathered),
        ("all_gather_into_tensor", gathered),
        ("reduce_scatter_single", scattered),
        ("reduce_scatter_tensor", scattered),
    ):
        if hasattr(dist, name):
            setattr(dist, name, function)
