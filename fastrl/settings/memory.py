"""From a training configuration to its memory plan."""

from typing import Literal

import torch

from fastrl.memory.parts import GIB, MemorySettings
from fastrl.memory.plan import MemoryPlan, plan_memory
from fastrl.models.shapes import find_config, model_shape
from fastrl.settings.run import TrainConfig, needs_of


def memory_settings(
    config: TrainConfig,
    *,
    device: str,
    dtype: torch.dtype,
    tokens_per_microbatch: int,
    engine: Literal["hf", "vllm"],
    ranks: int = 1,
    context: int = 0,
    capacity: int = 0,
) -> MemorySettings:
    """capacity: bytes of the card, 0 = no limit known.

    context: tokens of the longest sequence; 0 = of the longest prompt and completion that the configuration allows.
    """
    objective, update, needs = config.objective, config.update, needs_of(config)
    critic, reference = "values" in needs, "ref_logprobs" in needs
    cuda, memory, vllm = device.startswith("cuda"), config.memory, config.engine.vllm
    context = context or config.task.max_prompt_tokens + config.sampling.max_new_tokens
    return MemorySettings(
        context=context,
        prompt=min(context, config.task.max_prompt_tokens),
        group_size=config.allocation.min_group_size,
        tokens_per_microbatch=tokens_per_microbatch,
        least_rows=1 if objective.splits_groups else config.allocation.max_group_size,
        sequences=-(-config.allocation.budget(config.problems_per_step) // ranks),
        ranks=ranks,
        capacity=capacity,
        cuda=cuda,
        dtype=dtype,
        grad_dtype=getattr(torch, memory.grad_dtype),
        optimizer=config.optim.name,
        master=memory.master,
        critic_optimizer=config.critic.optim.name if critic else None,
        reference=reference,
        reference_on_host=memory.reference_on_host,
        scores=bool(needs) or objective.needs_current,
        copies=update.copies,
        keeps=update.keeps,
        holds_state=update.holds_state,
        per_coordinate=update.per_coordinate,
        checkpoint=memory.checkpoint_activations,
        offload=() if memory.offload == "none" else tuple(memory.offload.split(",")),
        attention=config.attention,
        engine=engine,
        max_num_seqs=config.engine.max_num_seqs,
        max_num_batched_tokens=vllm.max_num_batched_tokens,
        kv_bytes=int(vllm.kv_gib * GIB),
        kv_kept=vllm.kv == "keep",
    )


def plan_of(config: TrainConfig, **how) -> MemoryPlan:
    """`memory_settings` and the shapes of config.model, planned. Raises ValueError for a model that has no plan."""
    return plan_memory(model_shape(config.model, find_config(config.model)), memory_settings(config, **how))
