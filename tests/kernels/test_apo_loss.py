"""Squared regression of whole completions: the kernel against its definition in float64, by hand, and at the edges."""

import math
from functools import partial

import pytest
import torch

from fastrl.kernels.apo_loss import apo_loss, apo_loss_ref
from fastrl.kernels.vectors import BLOCK_N

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernel = partial(apo_loss, triton=True)
PATHS = pytest.mark.parametrize("function", [kernel, apo_loss_ref], ids=["triton", "torch"])


def completions(lengths, seed=0):
    """logprobs, ref_logprobs, cu_seqlens, optimal_value, reward, w_seq"""
    g = torch.Generator().manual_seed(seed)
    N, B = sum(lengths), len(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    logp = -3 * torch.rand(N, generator=g)
    values = [logp, logp + 0.3 * torch.randn(N, generator=g), cu, torch.rand(B, generator=g),
              torch.rand(B, generator=g).round(), torch.full((B,), 1 / max(B, 1))]  # fmt: skip
    return [x.to(DEVICE) for x in values]


def double(inputs):
    return [x.double() if x.is_floating_point() else x for x in inputs]


@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 1, 0], [5, 1, 700], [BLOCK_N - 1, BLOCK_N, BLOCK_N + 1], [5000]])
@pytest.mark.parametrize("beta2", [1e-3, 0.5])
def test_kernel_is_its_definition(lengths, beta2):
    inputs = completions(lengths, seed=len(lengths))
    for ours, truth in zip(kernel(*inputs, beta2), apo_loss_ref(*double(inputs), beta2), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=1e-6)


@PATHS
def test_by_hand(function):
    # u = (-1 + 1.5) + (-2 + 1) = -0.5; residual = 2 * -0.5 + 0.25 - 1 = -1.75; loss = 0.5 * 3.0625
    inputs = [torch.tensor(x, device=DEVICE) for x in ([-1.0, -2.0], [-1.5, -1.0])]
    inputs += [torch.tensor([0, 2], dtype=torch.int32, device=DEVICE)]
    inputs += [torch.tensor([x], device=DEVICE) for x in (0.25, 1.0, 0.5)]
    loss, coef, u = function(*inputs, 2.0)
    assert (loss.item(), u.item()) == (1.53125, -0.5)
    assert coef.tolist() == [2 * 2 * 0.5 * -1.75] * 2


@PATHS
def test_a_long_completion_does_not_drift(function):
    # 0.1 is no binary fraction: a running float32 sum of 200 000 is off by 0.1 %, 1024 lanes by 1e-6
    N = 200_000
    logp, ref = torch.full((N,), 0.1, device=DEVICE), torch.zeros(N, device=DEVICE)
    cu = torch.tensor([0, N], dtype=torch.int32, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    u = function(logp, ref, cu, one, one, one, 1.0).u.item()
    assert u == pytest.approx(N * float(torch.tensor(0.1)), rel=2e-6)


@PATHS
def test_a_completion_of_weight_zero_may_hold_anything(function):
    logp, ref, cu, value, reward, w = completions([3, 4, 5])
    w[1] = 0.0
    clean = function(logp, ref, cu, value, reward, w, 0.1)
    logp[3:7], value[1] = math.nan, math.inf
    dirty = function(logp, ref, cu, value, reward, w, 0.1)
    assert torch.equal(dirty.coef, clean.coef) and torch.equal(dirty.loss, clean.loss)
    assert not dirty.coef[3:7].any()


def test_what_does_not_fit_is_refused():
    logp, ref, cu, value, reward, w = completions([3, 4])
    with pytest.raises(ValueError, match=r"cu_seqlens must be int32 \[3\].* got torch.int64 \(3,\)"):
        apo_loss(logp, ref, cu.long(), value, reward, w, 0.1)
    with pytest.raises(ValueError, match="ref_logprobs must be a contiguous float32 vector as long as logprobs"):
        apo_loss(logp, ref[:-1], cu, value, reward, w, 0.1)
    with pytest.raises(ValueError, match="w_seq must be a contiguous float32 vector as long as optimal_value"):
        apo_loss(logp, ref, cu, value, reward, w[:1], 0.1)
