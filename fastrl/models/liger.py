"""Liger's kernels for the norms, rotary positions and gated MLPs of a loaded model: fewer saved activations, less time.

    auto    on a GPU, where liger-kernel is installed, knows the family and gives what transformers gives
    on      the same, and an error where it cannot be
    off     never

Its losses are not used: the head has kernels of its own.
"""

import importlib.util
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fastrl.base.exhausted import means_out_of_memory
from fastrl.models.ragged import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Liger = Literal["auto", "on", "off"]
# model types whose norms, rotary positions and MLPs it has under these names
FAMILIES = ("exaone4 granite hunyuan_v1_dense llama ministral mistral olmo2 olmo3 phi3 qwen2 qwen3 smollm3").split()
ROTARY = "apply_rotary_pos_emb"  # of a family's module in transformers
TOKENS = (2, 24)  # of the self-test, a batch of rows
# difference of hidden states and gradients that rounding may make, of their norm; two sound implementations differ by
# less than half of it after 36 layers, and a wrong rotation, activation or weight by more than all
LIMITS = {torch.float64: 0.01, torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.15}


@dataclass(frozen=True)
class Rotary:
    """What stands for a family's `apply_rotary_pos_emb`, in the whole process."""

    plain: Callable
    fused: Callable

    def __call__(self, *args, **kwargs):
        return self.fused(*args, **kwargs)


class LigerKernels:
    """Liger's kernels in a transformers model of a known type, which can be taken out again."""

    def __init__(self, model: "PreTrainedModel"):
        self.module = sys.modules[type(model).__module__]
        before = dict(vars(self.module))
        methods = {module: set(vars(module)) for module in model.modules()}
        apply = getattr(import_module("liger_kernel.transformers"), f"apply_liger_kernel_to_{model.config.model_type}")
        apply(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=model)
        plain, fused = before[ROTARY], getattr(self.module, ROTARY)
        self.rotary = Rotary(plain.plain if isinstance(plain, Rotary) else plain, fused)
        for name, value in before.items():  # classes too, for models that are loaded later: those are as they were
            setattr(self.module, name, value)
        self.forwards = {
            module: vars(module)["forward"]
            for module, names in methods.items()
            if "forward" in vars(module).keys() - names
        }
        self.put_in()

    def put_in(self) -> None:
        setattr(self.module, ROTARY, self.rotary)
        for module, forward in self.forwards.items():
            vars(module)["forward"] = forward

    def take_out(self) -> None:
        setattr(self.module, ROTARY, self.rotary.plain)
        for module in self.forwards:
            vars(module).pop("forward", None)

    @contextmanager
    def out(self):
        """Inside, the model is as transformers has it."""
        self.take_out()
        try:
            yield
        finally:
            self.put_in()


def choose(model: "PreTrainedModel", wanted: Liger) -> tuple[LigerKernels | None, list[str]]:
    """Put the kernels into a model where `wanted` says so -> what takes them out, and lines that say what was done.

    Raises ValueError where they are wanted and cannot be had.
    """
    kind, device = model.config.model_type, str(model.device)
    if wanted == "off" or (wanted == "auto" and unfit(kind, device)):
        return None, []
    check(kind, device)
    kernels, wrong = tried(model)
    name = f"liger-kernel {metadata.version('liger-kernel')}"
    if kernels is not None:
        return kernels, [f"liger: norms, rotary positions and gated MLPs run on {name}"]
    if wanted == "on":
        raise ValueError(f"--liger on: {name} does not give what transformers gives: {wrong}; use --liger off")
    return None, [f"liger: WARNING: {name} is left out: {wrong}"]


def unfit(model_type: str, device: str) -> str:
    """Why the kernels cannot be used; empty where they may be."""
    if model_type not in FAMILIES:
        return f"--liger on knows {', '.join(FAMILIES)}, but the model is of type {model_type}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "--liger on needs liger-kernel, which is not installed (pip install liger-kernel)"
    if not device.startswith("cuda"):
        return f"--liger on is for a GPU, but the device is {device}"
    return ""


def check(model_type: str, device: str) -> None:
    """Raise ValueError where the kernels cannot be used."""
    if why := unfit(model_type, device):
        raise ValueError(f"{why}; use --liger auto")


def tried(model: "PreTrainedModel") -> tuple[LigerKernels | None, str]:
    """The kernels, put into a model, or what is wrong with them there."""
    kernels = None
    plain = passed(model)
    try:
        kernels = LigerKernels(model)
        fused = passed(model)
    except Exception as error:  # whatever a compiler or another version may say: it is told, and transformers' run
        if means_out_of_memory(error):
            raise
        if kernels is not None:
            kernels.take_out()
        return None, f"{type(error).__name__}: {first_line(error)}"
    for name, right in plain.items():
        off = ((fused[name] - right).norm() / right.norm()).item()
        if not off <= LIMITS[model.dtype]:
            kernels.take_out()
            return None, f"{name} off by {off:.3g} of their norm"
    return kernels, ""


def passed(model: "PreTrainedModel") -> dict[str, Tensor]:
    """Hidden states of a few tokens, and gradients of their embeddings and of all vectors among the parameters."""
    body = model.base_model
    words = model.config.get_text_config().vocab_size
    ids = torch.arange(TOKENS[0] * TOKENS[1], device=model.device).view(TOKENS) % words
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    vectors = [p for p in body.parameters() if p.ndim == 1]
    with torch.enable_grad():
        hidden = body(inputs_embeds=embedded, use_cache=False).last_hidden_state
        generator = torch.Generator(device=model.device).manual_seed(0)
        upstream = torch.randn(hidden.shape, generator=generator, device=model.device).to(hidden.dtype)
        inputs, *others = torch.autograd.grad(hidden, [embedded, *vectors], upstream, materialize_grads=True)
    flat = torch.cat([x.flatten() for x in others])
    found = {"hidden states": hidden.detach(), "gradients of inputs": inputs, "gradients of norms and biases": flat}
    return {name: x.float() for name, x in found.items()}
