"""How many bytes the parts of a run take, from shapes alone, before anything is loaded."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by part, for one rank."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in self.parts.items() if size)
        return f"planned {self.total / 2**20:.1f} MiB ({parts})"


def plan_memory(
    config, *, num_parameters: int, buffer_elements: int, dtype: torch.dtype, grad_dtype: torch.dtype, optimizer: str,
    reference: bool, tokens_per_microbatch: int, checkpointing: bool, ranks: int, critic_elements: int = 0,
    critic_optimizer: str = "adamw", copies: int = 0, holds_state: bool = False, logit_rows: int = 0,
) -> MemoryPlan:  # fmt: skip
    """A transformers configuration, its parameters and the flat buffers' elements -> bytes of the parts.

    critic_elements: of its flat buffer, 0 without one; its weights, gradients, master and optimizer state are one part.
    copies, holds_state: what the update rule holds of the shard of weights and of the optimizer's state.
    logit_rows: of the head's workspace, float32 logits of a chunk of tokens.
    All but the activations are sizes of the tensors that the run allocates (8-bit states: one byte and a 32-bit scale
    per 256 elements for each of two moments). Activations are an estimate: one residual per checkpointed layer, or
    about 16 hidden and 5 intermediate vectors per token and layer without checkpointing.
    """
    # float32 weights on one rank are their own master
    own_master = dtype in (torch.float32, torch.float64) and ranks == 1

    def trained(elements: int, optimizer: str) -> dict[str, int]:
        shard = elements // ranks
        return {
            "weights": elements * dtype.itemsize,
            "gradients": elements * torch.promote_types(grad_dtype, dtype).itemsize,
            "master": 0 if own_master else shard * 4,
            "optimizer": 2 * 4 * shard if optimizer == "adamw" else 2 * (shard + 4 * math.ceil(shard / 256)),
        }

    text = config.get_text_config()
    hidden, inner = text.hidden_size, getattr(text, "intermediate_size", 4 * text.hidden_size)
    layers, size = text.num_hidden_layers, dtype.itemsize
    per_layer = (16 * hidden + 5 * inner) * size
    per_token = layers * hidden * size + per_layer if checkpointing else layers * per_layer
    policy = trained(buffer_elements, optimizer)
    master = buffer_elements // ranks * max(4, dtype.itemsize)
    return MemoryPlan(
        parts={
            **policy,
            "update": copies * master + holds_state * policy["optimizer"],
            "critic": sum(trained(critic_elements, critic_optimizer).values()),
            "reference": num_parameters * size if reference else 0,
            "logits": 4 * min(logit_rows, tokens_per_microbatch) * text.vocab_size,
            "activations": tokens_per_microbatch * per_token,
        },
    )
