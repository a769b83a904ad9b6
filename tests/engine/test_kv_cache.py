"""Giving the KV cache's pages back and restoring them: which, in what order, and what a failure leaves behind."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastrl.base.types import EngineError
from fastrl.engine.kv_cache import KvPages
from fastrl.engine.vllm import VllmConfig


class Device:
    """In the place of vLLM's cuMem pool and CUDA: what is called, in order."""

    def __init__(self, tensors, monkeypatch):
        self.calls = []
        starts = [t.untyped_storage().data_ptr() for t in tensors]
        others = [1 << 40, 1 << 41]  # weights and metadata lie in the pool too
        self.pool = {start: SimpleNamespace(handle=start, is_asleep=False) for start in [*starts, *others]}
        self.room = len(starts)  # segments that can be mapped
        cumem = ModuleType("vllm.device_allocator.cumem")
        cumem.CuMemAllocator = SimpleNamespace(get_instance=lambda: SimpleNamespace(pointer_to_data=self.pool))
        cumem.unmap_and_release = lambda handle: self.calls.append(("unmap", handle))
        cumem.create_and_map = self.map
        monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", cumem)
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda name=name: self.calls.append((name, None)))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 << 30, 80 << 30))

    def map(self, handle):
        if sum(call == "map" for call, _ in self.calls) == self.room:
            raise RuntimeError("out of memory")
        self.calls.append(("map", handle))

    def take(self):
        taken, self.calls = self.calls, []
        return taken


@pytest.fixture
def cache(monkeypatch):
    """Four layers, one of them as a pair of tensors, two of them views of one; -> their pages and the device."""
    with torch.inference_mode():
        tensors = [torch.full((4, 8), float("nan")) for _ in range(4)]
    pages = KvPages([tensors[0][:, :5], tensors[0][:, 3:], tensors[1], [tensors[2], tensors[3]]])
    pages.on_device = True
    return pages, Device(tensors, monkeypatch)


def test_only_the_cache_is_released_and_once(cache):
    pages, device = cache
    wanted = {t.untyped_storage().data_ptr() for t in pages.tensors}
    pages.release()
    calls = device.take()
    assert calls[0] == ("synchronize", None) and {h for name, h in calls[1:] if name == "unmap"} == wanted
    assert len(calls) == 1 + 4 and not pages.mapped
    assert {start for start, s in device.pool.items() if s.is_asleep} == wanted
    pages.release()
    assert device.take() == []


def test_restored_pages_are_zeros_and_torch_gives_its_own_back_first(cache):
    pages, device = cache
    pages.restore()
    assert device.take() == []  # they are there
    pages.release()
    device.take()
    pages.restore()
    assert [name for name, _ in device.take()] == ["synchronize", "empty_cache", "map", "map", "map", "map"]
    assert pages.mapped and not any(s.is_asleep for s in device.pool.values())
    assert all((t == 0).all() for t in pages.tensors)


def test_a_restore_that_fails_leaves_nothing_mapped(cache):
    pages, device = cache
    pages.release()
    device.take()
    device.room = 2
    with pytest.raises(EngineError, match=r"the KV cache takes 0.0 GiB, but after training 3.0 GiB .* --vllm.kv-gib"):
        pages.restore()
    calls = device.take()
    mapped, unmapped = ([h for name, h in calls if name == which] for which in ("map", "unmap"))
    assert len(mapped) == 2 and unmapped == mapped and not pages.mapped
    assert sum(s.is_asleep for s in device.pool.values()) == 4


def test_a_pool_that_is_laid_out_otherwise_is_refused(cache):
    pages, device = cache
    del device.pool[pages.tensors[1].untyped_storage().data_ptr()]
    with pytest.raises(EngineError, match="does not start at segments of its pool; use --vllm.kv keep"):
        pages.release()
    assert pages.mapped


def test_on_a_cpu_there_is_nothing_to_give_back():
    pages = KvPages([torch.ones(4)])
    pages.release()
    pages.restore()
    assert pages.mapped and (pages.tensors[0] == 1).all() and pages.nbytes == 16


@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(kv_gib=-1.0), "--vllm.kv-gib must be at least 0, got -1.0"),
        (dict(max_num_batched_tokens=0), "--vllm.max-num-batched-tokens must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        VllmConfig(**setting)
