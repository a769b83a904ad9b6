"""How many bytes the parts of a run take, from shapes alone, before anything is loaded."""

import math
from dataclasses import dataclass

import torch

from fastrl.flat import ALIGN, layout, round_up


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by part, for one rank."""

    num_parameters: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in self.parts.items() if size)
        return f"planned {self.total / 2**20:.1f} MiB ({parts})"


def plan_memory(
    config, *, dtype: torch.dtype, grad_dtype: torch.dtype, optimizer: str, reference: bool,
    tokens_per_microbatch: int, checkpointing: bool, ranks: int,
) -> MemoryPlan:  # fmt: skip
    """A transformers config -> bytes of weights, gradients, master, optimizer, reference and activations.

    The first five are exact sizes of the tensors that the run allocates (8-bit states: 2 bytes and a 32-bit scale per
    256 elements for each moment). Activations are an estimate: one residual per checkpointed layer, or about 16 hidden
    and 5 intermediate vectors per token and layer without checkpointing.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    slots = layout({name: tuple(p.shape) for name, p in model.named_parameters()})
    last = list(slots.values())[-1]
    padded = round_up(last.offset + last.numel, ALIGN * ranks)
    shard = padded // ranks
    # float32 weights on one rank are their own master
    own_master = dtype in (torch.float32, torch.float64) and ranks == 1
    states = 8 * shard if optimizer == "adamw" else 2 * shard + 2 * 4 * math.ceil(shard / 256)
    size = dtype.itemsize
    text = config.get_text_config()
    hidden, inner = text.hidden_size, getattr(text, "intermediate_size", 4 * text.hidden_size)
    layers = text.num_hidden_layers
    per_layer = (16 * hidden + 5 * inner) * size
    per_token = layers * hidden * size + per_layer if checkpointing else layers * per_layer
    num_parameters = sum(p.numel() for p in model.parameters())
    return MemoryPlan(
        num_parameters=num_parameters,
        parts={
            "weights": padded * size,
            "gradients": padded * torch.promote_types(grad_dtype, dtype).itemsize,
            "master": 0 if own_master else shard * 4,
            "optimizer": states,
            "reference": num_parameters * size if reference else 0,
            "activations": tokens_per_microbatch * per_token,
        },
    )
