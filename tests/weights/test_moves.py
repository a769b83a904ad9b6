"""In-place moves over flat shards: exact ends, the geometric series by hand, every guard, and shards that add up."""

import pytest
import torch

from fastrl.weights.halves import split
from fastrl.weights.moves import Extrapolation, extrapolate_, interpolate_
from fastrl.weights.moves_ref import CHUNK, series

F64 = torch.float64


def vectors(n, *seeds, dtype=torch.float32):
    return [torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=dtype) for seed in seeds]


@pytest.mark.parametrize("n", [1, 7, 1023, 1024, 4097])
def test_interpolation_is_exact_at_both_ends_and_within_an_ulp_between(n):
    theta, anchor = vectors(n, 1, 2)
    for alpha in (0.0, 1.0, 0.3, 0.8, 1.5, -0.2):
        moved = theta.clone()
        stats = interpolate_(moved, anchor, alpha).named()
        exact = anchor.double() + alpha * (theta.double() - anchor.double())
        assert ((moved.double() - exact).abs() <= 1.2e-7 * (exact.abs() + (theta - anchor).abs())).all()
        if alpha in (0.0, 1.0):
            assert torch.equal(moved, theta if alpha else anchor)
        assert stats["elements"] == n
        assert stats["before_sq"] == pytest.approx((theta - anchor).double().square().sum().item(), rel=1e-6)
        assert stats["after_sq"] == pytest.approx((moved - anchor).double().square().sum().item(), rel=1e-6)


def test_bfloat16_weights_are_the_master_rounded_to_nearest():
    theta, anchor = vectors(2048, 1, 2)
    weights = torch.empty(2048, dtype=torch.bfloat16)
    interpolate_(theta, anchor, 0.7, out_bf16=weights)
    assert torch.equal(weights, theta.bfloat16())
    g0, g1 = vectors(2048, 3, 4)
    extrapolate_(theta, anchor, 4, 0.5, grads=(g0, g1), out_bf16=weights)
    assert torch.equal(weights, theta.bfloat16())


def scale_of(ratios, lookahead=10, dtype=F64, **options):
    """What a displacement of 1 becomes at alpha = 1, for g0 = 1 and g1 = ratio."""
    ratios = torch.tensor(ratios, dtype=dtype)
    theta, anchor = torch.ones_like(ratios), torch.zeros_like(ratios)
    stats = extrapolate_(theta, anchor, lookahead, 1.0, grads=(torch.ones_like(ratios), ratios), **options)
    return theta.tolist(), stats.named()


def test_scale_by_hand():
    # r = 0: 1 / 1; r = 1: 10 / 2; r = 0.5: (1 - 2^-10) / 0.5 / 1.5; r = 3 -> ceiling 10 / 2 + 1; r = -1: no scale
    scale, stats = scale_of([0.0, 1.0, 0.5, 3.0, -1.0])
    assert scale == pytest.approx([1.0, 5.0, 1.33203125, 6.0, 1.0], abs=1e-14)
    # clamped to [-2, 3]: S_3(-2) / S_2(-2) = (1 - 2 + 4) / -1 = -3 -> floor 1; 4 and 1e9 like 3: 13 / 4 -> 2.5
    scale, stats = scale_of([-9.0, 4.0, 1e9, 0.5], lookahead=3)
    assert scale == pytest.approx([1.0, 2.5, 2.5, 1.75 / 1.5])
    assert stats["clamped"] == 3 and stats["active"] == 4
    assert stats["ratio"] == pytest.approx(-2 + 3 + 3 + 0.5) and stats["ratio_sq"] == pytest.approx(4 + 9 + 9 + 0.25)
    assert stats["scale"] == pytest.approx(1 + 2.5 + 2.5 + 1.75 / 1.5)
    assert scale_of([1.0], scale_max=3.0)[0] == [3.0]
    assert scale_of([0.3, 0.9, -0.5], lookahead=2)[0] == pytest.approx([1.0] * 3, abs=1e-15)  # two steps are two steps


def test_scale_of_whole_tensors_by_hand():
    # <g0, g1> / <g0, g0>: 1 / 2, -1 / 2, 6 / 2 -> 1.5, -8 / 2 -> -1 (no scale), 0 / 0 -> 0. S_3 / S_2 of each
    law = Extrapolation(lookahead=3, alpha=1.0)
    inner, square = torch.tensor([[1.0, -1.0, 6.0, -8.0, 0.0], [2.0, 2.0, 2.0, 2.0, 0.0]], dtype=F64)
    ratio, scale = law.by_tensor(inner, square)
    assert ratio.tolist() == [0.5, -0.5, 1.5, -1.0, 0.0]
    assert scale.tolist() == pytest.approx([1.75 / 1.5, 0.75 / 0.5, 4.75 / 2.5, 1.0, 1.0], abs=1e-15)


def test_flat_coordinates_are_extrapolated_in_float32_too():
    # the closed form (1 - r^K) / (1 - r) would be 0 / 0 here
    ratio = torch.tensor([1.0, 1 - 1e-7, 1 + 1e-7])
    assert series(ratio, 10).tolist() == pytest.approx([5.0] * 3, rel=1e-5)
    assert scale_of([1.0], dtype=torch.float32)[0] == [5.0]


def test_coordinates_that_cannot_be_extrapolated_go_two_steps():
    nan, inf = float("nan"), float("inf")
    g0 = torch.tensor([1.0, nan, 0.0, 1.0, 1e-9, 1e-9, inf, 0.0])
    g1 = torch.tensor([nan, 1.0, 1.0, inf, 1e-9, 0.5, 1.0, 0.0])
    theta, anchor = torch.full((8,), 3.0), torch.ones(8)
    stats = extrapolate_(theta, anchor, 6, 1.0, grads=(g0, g1)).named()
    assert theta.tolist() == [3.0] * 8
    assert stats["nonfinite"] == 4 and stats["active"] == 0 and stats["scale"] == 8


def test_each_tensor_has_its_own_threshold():
    n = 4 * 1024
    theta, anchor = torch.ones(n), torch.zeros(n)
    g0, g1 = torch.full((n,), 0.1), torch.full((n,), 0.1)
    segment = torch.tensor([0, 1, 1, 2], dtype=torch.uint8)
    extrapolate_(theta, anchor, 8, 1.0, grads=(g0, g1), threshold=torch.tensor([0.05, 0.1, 0.2]), segment=segment)
    # r = 1: scale 4 where 0.1 is above the threshold, which only the first tensor's is
    assert theta.view(4, 1024).mean(dim=1).tolist() == [4.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("lr, bound", [(1e-4, 5e-5), (1e-6, 6e-4), (1e-7, 6e-3)])
def test_directions_are_those_of_adamw(lr, bound):
    """theta' = (1 - lr wd) theta - lr d, read off the displacement, against m^ / (sqrt(v^) + eps)."""
    from fastrl.weights.moves_ref import direction

    parameter = torch.nn.Parameter(vectors(50_000, 5)[0] * 1e-2)
    optimizer = torch.optim.AdamW([parameter], lr=lr, weight_decay=0.01)
    grads = vectors(50_000, *range(30))
    for grad in grads:
        before = parameter.detach().clone()
        parameter.grad = grad * 1e-6
        optimizer.step()
    state, t = optimizer.state[parameter], len(grads)
    m, v = state["exp_avg"] / (1 - 0.9**t), state["exp_avg_sq"] / (1 - 0.999**t)
    wanted = m / (v.sqrt() + 1e-8)
    got = direction(before, parameter.detach() - before, lr, 0.01)
    assert (got - wanted).square().mean().sqrt() < bound < wanted.square().mean().sqrt()
    without = direction(before, parameter.detach() - before, lr, 0.0)
    assert (without - wanted).square().mean().sqrt() > 1e-4 * 0.9  # the decay term wd theta is 1e-4 here


def test_extrapolating_displacements_by_hand():
    # lr 0.1, wd 0.5: decay 0.05. theta: 2 -> u0 = -0.3 -> theta_1 = 1.7 -> theta_2 = 1.5
    # d0 = (0.3 - 0.05 * 2) / 0.1 = 2, d1 = (0.2 - 0.05 * 1.7) / 0.1 = 1.15, r = 0.575
    theta, anchor, u0 = (torch.tensor([x], dtype=F64) for x in (1.5, 2.0, -0.3))
    stats = extrapolate_(theta, anchor, 3, 0.5, u0=u0, lr=0.1, weight_decay=0.5).named()
    scale = (1 + 0.575 + 0.575**2) / 1.575
    assert stats["ratio"] == pytest.approx(0.575) and stats["scale"] == pytest.approx(scale)
    assert theta.item() == pytest.approx(2.0 - 0.5 * scale * 0.5)
    theta = torch.tensor([1.5], dtype=F64)
    # without a learning rate there is no direction to compare
    neutral = extrapolate_(theta, anchor, 9, 1.0, u0=u0, lr=0.0, weight_decay=0.5).named()
    assert theta.item() == 1.5 and (neutral["scale"], neutral["active"]) == (1.0, 0)


def test_shards_are_moved_like_the_whole():
    n = 3 * 1024 + 2 * CHUNK
    theta, anchor, g0, g1 = vectors(n, 1, 2, 3, 4)
    threshold, segment = torch.tensor([0.1, 0.5]), (torch.arange(n // 1024) > 1500).long()
    whole = theta.clone()
    stats = extrapolate_(whole, anchor, 5, 0.5, grads=(g0, g1), threshold=threshold, segment=segment)
    total = 0
    for part in (slice(0, 1024), slice(1024, CHUNK + 2048), slice(CHUNK + 2048, n)):
        blocks = slice(part.start // 1024, part.stop // 1024)
        shard = theta[part].clone()
        total += extrapolate_(
            shard, anchor[part], 5, 0.5, grads=(g0[part], g1[part]), threshold=threshold, segment=segment[blocks]
        ).sums
        assert torch.equal(shard, whole[part])
    assert torch.allclose(total, stats.sums, rtol=1e-6)


def test_what_does_not_match_is_refused():
    a, b = torch.zeros(4), torch.zeros(5)
    with pytest.raises(
        ValueError, match=r"anchor must be torch.float32 \(4,\) on cpu, got torch.float32 \(5,\) on cpu"
    ):
        interpolate_(a, b, 0.5)
    with pytest.raises(ValueError, match="out_bf16 must be torch.bfloat16"):
        interpolate_(a, a, 0.5, out_bf16=torch.zeros(4))
    with pytest.raises(ValueError, match="g1 must be torch.float32"):
        extrapolate_(a, a, 3, 0.5, grads=(a, a.double()))
    with pytest.raises(ValueError, match=r"either grads=\(g0, g1\) or u0, got neither"):
        extrapolate_(a, a, 3, 0.5)
    with pytest.raises(ValueError, match="got both"):
        extrapolate_(a, a, 3, 0.5, grads=(a, a), u0=a)
    with pytest.raises(ValueError, match="at least 2 steps, got lookahead=1"):
        extrapolate_(a, a, 1, 0.5, grads=(a, a))
    with pytest.raises(ValueError, match=r"anchor must be .* got .*, not contiguous: strides \(2,\)"):
        interpolate_(a, torch.zeros(8)[::2], 0.5)
    high, low = split(a)
    with pytest.raises(ValueError, match="go together, got a shard of torch.bfloat16 without low"):
        interpolate_(high, a, 0.5)
    with pytest.raises(ValueError, match="go together, got a shard of torch.float32 with low"):
        interpolate_(a, a, 0.5, low=low)
    with pytest.raises(ValueError, match=r"low must be torch.int16 \(4,\) on cpu, got torch.int32 \(4,\) on cpu"):
        extrapolate_(high, a, 3, 0.5, u0=a, low=low.int())
    with pytest.raises(ValueError, match="anchor must be torch.float32"):
        interpolate_(high, high, 0.5, low=low)
    with pytest.raises(ValueError, match="out_bf16 must be None with low"):
        interpolate_(high, a, 0.5, low=low, out_bf16=high.clone())
    with pytest.raises(ValueError, match="contiguous vector"):
        interpolate_(torch.zeros(4, 2), torch.zeros(4, 2), 0.5)


def operators(n=1500):
    """Both as the dispatcher has them, with every optional argument and with none."""
    theta, anchor, x0, x1 = vectors(n, 1, 2, 3, 4)
    high, low = split(theta)
    half = torch.zeros(n, dtype=torch.bfloat16)
    numbers = (5, 0.5, 1e-3, 0.01, -2.0, 3.0, 3.5)
    limits = (torch.tensor([0.1, 0.5]), torch.tensor([0, 1], dtype=torch.int32))
    interpolate, extrapolate = torch.ops.fastrl.interpolate_.default, torch.ops.fastrl.extrapolate_.default
    yield interpolate, (theta, anchor, 0.3, None, half, None)
    yield interpolate, (high, anchor, 0.3, low, None, None)
    yield extrapolate, (theta.clone(), anchor, x0, x1, *numbers, *limits, None, half.clone(), "torch")
    yield extrapolate, (high.clone(), anchor, x0, None, *numbers, None, None, low.clone(), None, None)


@pytest.mark.parametrize("at", range(4))
def test_operators_say_what_they_change_and_return(at):
    """Schema, mutated arguments, fake tensors and tracing with dynamic shapes, by PyTorch's own checker."""
    operator, arguments = list(operators())[at]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("halves", [False, True])
def test_compiled_code_moves_shards_like_eager_code(halves):
    def move(theta, anchor, x0, x1, low, half):
        one = interpolate_(theta, anchor, 0.5, low=low, out_bf16=half).sums
        other = extrapolate_(theta, anchor * 2, 4, 0.5, grads=(x0, x1), low=low, out_bf16=half).sums
        return one + other, theta.float() * 2

    def arguments():
        theta, anchor, x0, x1 = vectors(3000, 1, 2, 3, 4)
        high, low = split(theta)
        return [high, anchor, x0, x1, low, None] if halves else [theta, anchor, x0, x1, None, torch.zeros_like(high)]

    eager, compiled = arguments(), arguments()
    wanted = move(*eager)
    got = torch.compile(move, fullgraph=True, backend="aot_eager")(*compiled)
    pairs = zip((*wanted, *eager), (*got, *compiled), strict=True)
    assert all(one is None or torch.equal(one, other) for one, other in pairs)
    changed = [not torch.equal(a, b) for a, b in zip(arguments(), compiled, strict=True) if a is not None]
    assert changed == [True, False, False, False, True]
