"""What a run decides once, where its settings leave it open, and the lines that say so."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch

from fastrl import __version__
from fastrl.base import ranks
from fastrl.engine.opening import pick_engine
from fastrl.memory.advice import advice, table
from fastrl.memory.plan import MemoryPlan
from fastrl.models.loading import pick_device
from fastrl.models.shapes import NoPlan
from fastrl.settings.flags import all_flags
from fastrl.settings.memory import plan_of
from fastrl.settings.parse import as_dict
from fastrl.settings.run import AXES, TrainConfig, needs_of
from fastrl.watch.card import Card, Held, NoCard, open_card

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TOKENS = {"cpu": 2048, "cuda": 16384}  # of a microbatch


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Made once per start by `resolve`, and handed on."""

    config: TrainConfig
    device: str
    dtype: torch.dtype  # of weights
    tokens: int  # per microbatch
    needs: frozenset[str]  # what the objective compares with: old_logprobs, ref_logprobs, values
    engine: Literal["hf", "vllm"]
    card: Card | NoCard | None = None  # None on a CPU
    held: Held | None = None  # by other processes on the card, before this one used it

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @cached_property
    def plan(self) -> MemoryPlan | NoPlan:
        """Of the memory that others leave, or why this model has none: it may be trained all the same.

        Reads the model's config.json.
        """
        held = self.held.size if self.held else 0
        try:
            return plan_of(
                self.config,
                device=self.device,
                dtype=self.dtype,
                tokens_per_microbatch=self.tokens,
                engine=self.engine,
                ranks=ranks.world_size(),
                capacity=max(1, torch.cuda.mem_get_info(self.device)[1] - held) if self.cuda else 0,
            )
        except NoPlan as error:
            return error


def resolve(config: TrainConfig) -> Resolved:
    """Raises ValueError for a device or an engine that is not there."""
    device, dtype = pick_device(config.device, config.dtype)
    card = open_card(device) if device.startswith("cuda") else None
    return Resolved(
        config=config,
        device=device,
        dtype=dtype,
        needs=needs_of(config),
        tokens=config.memory.tokens_per_microbatch or TOKENS[device.partition(":")[0]],
        engine=pick_engine(config.engine.engine, device),
        card=card,
        held=held_by_others(card),
    )


def held_by_others(card: Card | NoCard | None) -> Held | None:
    """None also without readings: a run needs none."""
    try:
        return card.held() if isinstance(card, Card) else None
    except NoCard:
        return None


def describe(resolved: Resolved) -> list[str]:
    """The lines that say what will be trained and how, every constant in force among them."""

    config = resolved.config

    def settings(member: "DataclassInstance") -> str:
        return " ".join(f"{k}={v}" for k, v in as_dict(member).items())

    budget = config.allocation.budget(config.problems_per_step)
    groups = {budget // size for size in (config.allocation.max_group_size, config.allocation.min_group_size)}
    name = {
        axis: next(n for n, cls in members.items() if type(getattr(config, axis)) is cls)
        for axis, members in AXES.items()
    }
    preset = getattr(config.objective, "preset", "none")
    expanded = config.objective.PRESETS[preset] if preset != "none" else {}
    critic = f"critic: passes={config.critic.passes} {settings(config.critic.optim)}"
    return [
        f"fastrl {__version__}  device={resolved.device}  model={config.model}  data={config.data}  seed={config.seed}",
        *([f"preset: {preset} sets {' '.join(f'{k}={v}' for k, v in expanded.items())}"] if expanded else []),
        f"objective: {name['objective']}  {settings(config.objective)}",
        f"update: {name['update']} {settings(config.update)}   allocation: {name['allocation']} "
        f"{settings(config.allocation)}   optim: {settings(config.optim)}",
        *([critic] if "values" in resolved.needs else []),
        f"batch: {' to '.join(map(str, sorted(groups)))} problems, {budget} completions -> {config.minibatches} "
        f"minibatches -> microbatches of <= {resolved.tokens} tokens; {config.run.steps} steps",
    ]


def card_lines(resolved: Resolved) -> list[str]:
    """Of every rank's GPU: whether it can be read, and who else holds memory on it. To be called on all ranks."""
    if not resolved.cuda:
        return []
    lines = [f"gpu: no readings beyond those of torch: {resolved.card}"] if isinstance(resolved.card, NoCard) else []
    lines += [f"gpu: {resolved.held}; the plan leaves them that"] if resolved.held else []
    if ranks.size() == 1:
        return lines
    return [f"rank {rank}, {line}" for rank, own in enumerate(ranks.gather(lines)) for line in own]


def memory_lines(resolved: Resolved) -> list[str]:
    """What others hold, the plan in one line and as a table, and what to change where it does not fit."""
    plan, lines = resolved.plan, card_lines(resolved)
    if isinstance(plan, NoPlan):
        return [*lines, f"memory: {plan}"]
    return [*lines, f"memory: {plan}", *table(plan), *advice(plan, set(all_flags(resolved.config)))]
