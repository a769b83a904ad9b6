"""Log-probabilities of logits that exist: against float64, in every dtype, and at the edges."""

import math
from functools import partial

import pytest
import torch

from fastrl.kernels import rows
from fastrl.kernels.selective_logprob import selective_logprob, selective_logprob_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernel = partial(selective_logprob, triton=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(rows, "BLOCK_V", 256)


def run(function, logits, target, upstream, inv_temperature):
    logits = logits.detach().clone().requires_grad_()
    outputs = function(logits, target, inv_temperature)
    sum((o * u.to(o.dtype)).sum() for o, u in zip(outputs, upstream, strict=True)).backward()
    return [o.detach() for o in outputs], logits.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N, V", [(0, 5), (1, 1), (3, 255), (3, 256), (4, 1003)])
@pytest.mark.parametrize("inv_temperature", [1.0, 0.5])
def test_is_its_definition(dtype, N, V, inv_temperature):
    g = torch.Generator().manual_seed(V)
    logits = (4 * torch.randn(N, V, generator=g)).to(dtype).to(DEVICE)
    target = torch.randint(0, V, (N,), generator=g).to(DEVICE)
    upstream = torch.randn(3, N, generator=g).to(DEVICE)
    truth, dtruth = run(selective_logprob_ref, logits.double(), target, upstream, inv_temperature)
    ours, dours = run(kernel, logits, target, upstream, inv_temperature)
    for x, y in zip(ours, truth, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=2e-5)
    bound = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    assert dours.dtype == dtype and (dours.double() - dtruth).norm() <= bound * dtruth.norm() + 1e-7


def test_infinite_logits():
    """-inf is a word that cannot be; as the target it has no probability, and nothing else breaks."""
    logits = torch.tensor([[0.0, -math.inf, math.log(3)], [-math.inf, 1.0, 1.0], [math.nan, 0.0, 0.0]], device=DEVICE)
    target = torch.tensor([2, 0, 1], device=DEVICE)
    logprobs, lse, entropy = kernel(logits, target)
    assert logprobs[0].item() == pytest.approx(math.log(0.75), abs=1e-6) and logprobs[1] == -math.inf
    assert entropy[0].item() == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), abs=1e-6)
    assert entropy[1].item() == pytest.approx(math.log(2), abs=1e-6)
    assert torch.stack([logprobs[2], lse[2], entropy[2]]).isnan().all()
    _, grad = run(kernel, logits[:1], target[:1], torch.ones(3, 1, device=DEVICE), 1.0)
    assert grad.isfinite().all() and grad[0, 1] == 0
    _, grad = run(kernel, logits[1:2], target[1:2], torch.tensor([[1.0], [0.0], [0.0]], device=DEVICE), 1.0)
    assert grad.tolist() == [pytest.approx([1.0, -0.5, -0.5], abs=1e-6)]  # d logprob / dz of a target that cannot be


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_equal_logits_and_a_certain_word(value):
    logits = torch.full((2, 300), value, device=DEVICE)
    logits[1, 7] += 1e4
    logprobs, _, entropy = kernel(logits.clone(), torch.tensor([3, 7], device=DEVICE))
    assert logprobs[0].item() == pytest.approx(-math.log(300), abs=2e-5) and logprobs[1] == 0
    assert entropy[0].item() == pytest.approx(math.log(300), abs=2e-5) and entropy[1] == 0
    _, grad = run(kernel, logits[1:], torch.tensor([7], device=DEVICE), torch.ones(3, 1)[:, :], 1.0)
    assert grad[0, 7] == 1 and grad.abs().sum() == 1  # of lse alone


@pytest.mark.parametrize("bad", [-1, 8, 9])
def test_an_id_that_is_no_word_is_never_a_number(bad):
    logits = torch.randn(3, 8, device=DEVICE)
    logprobs, lse, _ = kernel(logits, torch.tensor([1, bad, 2], device=DEVICE))
    assert logprobs.isnan().tolist() == [False, True, False] and lse.isfinite().all()


def test_what_does_not_fit_is_refused():
    logits = torch.ones(4, 8)
    with pytest.raises(ValueError, match=r"logits \[N, V\] and ids \[N\], got \(4, 8\) and \(3,\)"):
        selective_logprob(logits, torch.zeros(3).long())
    with pytest.raises(ValueError, match="contiguous bfloat16, float16 or float32 logits, got torch.float64"):
        selective_logprob(logits.double(), torch.zeros(4).long())
    with pytest.raises(ValueError, match=r"with strides \(1, 4\)"):
        selective_logprob(torch.ones(8, 4).T, torch.zeros(4).long())


def test_without_triton_it_is_the_definition():
    logits, ids = torch.randn(3, 8, device="cpu"), torch.tensor([1, 7, 2])
    ours, truth = selective_logprob(logits, ids, 0.5), selective_logprob_ref(logits, ids, 0.5)
    assert all(torch.equal(x, y) for x, y in zip(ours, truth, strict=True))
