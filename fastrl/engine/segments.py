"""Segments of torch's CUDA allocator that grow, so that blocks whose sizes change from step to step leave no gaps.

vLLM's sleep mode has a memory pool of its own, with which they do not go together (pytorch#147851).
"""

import os
from collections.abc import MutableMapping

from fastrl.engine.opening import EngineName, EngineSection, pick_engine

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch reads either, the second under its older name
GROWING = "expandable_segments:True"


def set_segments(engine: EngineSection, device: str, environment: MutableMapping[str, str] = os.environ) -> str:
    """Choose them, before CUDA is first used, unless the user has set the allocator -> a line that says so.

    Empty without CUDA, which has no such allocator.
    """
    if not device.startswith("cuda"):
        return ""
    given = [f"{name}={environment[name]}" for name in VARIABLES if name in environment]
    if given:
        return f"allocator: {' '.join(given)}, from the environment"
    if sleeps(engine.engine, engine.vllm.kv, device):
        return "allocator: fixed segments, as vLLM's sleep mode needs; --vllm.kv keep lets them grow"
    environment[VARIABLES[0]] = GROWING
    return f"allocator: {GROWING}"


def sleeps(engine: EngineName, kv: str, device: str) -> bool:
    """Whether vLLM samples, and gives the pages of its KV cache back while something else runs."""
    return kv == "release" and pick_engine(engine, device) == "vllm"
