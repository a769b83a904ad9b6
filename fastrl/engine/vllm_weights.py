"""vLLM's parameters as views of the flat weight buffer: a load format that reads no file and allocates no weight.

Linear and embedding weights are born on the meta device and replaced before vLLM's post-processing, compilation and
graph capture, which therefore see the final addresses. What writes the buffer afterwards writes vLLM's model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.base.types import EngineError
from fastrl.weights.buffer import FlatParams

LOAD_FORMAT = "fastrl_flat"
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")


def register(flat: FlatParams) -> str:
    """Let vLLM's `load_format` of the returned name take its weights from `flat`."""
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class FlatLoader(BaseModelLoader):
        def download_model(self, model_config) -> None:
            pass

        def load_model(self, *args, **kwargs) -> nn.Module:
            _ROPE_DICT.clear()  # one for the process: modules of another model in it may be on the meta device
            with weights_on_meta():
                return super().load_model(*args, **kwargs)

        def load_weights(self, model: nn.Module, model_config) -> None:
            attach(model, flat)

    register_model_loader(LOAD_FORMAT)(FlatLoader)
    return LOAD_FORMAT


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Inside, vLLM's unquantized linear and embedding layers make weights without memory."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    def on_meta(create_weights: Callable) -> Callable:
        def wrapped(self, *args, **kwargs):
            with torch.device("meta"):
                return create_weights(self, *args, **kwargs)

        return wrapped

    originals = [(method, method.create_weights) for method in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)]
    for method, create_weights in originals:
        method.create_weights = on_meta(create_weights)
    try:
        yield
    finally:
        for method, create_weights in originals:
            method.create_weights = create_weights


def attach(model: nn.Module, flat: FlatParams) -> None:
    """Replace every parameter of a vLLM model by a view of its slot. Raises EngineError unless both fit exactly.

    A vocabulary may have fewer rows in vLLM, which then cannot sample the words of the rows beyond.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}  # tied modules go on sharing one
    used = set()
    for module_name, module in model.named_modules():
        for leaf, old in module._parameters.items():
            if old is None:
                continue
            if old not in replaced:
                name = f"{module_name}.{leaf}" if module_name else leaf
                replaced[old] = view_as(old, name, flat)
                used.add(name)
            module._parameters[leaf] = replaced[old]
    unused = flat.slots.keys() - used
    if unused:
        raise EngineError(f"vLLM's model has no parameter for {sorted(unused)[:3]}")
    bare = [name for name, x in named_tensors(model) if x.is_meta]
    if bare:
        raise EngineError(f"vLLM's model has tensors without memory after loading: {bare[:3]}")


def view_as(old: nn.Parameter, name: str, flat: FlatParams) -> nn.Parameter:
    """What takes the place of a parameter of vLLM's: of its class and attributes, over the slot of its name."""
    slot = flat.slots.get(name)
    if slot is None:
        raise EngineError(f"vLLM has a parameter {name} {tuple(old.shape)} that the trained model has not")
    rows = min(old.shape[0], slot.shape[0]) if name.endswith(VOCABULARY) else slot.shape[0]
    view = flat.view(flat.weights, slot)[:rows]
    if view.shape != old.shape or view.dtype != old.dtype:
        raise EngineError(
            f"{name}: vLLM wants {old.dtype} {tuple(old.shape)}, the trained model has {view.dtype} {tuple(view.shape)}"
        )
    if old.device not in (view.device, torch.device("meta")):
        raise EngineError(
            f"{name}: vLLM is on {old.device}, the trained model on {view.device}; leave --device to auto, and choose "
            "a GPU by CUDA_VISIBLE_DEVICES"
        )
    shared = nn.Parameter(view, requires_grad=False)
    shared.__class__ = old.__class__  # vLLM's subclass knows how such a weight is loaded
    vars(shared).update(vars(old))
    return shared


def outside(model: nn.Module, flat: FlatParams) -> list[str]:
    """Names of the parameters of a vLLM model that are not, or no longer, where the trainer writes."""
    return [name for name, parameter in model.named_parameters() if not flat.owns(parameter)]


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def prepare_cpu() -> None:
    """Let vLLM's CPU backend multiply with the weights as they are: it would pack each into a copy and drop it.

    Nor does it compile helpers of its sampler, which takes longer than many a run on a CPU.
    """
    from vllm.platforms import current_platform

    current_platform.simple_compile_backend = "eager"  # before the layers are imported
    from vllm.model_executor.layers import utils

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain
