"""Where vLLM's noise gets its seeds from, and what is left of it in the process afterwards."""

import random

import numpy
import pytest
import torch

from fastrl.engine.vllm import VllmConfig
from fastrl.engine.vllm_random import generators_kept, seeds_for

CPU = [torch.device("cpu")]


def drawn() -> list[float]:
    """A number from each generator that vLLM may draw from."""
    return [random.random(), numpy.random.random(), torch.rand(()).item()]


@pytest.mark.parametrize(
    "setting, second_runner, cuda, expected",
    [
        ("auto", True, True, "request"),
        ("auto", False, True, "step"),  # a launch for each request and token
        ("auto", False, False, "request"),
        ("request", False, True, "request"),
        ("step", True, True, "step"),
        ("step", False, False, "step"),
    ],
)
def test_a_request_has_its_own_seed_where_that_is_free_or_wanted(setting, second_runner, cuda, expected):
    assert seeds_for(VllmConfig(seeds=setting).seeds, second_runner=second_runner, cuda=cuda) == expected


def test_a_seed_decides_what_is_drawn_inside_and_nothing_outside():
    with generators_kept(CPU, 1):
        pass
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    expected = [drawn(), drawn()]
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    found, inside = [drawn()], []
    for seed in (2**62 + 5, 2**62 + 5, 2**62 + 6, 2**61 + 7):  # 63 bits, as sampling_seed makes them
        with generators_kept(CPU, seed):
            inside.append(drawn())
    assert inside[0] == inside[1]
    for other in inside[2:]:
        assert not set(inside[0]) & set(other)
    assert [*found, drawn()] == expected


def test_without_a_seed_drawing_goes_on_and_is_forgotten():
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    with generators_kept(CPU):
        first = drawn()
    assert drawn() == first


def test_generators_are_put_back_after_a_failure():
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    expected = drawn()
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="core"), generators_kept(CPU, 3):
        raise RuntimeError("core")
    assert drawn() == expected
