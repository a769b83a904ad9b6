"""Tensors whose bytes are on the host for a while.

A storage on the device becomes empty and gets its bytes back later. Tensors over it, an optimizer's among them, stay
the objects that they are, but must not be read in between.
"""

import torch
from torch import Tensor

from fastrl.weights.host_memory import host_memory

LEAST = 1024  # elements; what is smaller stays where it is


class HostCopies:
    def __init__(self):
        self.away: dict[int, tuple[Tensor, Tensor]] = {}  # storage -> a tensor over it, its bytes
        self.free: dict[int, list[Tensor]] = {}  # number of bytes -> host buffers of earlier copies, locked for CUDA

    def put(self, tensor: Tensor) -> None:
        """Move the whole storage of a tensor to the host; small ones, and memory that is not torch's own, stay.

        The states of a paged optimizer are such memory: they move by themselves.
        """
        storage = tensor.untyped_storage()
        if tensor.numel() < LEAST or storage._cdata in self.away or not storage.resizable():
            return
        size = storage.nbytes()
        unused = self.free.get(size)
        host = unused.pop() if unused else host_memory(size, locked=tensor.is_cuda)
        host.copy_(as_bytes(tensor))
        storage.resize_(0)
        self.away[storage._cdata] = tensor, host

    def read(self, tensor: Tensor) -> Tensor:
        """The values of a tensor wherever they are; do not write to it."""
        _, host = self.away.get(tensor.untyped_storage()._cdata, (tensor, None))
        if host is None:
            return tensor
        view = torch.empty(0, dtype=tensor.dtype)
        return view.set_(host.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())

    def back(self) -> None:
        """Give every storage its bytes back."""
        for tensor, host in self.away.values():
            tensor.untyped_storage().resize_(len(host))
            as_bytes(tensor).copy_(host)
            self.free.setdefault(len(host), []).append(host)
        self.away.clear()


def as_bytes(tensor: Tensor) -> Tensor:
    """All bytes of a tensor's storage, [bytes] uint8 over the same memory."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
