"""Squared regression of whole completions: the kernel against its definition in float64, by hand, and at the edges."""

import math
from functools import partial

import pytest
import torch

from fastrl.kernels.apo_loss import apo_loss, apo_loss_ref
from fastrl.kernels.vectors import BLOCK_N
from support.device import DEVICE

kernel = partial(apo_loss, triton=True)
PATHS = pytest.mark.parametrize("function", [kernel, apo_loss_ref], ids=["triton", "torch"])


def completions(lengths, seed=0, prompt=2):
    """logprobs, ref_logprobs, mask, target of completions behind a prompt; outside the mask there is NaN."""
    g = torch.Generator().manual_seed(seed)
    B, S = len(lengths), prompt + max(lengths, default=0) + 1
    column, length = torch.arange(S), torch.tensor(lengths, dtype=torch.int64)[:, None]
    mask = (column >= prompt) & (column < prompt + length)
    logp = torch.where(mask, -3 * torch.rand(B, S, generator=g), math.nan)
    ref = logp + 0.3 * torch.randn(B, S, generator=g)
    target = torch.rand(B, generator=g).round() - torch.rand(B, generator=g)
    return [x.to(DEVICE) for x in (logp, ref, mask, target)]


def double(inputs):
    return [x.double() if x.is_floating_point() else x for x in inputs]


def run(function, inputs, beta2, above=None):
    """loss, residual, u, and the gradient in the log-probabilities of the losses times `above`."""
    leaf = inputs[0].detach().requires_grad_()
    out = function(leaf, *inputs[1:], beta2)
    above = torch.ones_like(out.loss) if above is None else above.to(out.loss)
    (gradient,) = torch.autograd.grad((out.loss * above).sum(), leaf)
    return [*(x.detach() for x in out), gradient]


@pytest.mark.parametrize("lengths", [[0], [1], [0, 1, 0], [5, 1, 700], [BLOCK_N - 1, BLOCK_N, BLOCK_N + 1], [5000]])
@pytest.mark.parametrize("beta2", [1e-3, 0.5])
def test_kernel_is_its_definition(lengths, beta2):
    inputs = completions(lengths, seed=len(lengths))
    above = torch.linspace(0.5, 2.0, len(lengths))
    for ours, truth in zip(
        run(kernel, inputs, beta2, above), run(apo_loss_ref, double(inputs), beta2, above), strict=True
    ):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=1e-6)


@PATHS
def test_by_hand(function):
    # u = (-1 + 1.5) + (-2 + 1) = -0.5; residual = 2 * -0.5 - 0.75 = -1.75; loss = 3.0625; slope 2 * 2 * -1.75
    logp, ref = (torch.tensor([[math.nan, *row]], device=DEVICE) for row in ([-1.0, -2.0], [-1.5, -1.0]))
    mask = torch.tensor([[False, True, True]], device=DEVICE)
    loss, residual, u, gradient = run(function, [logp, ref, mask, torch.tensor([0.75], device=DEVICE)], 2.0)
    assert (loss.item(), residual.item(), u.item()) == (3.0625, -1.75, -0.5)
    assert gradient.tolist() == [[0.0, -7.0, -7.0]]


@PATHS
def test_a_long_completion_does_not_drift(function):
    # 0.1 is no binary fraction: a running float32 sum of 200 000 is off by 0.1 %, 1024 lanes by 1e-6
    N = 200_000
    logp, ref = torch.full((1, N), 0.1, device=DEVICE), torch.zeros(1, N, device=DEVICE)
    mask = torch.ones(1, N, dtype=torch.bool, device=DEVICE)
    u = function(logp, ref, mask, torch.ones(1, device=DEVICE), 1.0).u.item()
    assert u == pytest.approx(N * float(torch.tensor(0.1)), rel=2e-6)


@PATHS
def test_a_completion_without_tokens_has_no_loss_whatever_its_target_is(function):
    inputs = completions([3, 0, 5])
    clean = run(function, inputs, 0.1)
    inputs[3][1] = math.inf
    dirty = run(function, inputs, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert dirty[0][1] == dirty[1][1] == 0 and not dirty[3][1].any()


@PATHS
def test_a_broken_token_breaks_its_own_completion_alone(function):
    inputs = completions([3, 2])
    good = run(function, inputs, 0.1)
    inputs[0][1, 2] = math.nan
    bad = run(function, inputs, 0.1)
    assert bad[0][1].isnan() and bad[3][1, 2].isnan()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(good, bad, strict=True))


def test_nothing_has_no_loss():
    for shape in ((0, 5), (2, 0)):
        rows, mask = torch.zeros(shape, device=DEVICE), torch.zeros(shape, dtype=torch.bool, device=DEVICE)
        out = kernel(rows, rows, mask, torch.ones(shape[0], device=DEVICE), 1.0)
        assert out.loss.tolist() == out.u.tolist() == [0.0] * shape[0]


def test_what_does_not_fit_is_refused():
    logp, ref, mask, target = completions([3, 4])
    with pytest.raises(ValueError, match=r"ref_logprobs must be \[2, 7\] on .*, got \(2, 6\)"):
        apo_loss(logp, ref[:, 1:], mask, target, 0.1)
    with pytest.raises(ValueError, match=r"target must be \[2\] on .*, got \(1,\)"):
        apo_loss(logp, ref, mask, target[:1], 0.1)
    with pytest.raises(ValueError, match="mask must be torch.bool, got torch.int64"):
        apo_loss(logp, ref, mask.long(), target, 0.1)
    with pytest.raises(ValueError, match="the kernel takes torch.float32, got torch.float64"):
        kernel(logp.double(), ref, mask, target, 0.1)
