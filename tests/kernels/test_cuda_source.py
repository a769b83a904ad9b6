"""The kernels of csrc/flat_update.cu against their definitions, compiled for the CPU: what they write and sum."""

import ctypes
import math

import pytest
import torch

from fastrl.weights import nvrtc
from fastrl.weights.backends import NUM_STATS, kernel_arguments
from fastrl.weights.halves import join, split
from fastrl.weights.library import Arguments
from fastrl.weights.moves_ref import extrapolate_ref_, interpolate_ref_
from support.host_kernels import compiled_by_gcc

pytestmark = pytest.mark.slow
GRID = 2
SIZES = [1, 7, 8, 2051, 8 * 512 * GRID + 1029]  # the last takes a second round of the grid, and has a tail
INF, NAN = math.inf, math.nan


@pytest.fixture(scope="module")
def kernels():
    return compiled_by_gcc("""
#include "host_cuda.h"
#include "flat_update.cu"
extern "C" void run(void (*kernel)(Arguments), const Arguments* a, int grid) { run_blocks(kernel, *a, grid, kThreads); }
""")


def run(kernels, theta, anchor, alpha, **given):
    """As `flat_backends.run` does it -> the sums."""
    given = dict(lookahead=2, scale_max=1.0) | given
    partials = torch.full((GRID, NUM_STATS), NAN, dtype=torch.float64)
    arguments = kernel_arguments(theta=theta, anchor=anchor, alpha=alpha, partials=partials, **given)
    assert isinstance(arguments, Arguments)
    kernel = kernels[nvrtc.kernel_name(arguments)]
    kernels.run(kernel, ctypes.byref(arguments), GRID)
    return partials.sum(dim=0)


def shards(n, mode):
    """theta, anchor, and what the mode takes; ratios on both sides of both clamps."""
    generator = torch.Generator().manual_seed(n)
    anchor, g0, noise = torch.randn(3, n, generator=generator).unbind()
    g1 = g0 * (0.3 + 2 * noise)
    theta = anchor - 1e-3 * (g0 + g1)
    given = dict(x0=g0, x1=g1) if mode == "gradients" else dict(x0=-1e-3 * g0, x1=None)
    return theta, anchor.contiguous(), given


NUMBERS = dict(lookahead=10, lr=1e-3, weight_decay=0.01, ratio_min=-2.0, ratio_max=3.0, scale_max=6.0)


def wanted(mode, theta, anchor, alpha, given, threshold=None, segment=None, dtype=torch.float32):
    """Where the definition leads and its sums."""
    theta, anchor = theta.to(dtype).clone(), anchor.to(dtype)
    if mode == "interpolate":
        return theta, interpolate_ref_(theta, anchor, alpha, None, None)
    x0, x1 = (None if x is None else x.to(dtype) for x in (given["x0"], given["x1"]))
    lookahead, *numbers = NUMBERS.values()
    threshold = None if threshold is None else threshold.to(dtype)
    sums = extrapolate_ref_(theta, anchor, x0, x1, lookahead, alpha, *numbers, threshold, segment, None, None)
    return theta, sums


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(
    "mode, limits",
    [
        ("interpolate", False),
        ("gradients", False),
        ("gradients", True),
        ("displacements", False),
        ("displacements", True),
    ],
)
def test_kernels_do_what_the_definitions_say(mode, limits, halves, n, kernels):
    theta, anchor, given = shards(n, mode)
    blocks = -(-n // 1024)
    segment = torch.arange(blocks, dtype=torch.int32) // 2 if limits else None
    threshold = torch.linspace(0.1, 1.0, blocks // 2 + 1) if limits else None
    more = {} if mode == "interpolate" else NUMBERS | given | dict(threshold=threshold, segment=segment)
    options = (mode, theta, anchor, 0.3, given, threshold, segment)
    exact, truth = wanted(*options, dtype=torch.float64)
    plain, plain_sums = wanted(*options)
    half = torch.zeros(n, dtype=torch.bfloat16)
    if halves:
        ours, low = split(theta)
        sums = run(kernels, ours, anchor, 0.3, low=low, **more)
        moved = join(ours, low)
        assert torch.equal(ours, split(moved)[0]) and torch.equal(low, split(moved)[1])
        whole = theta.clone()
        torch.testing.assert_close(run(kernels, whole, anchor, 0.3, **more), sums, rtol=1e-6, atol=1e-9)
        assert torch.equal(moved, whole)
    else:
        moved = theta.clone()
        sums = run(kernels, moved, anchor, 0.3, out_bf16=half, **more)
        assert torch.equal(half, moved.bfloat16())
    error, theirs = (moved - exact).abs().max(), (plain - exact).abs().max()
    assert error <= 2 * theirs + 4 * 1.2e-7 * exact.abs().max()
    # a displacement is only as exact as ulp(theta) / lr: the definition in float32 sees the same ratios
    torch.testing.assert_close(sums, truth if mode == "gradients" else plain_sums, rtol=1e-4, atol=1e-9)
    assert sums[0] == n and (n < 2000 or mode == "interpolate" or sums[7] > 100)


@pytest.mark.parametrize("halves", [False, True])
def test_both_ends_are_exact_to_the_bit_from_anywhere(halves, kernels):
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1.00390625, -1.01171875, largest, -largest, INF, -INF])
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    values = torch.cat([values, nans])
    theta, anchor = (x.contiguous() for x in torch.cartesian_prod(values, values).unbind(1))
    for alpha, end in ((0.0, anchor), (1.0, theta)):
        ours, low = split(theta) if halves else (theta.clone(), None)
        run(kernels, ours, anchor, alpha, low=low)
        moved, number = join(ours, low) if halves else ours, ~end.isnan()
        assert torch.equal(moved.view(torch.int32)[number], end.view(torch.int32)[number])
        assert moved[~number].isnan().all()
        assert not halves or torch.equal(ours.view(torch.int16), split(end)[0].view(torch.int16))


def test_special_coordinates_by_hand(kernels):
    g0 = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, NAN, 1.0, INF, 0.0, 1e-9, 1e-40])
    g1 = torch.tensor([1.0, 0.0, -1.0, -9.0, 9.0, 0.5, 1.0, NAN, 1.0, 1.0, 1.0, 1e-40])
    theta, anchor = torch.ones(12), torch.zeros(12)
    sums = run(kernels, theta, anchor, 1.0, x0=g0, x1=g1, **NUMBERS)
    # K = 10: r = 1 -> 5, 0 -> 1, -1 -> 1, -2 -> 341 -> 6, 3 -> 6, 0.5 -> (1 - 2^-10) / 0.5 / 1.5; the rest stays
    assert theta.tolist() == pytest.approx([5.0, 1.0, 1.0, 6.0, 6.0, 1.33203125] + [1.0] * 6, rel=1e-6)
    # elements, before_sq, active, clamped, nonfinite
    assert sums[[0, 1, 3, 7, 8]].tolist() == [12, 12, 5, 2, 3]
