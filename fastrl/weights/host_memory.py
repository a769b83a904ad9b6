"""Host memory that a GPU copies from and to by itself, of the size that is asked for.

torch's own allocator of such memory rounds up to powers of two and keeps what was freed: 33 GiB of optimizer states
would take 64. Here pages are taken from the system and locked as they are.
"""

import mmap
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor


def host_memory(size: int, locked: bool) -> Tensor:
    """[size] uint8. locked: its pages are locked, for CUDA; where the system refuses, a warning and plain memory."""
    if not locked or not size:
        return torch.empty(size, dtype=torch.uint8)
    cudart = torch.cuda.cudart()
    assert cudart is not None  # of a torch without CUDA
    memory, error = page_locked(size, lambda *args: int(cudart.cudaHostRegister(*args)), cudart.cudaHostUnregister)
    if error:
        with suppress(RuntimeError):  # the next launch would be blamed for what CUDA remembers as its last error
            torch.ones(1, device="cuda")
    return memory


def page_locked(size: int, lock: Callable[[int, int, int], int], unlock: Callable[[int], object]) -> tuple[Tensor, int]:
    """lock(address, bytes, flags) -> [size] uint8 and the error that lock gave, 0 for none.

    unlock(address) is called when the tensor goes, before its memory does. A view that outlives it is no longer locked.
    """
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    error = lock(memory.data_ptr(), size, 0)
    if error:
        text = f"{size / 2**30:.2f} GiB of host memory cannot be locked (error {error}): copies by the GPU are slower"
        warnings.warn(text, stacklevel=3)
    else:
        weakref.finalize(memory, unlock, memory.data_ptr()).atexit = False  # the end of the process unlocks
    return memory, error
