"""What vLLM's random numbers hang on: which of its two model runners samples, and where its noise gets its seeds from.

The second runner hashes seed, position and token in the kernel that draws, so a seed per request is free. The first has
a generator for each seeded request, and on a GPU launches a kernel for each of them and each of their tokens.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy
import torch

RUNNER = "VLLM_USE_V2_MODEL_RUNNER"  # 1 the second, 0 the first
Seeds = Literal["auto", "request", "step"]


def ask_for_second_runner() -> None:
    """Where vLLM has what its second runner needs, have it take that one; the user's own choice stays."""
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:
        os.environ.setdefault(RUNNER, "1")


def seeds_for(setting: Seeds, *, second_runner: bool, cuda: bool) -> Literal["request", "step"]:
    """`auto` decided: a seed for each request, unless that costs a launch for each."""
    if setting == "auto":
        return "step" if cuda and not second_runner else "request"
    return setting


@contextmanager
def generators_kept(devices: list[torch.device] | None = None, seed: int | None = None) -> Iterator[None]:
    """Inside, what draws from the process's generators does so from `seed`, if one is given; afterwards they are back.

    devices: those whose generators are meant beside that of the CPU; None = every GPU.
    """
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if devices is None else devices
    gpus = [device for device in gpus if device.type == "cuda"]
    python, arrays, cpu = random.getstate(), numpy.random.get_state(), torch.random.get_rng_state()
    states = [torch.cuda.get_rng_state(device) for device in gpus]
    try:
        if seed is not None:
            random.seed(seed)
            numpy.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # the second runner seeds what has no seed from it
            torch.random.default_generator.manual_seed(seed)
            for device in gpus:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
        torch.random.set_rng_state(cpu)
        for device, state in zip(gpus, states, strict=True):
            torch.cuda.set_rng_state(state, device)
