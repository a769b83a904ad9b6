"""The norm of a long vector: against float64, cut into shards, at the ends of float32, and what it allocates."""

import math

import pytest
import torch

from fastrl.weights import norm
from fastrl.weights.norm import ROW, norm_over_ranks, squared_norm

FORMS = {
    "normal": lambda n, g: torch.randn(n, generator=g),
    "all alike": lambda n, g: torch.full((n,), 0.1),  # whose roundings all go one way
    "heavy": lambda n, g: torch.randn(n, generator=g).mul_(3).exp_(),
    "one in many": lambda n, g: torch.zeros(n).index_fill_(0, torch.tensor([n - 1]), 3.0),
    "small": lambda n, g: torch.randn(n, generator=g) * 1e-12,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [1, ROW - 1, ROW, 100_003, 1 << 20])
def test_against_float64(form, n, monkeypatch):
    monkeypatch.setattr(norm, "AT_A_TIME", 1 << 18)
    vector = FORMS[form](n, torch.Generator().manual_seed(n))
    expected = vector.double().square().sum().sqrt().item()
    assert norm_over_ranks(vector) == pytest.approx(expected, rel=2e-7, abs=0)
    assert norm_over_ranks(vector.double()) == pytest.approx(expected, rel=1e-13, abs=0)
    half = vector.bfloat16()
    assert norm_over_ranks(half) == pytest.approx(half.double().norm().item(), rel=2e-7, abs=0)


def test_shards_add_up_to_the_whole():
    vector = torch.randn(64 * 1024, generator=torch.Generator().manual_seed(0))
    whole = squared_norm(vector)
    assert whole.dtype == torch.float64 and torch.equal(whole, squared_norm(vector))
    for ranks in (2, 4, 64):
        total = sum(squared_norm(shard) for shard in vector.chunk(ranks))
        assert total.item() == pytest.approx(whole.item(), rel=1e-15)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1000, 1024])  # in a row, and in the tail
def test_what_is_not_finite_shows(bad, at):
    vector = torch.ones(1025)
    vector[at] = bad
    assert math.isnan(norm_over_ranks(vector)) if math.isnan(bad) else norm_over_ranks(vector) == math.inf


@pytest.mark.parametrize("size", [3e25, 1e-25, 3e-38])
def test_squares_that_float32_has_no_numbers_for(size):
    vector = torch.zeros(3 * ROW)
    vector[:2] = torch.tensor([3 * size, 4 * size])
    expected = vector.double().norm().item()
    assert not 0.9 < squared_norm(vector).sqrt().item() / expected < 1.1
    assert norm_over_ranks(vector) == pytest.approx(expected, rel=1e-13, abs=0)
    assert norm_over_ranks(torch.zeros(3 * ROW)) == 0.0


def test_no_copy_of_the_vector():
    from torch.utils._python_dispatch import TorchDispatchMode

    vector, largest = torch.ones(1 << 20), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != vector.data_ptr():
                largest.append(result.numel() * result.element_size())
            return result

    with Sizes():
        assert squared_norm(vector).item() == 1 << 20
    assert max(largest) == 8 * (1 << 20) / ROW
