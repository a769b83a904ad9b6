"""The generators of a process: torch's, the device's, Python's and numpy's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leave every generator of this process as it was, whatever is drawn inside."""
    before = generators()
    try:
        yield
    finally:
        restore_generators(*before)


def generators() -> tuple[dict[str, Tensor], dict]:
    """States of torch's generators, and of Python's and numpy's."""
    return torch_generators(), python_generators()


def seed_generators(seed: int) -> None:
    """Seed torch, Python and numpy; nothing of ours draws from them, but reward functions may."""
    import numpy

    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def torch_generators() -> dict[str, Tensor]:
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def python_generators() -> dict:
    import numpy

    state = numpy.random.get_state(legacy=False)
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [
            state["bit_generator"],
            state["state"]["key"].tolist(),
            state["state"]["pos"],
            state["has_gauss"],
            state["gauss"],
        ],
    }


def restore_generators(tensors: dict[str, Tensor], others: dict) -> None:
    """Put back what `generators` gave. Raises KeyError, TypeError, ValueError or RuntimeError on anything else."""
    import numpy

    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, internal, gauss_next = others["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = others["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, gauss))
