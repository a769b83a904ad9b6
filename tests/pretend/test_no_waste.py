"""What an optimizer step launches and allocates, and what offloading takes of the host, on the pretended device."""

import pytest
import torch

from fastrl.weights import host_slabs
from fastrl.weights.activations import saved_on_host
from fastrl.weights.halves import split
from fastrl.weights.halves_adamw import HalvesAdamW
from fastrl.weights.host_slabs import HostSlabs
from fastrl.weights.norm import norm_over_ranks
from fastrl.weights.offload import HostCopies
from fastrl.weights.optim import OptimConfig, ShardOptimizer
from support.pretend.needed import cuda

N = 1 << 16


def vector(n: int = N, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).cuda()


def step_of(optimizer, gradient, divisor):
    """-> operators that a step launches beside its kernel, waits, bytes that it allocates."""
    optimizer.step(gradient, divisor)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with cuda.watched() as watch, torch.no_grad():
        optimizer.step(gradient, divisor)
    return watch.launches, watch.waits, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_a_split_master_is_stepped_by_one_kernel(grad_dtype):
    high, low = split(vector())
    launches, waits, taken = step_of(HalvesAdamW(OptimConfig(), high, low), vector(seed=1).to(grad_dtype), 2.0)
    # a bfloat16 gradient is clipped by a pass of its own
    assert launches == ({} if grad_dtype == torch.float32 else {"aten::mul": 1})
    assert waits == [] and taken == 0


def test_clipping_adds_one_number_to_a_fused_step():
    optimizer = ShardOptimizer(OptimConfig(), vector())
    plain = step_of(optimizer, vector(seed=1), 1.0)
    clipped = step_of(optimizer, vector(seed=1), 2.0)
    assert clipped[0] - plain[0] == {"aten::fill_": 1} and clipped[1] == plain[1] == []
    assert clipped[2] - plain[2] == 512  # a block of the allocator


def test_the_norm_waits_once():
    gradient = vector()
    with cuda.watched() as watch:
        norm = norm_over_ranks(gradient)
    assert norm == pytest.approx(gradient.cpu().norm().item(), rel=1e-6) and len(watch.waits) == 1


def test_what_is_offloaded_is_locked_and_no_larger():
    before = dict(cuda.runtime.locked)
    tensors, host = [vector(3000), vector(5001)], HostCopies()
    copies = [x.cpu() for x in tensors]
    for tensor in tensors:
        host.put(tensor)
    locked = cuda.runtime.locked.items() - before.items()
    assert sorted(size for _, size in locked) == [4 * 3000, 4 * 5001]
    host.back()
    assert all(torch.equal(x.cpu(), copy) for x, copy in zip(tensors, copies, strict=True))
    assert cuda.runtime.locked.items() - before.items() == locked  # for the next time
    del host
    assert cuda.runtime.locked == before


def test_activations_go_to_locked_slabs_and_come_back_without_a_wait(monkeypatch):
    monkeypatch.setattr(host_slabs, "SLAB", 10_000)
    weights, slabs = vector(64 * 64), HostSlabs(locked=True)
    matrix = weights.view(64, 64).requires_grad_()
    x = vector(32 * 64).view(32, 64)

    def gradient(kept: HostSlabs | None) -> torch.Tensor:
        with saved_on_host(weights, kept):
            loss = ((x @ matrix).tanh() @ matrix).exp().sum()
        (found,) = torch.autograd.grad(loss, matrix)
        return found

    expected, size = gradient(None), len(cuda.runtime.locked)
    with cuda.watched() as watch:
        found = gradient(slabs)
    copies = [event[0] for event in watch.events if "host_slabs.py" in event[3]]
    assert torch.equal(found, expected) and watch.waits == []
    assert copies.count("download") > 4 and copies.count("upload") > 4
    # x, tanh's result for itself and for the product, and exp's: 8 KB each, without gaps
    assert len(slabs.unused) == len(cuda.runtime.locked) - size == 4
    assert torch.equal(gradient(slabs), expected) and len(slabs.unused) == 4
