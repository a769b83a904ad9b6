"""Which engine a run has, and how it is put over the trainer's weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

from fastrl.base.setting import Section, setting
from fastrl.base.types import Problem
from fastrl.engine.base import Engine, Sampling
from fastrl.engine.hf import HFEngine
from fastrl.engine.vllm import VllmConfig, VllmEngine, installed_version
from fastrl.models.loading import LoadedModel
from fastrl.weights.buffer import FlatParams

EngineName = Literal["auto", "hf", "vllm"]
FREE_FOR_KV = 0.8  # of the free memory, where nothing is trained: the rest is for activations and graphs


@dataclass(kw_only=True)
class EngineSection(Section):
    """What samples."""

    engine: EngineName = "auto"  # hf, vllm; auto: vllm on a GPU where it is installed
    vllm: VllmConfig = field(default_factory=VllmConfig)
    max_num_seqs: int = setting(512, "[1, 1e6]", free=True)  # completions the engine decodes together


@dataclass(frozen=True, kw_only=True)
class EngineSize:
    """What an engine must hold."""

    max_model_len: int  # tokens of the longest prompt and completion
    kv_bytes: int  # of the KV cache, where it is vLLM's
    seed: int = 0


def pick_engine(name: EngineName, device: str) -> Literal["hf", "vllm"]:
    """`auto` decided: vLLM on a GPU where it is installed. Raises ValueError for vLLM where it is not."""
    if name == "vllm":
        installed_version()
        return "vllm"
    if name == "hf" or not device.startswith("cuda"):
        return "hf"
    try:
        installed_version()
    except ValueError:
        return "hf"
    return "vllm"


def open_engine(
    name: Literal["hf", "vllm"], loaded: LoadedModel, flat: FlatParams | None, settings: EngineSection, size: EngineSize
) -> Engine:
    """An engine over the parameters of `loaded`; for vLLM they must be views of `flat`, made here if not given."""
    if name == "hf":
        return HFEngine.of(loaded, settings.max_num_seqs)
    return VllmEngine(
        loaded.model,
        flat or FlatParams(loaded.model, grad_dtype=None),
        settings.vllm,
        eos_ids=loaded.eos_ids,
        num_tokens=loaded.num_tokens,
        max_model_len=size.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        kv_bytes=size.kv_bytes,
        seed=size.seed,
    )


@contextmanager
def frozen_engine(
    settings: EngineSection, loaded: LoadedModel, problems: list[Problem], sampling: Sampling, seed: int
) -> Iterator[Engine]:
    """An engine over a model that is not trained, large enough for the problems; closed at the end."""
    device = next(loaded.model.parameters()).device
    kv_bytes = int(settings.vllm.kv_gib * 2**30)
    if device.type == "cuda" and not kv_bytes:
        kv_bytes = int(FREE_FOR_KV * torch.cuda.mem_get_info(device)[0])
    longest = max(len(p.prompt_ids) for p in problems) + sampling.max_new_tokens
    size = EngineSize(max_model_len=longest, kv_bytes=kv_bytes, seed=seed)
    engine = open_engine(pick_engine(settings.engine, str(device)), loaded, None, settings, size)
    try:
        yield engine
    finally:
        engine.close()
