"""Host memory for a GPU: exactly as much as is asked for, locked while it is there; activations without gaps in it."""

import ctypes
from pathlib import Path

import pytest
import torch

from fastrl.weights import host_slabs
from fastrl.weights.host_memory import host_memory, page_locked
from fastrl.weights.host_slabs import Forward, HostSlabs

LIBC = ctypes.CDLL(None, use_errno=True)


def mlock(address: int, size: int, flags: int) -> int:
    """As cudaHostRegister, of the system itself."""
    return LIBC.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size))


def mapped(address: int) -> str:
    """The line of this process' map that holds an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= address < high:
            return line
    return ""


def test_pages_are_locked_as_long_as_they_are_there():
    size, unlocked = 3 * 4096 + 5, []

    def munlock(address: int) -> None:
        error = LIBC.munlock(ctypes.c_void_p(address), ctypes.c_size_t(size))
        unlocked.append((address, bool(mapped(address)), error))

    memory, error = page_locked(size, mlock, munlock)
    if error:
        pytest.skip("this system locks no pages")
    assert memory.shape == (size,) and memory.dtype == torch.uint8
    address = memory.data_ptr()
    low, high = (int(part, 16) for part in mapped(address).split()[0].split("-"))
    assert address % 4096 == 0 and low <= address and address + size <= high
    memory.fill_(7)
    assert memory.sum() == 7 * size and not unlocked
    del memory
    assert unlocked == [(address, True, 0)]  # before the memory went


def test_a_system_that_locks_nothing_gives_plain_memory_and_a_line():
    unlocked = []
    with pytest.warns(UserWarning, match=r"0.00 GiB of host memory cannot be locked \(error 2\): copies .* slower"):
        memory, error = page_locked(5000, lambda *args: 2, unlocked.append)
    assert error == 2 and memory.fill_(3).sum() == 15000
    del memory
    assert not unlocked


def test_without_a_gpu_it_is_a_plain_tensor():
    assert host_memory(5, locked=False).shape == host_memory(0, locked=True).new_empty(5).shape == (5,)


@pytest.fixture
def small_slabs(monkeypatch):
    monkeypatch.setattr(host_slabs, "SLAB", 1000)


def test_a_forward_fills_slabs_without_gaps(small_slabs):
    home = HostSlabs(locked=False)
    forward = Forward(home)
    tensors = [torch.randn(37, 5), torch.arange(700.0).view(7, 100).T, torch.arange(3) > 1, torch.randn(8).bfloat16()]
    kept = [forward.put(x) for x in tensors]
    assert len(forward.slabs) == 4  # 740 + 2800 + 3 + 16 bytes
    assert [len(k.pieces) for k in kept] == [1, 4, 1, 1]
    for one, x in reversed(list(zip(kept, tensors, strict=True))):
        back = one.back()
        assert back.dtype == x.dtype and torch.equal(back, x) and back.data_ptr() != x.data_ptr()


def test_slabs_are_used_again_when_all_of_a_forward_is_let_go(small_slabs):
    home = HostSlabs(locked=False)
    first = [Forward(home).put(torch.ones(600)), None]  # 2400 bytes
    second = Forward(home).put(torch.ones(600))
    held = {slab.data_ptr() for slab in (*first[0].forward.slabs, *second.forward.slabs)}
    assert len(held) == 6 and not home.unused
    first[1] = first[0].forward.put(torch.ones(3))
    first[0] = None
    assert not home.unused
    first[1] = None
    assert len(home.unused) == 3
    third = Forward(home).put(torch.zeros(700))
    assert {slab.data_ptr() for slab in third.forward.slabs} < held and len(home.unused) == 0
    assert second.back().sum() == 600 and third.back().sum() == 0
