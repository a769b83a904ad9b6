"""The pretended CUDA device itself: it refuses what CUDA refuses, tells what waits, and counts its memory."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from support.pretend.needed import cuda


def vector(n: int = 4) -> torch.Tensor:
    return torch.arange(float(n), device="cuda")


@pytest.mark.parametrize(
    "fault, message",
    [
        (lambda: vector() + torch.ones(4), "same device"),
        (lambda: torch.ones(4)[torch.zeros(2, dtype=torch.int64, device="cuda")], "indices should be either on cpu"),
        (lambda: vector().index_select(0, torch.zeros(2, dtype=torch.int64)), "same device"),
        (lambda: torch.ones(4).masked_fill_(vector() > 1, 0.0), "same device|expected self and mask"),
        (lambda: vector().numpy(), "can't convert cuda:0 device type tensor to numpy"),
        (lambda: vector(4).long().view(2, 2) @ vector(4).long().view(2, 2), "not implemented for"),
        (
            lambda: torch.mm(vector().double().view(2, 2), vector().double().view(2, 2), out_dtype=torch.float32),
            "out_dtype",
        ),
    ],
    ids=["sum", "index", "index_select", "mask", "numpy", "integers", "out_dtype"],
)
def test_what_cuda_refuses_is_refused(fault, message):
    with pytest.raises((RuntimeError, TypeError), match=message):
        fault()


@pytest.mark.parametrize(
    "waiting, operator",
    [
        (lambda x: x.sum().item(), "item"),
        (lambda x: float(x[0]), "item"),
        (lambda x: x.cpu(), "copy to the host"),
        (lambda x: x.tolist(), "copy to the host"),
        (lambda x: x[x > 1], "nonzero"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x.unique(), "_unique2"),
        (lambda x: x[torch.tensor([1])], "by an index of the host"),
        (lambda x: x.new_tensor([1.0]), "copy to the device"),
        (lambda x: torch.ones(4).to("cuda"), "copy to the device"),
        (lambda x: torch.cuda.synchronize(), "synchronize"),
    ],
    ids=[
        "item",
        "float",
        "cpu",
        "tolist",
        "mask",
        "nonzero",
        "unique",
        "host index",
        "new_tensor",
        "to",
        "synchronize",
    ],
)
def test_what_waits_is_told(waiting, operator, monkeypatch):
    monkeypatch.setattr(cuda, "where", lambda: "here")
    x = vector()
    with cuda.watched() as watch:
        waiting(x)
    assert any(operator in wait for wait in watch.waits), watch.events


def test_what_does_not_wait_is_silent(monkeypatch):
    monkeypatch.setattr(cuda, "where", lambda: "here")
    x, index = vector(), torch.tensor([1, 2], device="cuda")
    with cuda.watched() as watch:
        x[index] = x.index_select(0, index).clamp(0, 1)
        torch.where(x > 0, x, 0.0).sum().sqrt()
        x.masked_fill_(x > 1, float("nan"))
        torch.ones(4, pin_memory=True).to("cuda", non_blocking=True)
    assert watch.waits == [] and [event[0] for event in watch.events] == ["upload"]
    assert watch.launches["aten::index_select"] == 1


def test_memory_is_counted_and_runs_out():
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = torch.empty(1000, device="cuda")
    assert torch.cuda.memory_allocated() - before == 4096  # blocks of 512
    del x
    assert torch.cuda.memory_allocated() == before and torch.cuda.max_memory_allocated() == before + 4096
    storage = vector(1024).untyped_storage()
    storage.resize_(0)
    assert storage.nbytes() == 0 and torch.cuda.memory_allocated() == before
    cuda.pretended.limit(before + 1024)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.empty(1000, device="cuda")
    finally:
        cuda.pretended.limit(0)


def test_new_memory_holds_nothing_that_passes_for_a_number():
    assert torch.empty(8, device="cuda").isnan().all()


def rows_of(x: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    return list(x.split(lengths))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_that_of_the_cpu(causal):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 7, 16) for _ in range(3)]
    found = []
    for device in ("cpu", "cuda"):
        leaves = [x.detach().to(device).requires_grad_() for x in inputs]
        out = scaled_dot_product_attention(*leaves, is_causal=causal)
        out.square().sum().backward()
        found.append([out.detach().cpu(), *(x.grad.cpu() for x in leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 2])
def test_ragged_attention_is_that_of_its_rows(window):
    from torch.nn.attention.varlen import varlen_attn

    torch.manual_seed(0)
    lengths, bounds = [3, 5], torch.tensor([0, 3, 8], dtype=torch.int32, device="cuda")
    query, key, value = torch.randn(8, 4, 16), torch.randn(8, 2, 16), torch.randn(8, 2, 16)
    leaves = [x.cuda().bfloat16().requires_grad_() for x in (query, key, value)]
    look_back = (-1 if window is None else window - 1, 0)
    out = varlen_attn(*leaves, bounds, bounds, 5, 5, window_size=look_back, enable_gqa=True)
    out.float().square().sum().backward()
    plain = [x.detach().cpu().float().requires_grad_() for x in leaves]
    rows = []
    for q, k, v in zip(*(rows_of(x, lengths) for x in plain), strict=True):
        mask = torch.ones(len(q), len(q), dtype=torch.bool).tril()
        mask = mask if window is None else mask.triu(1 - window)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        rows.append(scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1))
    truth = torch.cat(rows)
    truth.square().sum().backward()
    for mine, wanted in zip([out.detach(), *(x.grad for x in leaves)], [truth, *(x.grad for x in plain)], strict=True):
        torch.testing.assert_close(mine.cpu().float(), wanted, rtol=0.02, atol=0.05)
