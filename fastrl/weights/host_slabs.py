"""Activations of one forward at a time on the host, packed without gaps into slabs that every forward uses again.

What is saved first comes back last, so a forward fills slabs from the front, cuts a tensor where one ends, and gives
them all back when autograd has let go of its last tensor. Memory is that of the largest forward, and at most a slab.
"""

import torch
from torch import Tensor

from fastrl.weights.host_memory import host_memory

SLAB = 1 << 26  # bytes


class HostSlabs:
    """locked: for CUDA."""

    def __init__(self, locked: bool):
        self.locked = locked
        self.unused: list[Tensor] = []

    def take(self) -> Tensor:
        """[SLAB] uint8."""
        return self.unused.pop() if self.unused else host_memory(SLAB, self.locked)


class Forward:
    """What a forward has saved in slabs of `home`. Copies are in the order of the device's stream, the host reads none.

    It lives as long as one of its tensors.
    """

    def __init__(self, home: HostSlabs):
        self.home, self.room = home, 0
        self.slabs: list[Tensor] = []

    def __del__(self):
        self.home.unused += self.slabs

    @torch.no_grad()
    def put(self, x: Tensor) -> "Kept":
        """A copy of a tensor."""
        left, pieces = as_row(x.contiguous()), []
        while len(left):
            if not self.room:
                self.slabs.append(self.home.take())
                self.room = SLAB
            size, start = min(self.room, len(left)), SLAB - self.room
            pieces.append(self.slabs[-1][start : start + size].copy_(left[:size], non_blocking=True))
            left, self.room = left[size:], self.room - size
        return Kept(self, pieces, torch.empty_like(x, device="meta", memory_format=torch.contiguous_format), x.device)


class Kept:
    """A tensor in pieces of slabs. like: its shape and dtype; device: where it was."""

    def __init__(self, forward: Forward, pieces: list[Tensor], like: Tensor, device: torch.device):
        self.forward, self.pieces, self.like, self.device = forward, pieces, like, device

    @torch.no_grad()
    def back(self) -> Tensor:
        """The tensor, on its device."""
        tensor = torch.empty_like(self.like, device=self.device)
        parts = as_row(tensor).split([len(piece) for piece in self.pieces])
        for part, piece in zip(parts, self.pieces, strict=True):
            part.copy_(piece, non_blocking=True)
        return tensor


def as_row(tensor: Tensor) -> Tensor:
    """A contiguous tensor -> [bytes] uint8 over the same memory."""
    return tensor.detach().view(-1).view(torch.uint8)
