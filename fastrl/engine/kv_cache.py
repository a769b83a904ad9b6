"""The pages of vLLM's KV cache, given back to the device while the trainer works, at addresses that stay.

The cache lies in vLLM's cuMem pool: memory is taken from under its addresses and put back there, so captured graphs
stay valid. Only the segments that back KV tensors are touched, whatever else carries their tag. New pages hold
anything, NaN included, which masked rows would still be multiplied with: they are zeroed.
"""

import torch
from torch import Tensor

from fastrl.base.types import EngineError


class KvPages:
    """tensors: of a model runner's `kv_caches`; on a CPU there is nothing to give back."""

    def __init__(self, kv_caches: list):
        self.tensors: list[Tensor] = [
            t for cache in kv_caches for t in (cache if isinstance(cache, (list, tuple)) else [cache])
        ]
        self.on_device = bool(self.tensors) and self.tensors[0].is_cuda
        self.mapped = True

    @property
    def storages(self) -> dict[int, torch.UntypedStorage]:
        """By address: layers may share one."""
        return {t.untyped_storage().data_ptr(): t.untyped_storage() for t in self.tensors}

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())

    def segments(self) -> list:
        from vllm.device_allocator.cumem import CuMemAllocator

        pool = CuMemAllocator.get_instance().pointer_to_data
        starts = self.storages.keys()
        if starts - pool.keys():
            raise EngineError(
                "the KV cache of this vLLM version does not start at segments of its pool; use --vllm.kv keep"
            )
        return [pool[start] for start in sorted(starts)]

    def release(self) -> None:
        """Give the pages back. The caller has drained the engine and dropped its prefix cache."""
        if not self.on_device or not self.mapped:
            return
        from vllm.device_allocator.cumem import unmap_and_release

        torch.cuda.synchronize()
        for segment in self.segments():
            unmap_and_release(segment.handle)
            mark(segment, asleep=True)
        self.mapped = False

    def restore(self) -> None:
        """Put pages of zeros under the same addresses. Raises EngineError, and has none, where memory is short."""
        if not self.on_device or self.mapped:
            return
        from vllm.device_allocator.cumem import create_and_map, unmap_and_release

        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what torch keeps for itself cannot be mapped
        done = []
        try:
            for segment in self.segments():
                create_and_map(segment.handle)
                done.append(segment)
        except Exception as error:
            for segment in done:
                unmap_and_release(segment.handle)
            free, _ = torch.cuda.mem_get_info()
            raise EngineError(
                f"the KV cache takes {self.nbytes / 2**30:.1f} GiB, but after training {free / 2**30:.1f} GiB of the "
                "device are free: lower --vllm.kv-gib, or --tokens-per-microbatch"
            ) from error
        for segment in done:
            mark(segment, asleep=False)
        for storage in self.storages.values():
            # a tensor of its own over it, for those that were made in inference mode cannot be written outside of it
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).zero_()
        self.mapped = True


def mark(segment, *, asleep: bool) -> None:
    """Keep vLLM's own note of what is mapped right, where it has one."""
    if hasattr(segment, "is_asleep"):
        segment.is_asleep = asleep
