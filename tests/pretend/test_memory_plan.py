"""The memory plan against an allocator that counts, at real widths: each phase's sum, and each part of it.

What torch's allocator does not see is left out of the plan here: the CUDA context, captured graphs, and what kernels
take for themselves.
"""

import pytest

from support.pretend.needed import cuda  # noqa: F401  skips where there is no such device
from support.pretend.planned import FIRST, METHODS, MODES, OTHERS, SHAPES, sampled, trained
from support.pretend.widths import MIB, write_model

WITHIN = 0.05
# sizes of tensors, which nothing is estimated of
TENSORS = ("weights", "gradients", "master", "optimizer", "snapshots", "critic", "reference")
CASES = [(name, mode) for name in METHODS for mode in MODES] + [(name, "full") for name in OTHERS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A function from a name of SHAPES to a model folder, written once."""
    folder, written = tmp_path_factory.mktemp("widths"), {}

    def find(name):
        if name not in written:
            shape, changes, _ = SHAPES[name]
            written[name] = write_model(folder / str(len(written)), shape, **changes)
        return written[name]

    return find


@pytest.fixture(autouse=True)
def empty_memory_is_not_filled(poison_uninitialized_memory):
    import torch

    torch.use_deterministic_algorithms(False)  # NaN in gigabytes that nobody reads


def check(phases, expected):
    assert {phase.name for phase in phases} >= expected
    for phase in phases:
        assert abs(phase.deviation) < WITHIN, (phase.name, phase.planned, phase.measured)
        name, off = phase.part()
        assert abs(off) < WITHIN, (phase.name, name, phase.planned, phase.measured)
        for name in TENSORS:
            planned, measured = phase.planned.get(name, 0), phase.measured.get(name, 0)
            assert planned == pytest.approx(measured, rel=0.01, abs=MIB), (phase.name, name)


@pytest.mark.parametrize("name, mode", CASES)
def test_a_step_allocates_what_is_planned(name, mode, model):
    flags = METHODS.get(name) or OTHERS.get(name, ())
    phases = trained(model(FIRST), *flags, "--checkpoint-activations", mode)
    scored = {"score"} if name in ("PPO", "A*-PO", "reference on the host") else set()
    check(phases, {"backward", "step"} | scored)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(SHAPES)[1:])
def test_models_of_other_shapes_do(name, mode, model):
    phases = trained(model(name), "--checkpoint-activations", mode, sizes=SHAPES[name][2])
    check(phases, {"backward", "step"})


def test_sampling_with_the_models_own_cache_does(model):
    check(sampled(model(FIRST)), {"generate"})
