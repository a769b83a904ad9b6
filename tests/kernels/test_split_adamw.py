"""AdamW on halves: the definition to the bit against torch's over float32, the kernel in Triton's interpreter."""

import math

import pytest
import torch

from fastrl.kernels.split_adamw import split_adamw_
from fastrl.weights import halves_adamw
from fastrl.weights.halves import join, split
from fastrl.weights.halves_adamw import HalvesAdamW, adamw_halves_ref_, kernel_on
from fastrl.weights.optim import OptimConfig, ShardOptimizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ULP = torch.finfo(torch.float32).eps


def start(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_the_definition_is_torchs_adamw_to_the_bit(grad_dtype, monkeypatch):
    monkeypatch.setattr(halves_adamw, "PART", 2048)
    monkeypatch.setattr(halves_adamw, "kernel_on", lambda device: False)
    config = OptimConfig(lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)
    theta = start(5 * 1024)
    high, low = split(theta)
    whole, halves = ShardOptimizer(config, theta), HalvesAdamW(config, high, low)
    assert halves.state_tensors() == {} and halves.snapshot() == {}
    for step, divisor in enumerate((1.0, 3.7, 1.0), start=1):
        first = start(len(theta), seed=step).to(grad_dtype)
        second = first.clone()
        whole.step(first, divisor)
        halves.step(second, divisor)
        assert torch.equal(first, second) and torch.equal(join(high, low), theta)
        assert {n: t.dtype for n, t in whole.state_tensors().items()} == {
            n: t.dtype for n, t in halves.state_tensors().items()
        }
        for name, state in whole.state_tensors().items():
            assert torch.equal(state.cpu(), halves.state_tensors()[name].cpu()), name


HARD = {
    "usual": {},
    "no momentum": {"betas": (0.0, 0.0)},
    "slow": {"betas": (0.4, 0.999)},
    "no decay": {"weight_decay": 0.0},
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("n", [0, 1, 1023, 1024, 3 * 1024 + 5])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_follows_the_definition(case, n, grad_dtype):
    factors = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1) | HARD[case]
    theirs = [*split(start(n)), torch.zeros(n, device=DEVICE), torch.zeros(n, device=DEVICE)]
    ours = [x.clone() for x in theirs]
    for step in (1, 2, 3):
        divisor = 5.0 if step == 2 and grad_dtype == torch.float32 else 1.0
        gradients = [start(n, seed=step).to(grad_dtype) for _ in range(2)]
        place, mean = join(*theirs[:2]), theirs[2].abs()
        adamw_halves_ref_(*theirs[:2], gradients[0], *theirs[2:], step, divisor=divisor, **factors)
        split_adamw_(*ours[:2], gradients[1], *ours[2:], step, divisor=divisor, **factors)
        assert torch.equal(*gradients)
        # roundings of the terms, which may cancel, an ulp of where it is, and those of the step's quotient
        terms = mean + gradients[0].abs()
        assert ((ours[2] - theirs[2]).abs() <= 2 * ULP * terms).all()
        torch.testing.assert_close(ours[3], theirs[3], rtol=4 * ULP, atol=0)
        root = (theirs[3].double() / (1 - factors["betas"][1] ** step)).sqrt() + factors["eps"]
        step_size = factors["lr"] / (1 - factors["betas"][0] ** step)
        moved, expected = join(*ours[:2]), join(*theirs[:2])
        assert ((moved - expected).abs() <= ULP * expected.abs() + 4 * ULP * step_size * terms / root).all()
        assert n < 1000 or (expected - place).abs().median() > 1e-3
        for mine, other in zip(ours, theirs, strict=True):
            mine.copy_(other)


def test_the_kernel_on_numbers_at_the_ends():
    """The largest floats, whose upper halves are infinite, denormal ones, both zeros, and what is no number."""
    largest = torch.finfo(torch.float32).max
    theta = torch.tensor([largest, -largest, 1e-40, 0.0, -0.0, math.inf, -math.inf, math.nan], device=DEVICE)
    high, low = split(theta)
    moments, gradient = torch.zeros(2, 8, device=DEVICE), torch.zeros(8, device=DEVICE)
    factors = dict(divisor=1.0, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    split_adamw_(high, low, gradient, moments[0], moments[1], 1, **factors)
    found = join(high, low)
    assert torch.equal(found[:7], theta[:7]) and found[7].isnan() and not moments.any()
    gradient.view(torch.int32)[0] = 0x7FFFFFFF  # NaN of which a rounded upper half would be -0
    split_adamw_(high, low, gradient, moments[0], moments[1], 1, **factors)
    assert high[0].isnan() and join(high, low)[0].isnan() and torch.equal(join(high, low)[1:7], theta[1:7])


def test_states_round_trip_and_are_of_a_plain_master():
    config = OptimConfig(lr=1e-2)
    plain, (high, low) = start(2048), split(start(2048))
    whole, halves = ShardOptimizer(config, plain), HalvesAdamW(config, high, low)
    for step in range(2):
        whole.step(start(2048, seed=step))
    halves.load_state_tensors({name: tensor.clone() for name, tensor in whole.state_tensors().items()})
    assert halves.state_names() == whole.state_names() == ["step", "exp_avg", "exp_avg_sq"]
    kept = halves.snapshot()
    halves.scale_first_moment(0.5)
    assert torch.equal(halves.state_tensors()["exp_avg"], kept["exp_avg"] * 0.5)
    halves.step(start(2048, seed=9))
    assert halves.state_tensors()["step"] == 3
    halves.restore(kept)
    for name, tensor in whole.state_tensors().items():
        assert torch.equal(halves.state_tensors()[name].cpu(), tensor.cpu()), name
    halves.restore({})
    assert halves.state_tensors() == {}
    halves.step(start(2048, seed=9))
    assert halves.state_tensors()["step"] == 1


def test_a_kernel_that_does_not_come_out_right_is_not_used(monkeypatch):
    from fastrl.kernels import split_adamw

    assert not kernel_on(torch.device("cpu"))
    halves_adamw.try_out(torch.device(DEVICE))  # the one that is there does
    launch = split_adamw.split_adamw_

    def without_the_last(*vectors, **factors):
        launch(*(x[:-1] if isinstance(x, torch.Tensor) else x for x in vectors), **factors)

    monkeypatch.setattr(split_adamw, "split_adamw_", without_the_last)
    with pytest.raises(RuntimeError, match="of 2053 elements came out wrong"):
        halves_adamw.try_out(torch.device(DEVICE))
