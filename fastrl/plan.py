"""What a run would take on a GPU, planned from a config.json: the command of a run with another program's name.

    python -m fastrl.plan --model qwen2.5-7b --context 16384 --gpus 8 --card h100
    python -m fastrl.plan --model DIR --data gsm8k --objective ppo --update sfpo --optim.name adamw8bit --context 4096
    python -m fastrl.plan --table --context 16384 --checkpoint-activations full

--model may be a file, a folder, or the name of a well-known model; no weights are read. Prints a table of parts and
phases, the tokens of a microbatch, the KV cache, the longest context and the largest well-known model that fit; for a
run that does not fit, what to change. The last line is one JSON document. Nothing here is measured.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from fastrl.base.exits import run_program
from fastrl.base.log import say, write_json
from fastrl.base.setting import setting
from fastrl.engine.opening import EngineName, pick_engine
from fastrl.memory.advice import (
    advice,
    available,
    best_tokens,
    knobs,
    largest_model,
    longest_context,
    smallest_set,
    table,
)
from fastrl.memory.parts import GIB, MemorySettings, ModelShape
from fastrl.memory.plan import CARDS, MemoryPlan, plan_memory
from fastrl.models.shapes import find_config, known_shapes, model_shape
from fastrl.settings.flags import all_flags
from fastrl.settings.memory import memory_settings
from fastrl.settings.run import TrainConfig, configure

TABLE = ("qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b")


@dataclass(kw_only=True)
class PlanConfig(TrainConfig):
    # tokens of the longest prompt and completion together; 0 = as the run limits them
    context: int = setting(0, "[0, 1e9]")
    gpus: int = setting(1, "[1, 1e6]")  # cards that share the run
    card: str = "h100"  # h100, h200, or its GiB
    table: bool = False  # Qwen2.5 1.5B, 3B and 7B on both cards, in markdown

    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "bfloat16"  # what `auto` is on a GPU

    def __post_init__(self):
        super().__post_init__()
        card_gib(self.card)


def card_gib(card: str) -> float:
    """A card's name or its size -> GiB. Raises ValueError on anything else."""
    try:
        size = CARDS[card.lower()] if card.lower() in CARDS else float(card)
    except ValueError:
        size = 0.0
    if not 0 < size < 1e6:
        raise ValueError(f"--card {card}: it is {' or '.join(CARDS)}, or GiB such as 80")
    return size


def engine_for(name: EngineName) -> Literal["hf", "vllm"]:
    """`auto` decided: what a run takes on a GPU of this machine; for another machine, one that has vLLM."""
    if name == "auto":
        return pick_engine(name, "cuda") if torch.cuda.is_available() else "vllm"
    return name


def settings_for(config: PlanConfig, card: str) -> MemorySettings:
    """As the run on a GPU; with `tokens_per_microbatch` 0 where they are to be searched for."""
    return memory_settings(
        config,
        device="cuda",
        dtype=torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype),
        tokens_per_microbatch=config.memory.tokens_per_microbatch,
        engine=engine_for(config.engine.engine),
        ranks=config.gpus,
        context=config.context,
        capacity=int(card_gib(card) * GIB),
    )


def planned(model: ModelShape, settings: MemorySettings) -> MemoryPlan:
    if not settings.tokens_per_microbatch:
        settings = replace(settings, tokens_per_microbatch=best_tokens(model, settings))
    return plan_memory(model, settings)


def report(plan: MemoryPlan, flags: set[str]) -> list[str]:
    """For people: the table, what was chosen, what fits."""
    s, model = plan.settings, plan.model
    context, biggest = longest_context(model, s), largest_model(known_shapes(), s)
    over = f" (the model was made for {model.limit})" if context > model.limit > 0 else ""
    return [
        f"{model.name}: {model.parameters / 1e9:.4g} B parameters, context {s.context}, engine {s.engine}, {s.ranks} x "
        f"{s.capacity / GIB:.1f} GiB, of which {plan.usable / GIB:.1f} are used; planned, not measured",
        *table(plan),
        f"microbatches of {s.tokens} tokens; KV cache {plan.kv_bytes / GIB:.2f} GiB: {plan.kv_sequences} sequences of "
        f"{s.context} tokens at once, of {s.sequences} in a step",
        f"longest context that fits: {context}{over}; largest well-known model: {biggest or 'none'}",
        *(advice(plan, flags) or [f"fits, with {-plan.missing(plan.worst) / GIB:.2f} GiB to spare in {plan.worst}"]),
    ]


def document(plan: MemoryPlan, flags: set[str]) -> dict:
    """For programs: bytes and tokens."""
    s, choice = plan.settings, list(knobs(plan.settings))
    usable = smallest_set(plan, [k for k in choice if available(k, flags)]) if not plan.fits else ()
    return {
        "planned": True,
        "measured": False,
        "model": asdict(plan.model) | {"windows": sorted(set(plan.model.windows))},
        "parts": plan.parts,
        "host": plan.host,
        "settings": {name: str(v) if isinstance(v, torch.dtype) else v for name, v in asdict(s).items()},
        "totals": {phase: plan.total(phase) for phase in plan.phases},
        "usable": plan.usable,
        "fits": plan.fits,
        "missing": {phase: plan.missing(phase) for phase in plan.phases},
        "tokens_per_microbatch": s.tokens,
        "kv_bytes": plan.kv_bytes,
        "kv_sequences": plan.kv_sequences,
        "longest_context": longest_context(plan.model, s),
        "largest_model": largest_model(known_shapes(), s),
        "enough": [k.flag for k in usable or ()],
    }


def markdown(config: PlanConfig) -> list[str]:
    """A row for each of TABLE and each card, GiB; the phases without the KV cache."""
    lines = [
        "| model, card | generate | backward | step | KV cache | sequences at once | tokens per microbatch "
        "| longest context | fits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in TABLE:
        for card in CARDS:
            plan = planned(known_shapes()[name], settings_for(config, card))
            fit = "yes" if plan.fits else f"{plan.missing(plan.worst) / GIB:.1f} too much in {plan.worst}"
            cells = [f"{plan.at(phase) / GIB:.1f}" for phase in ("generate", "backward", "step")]
            room = [f"{plan.kv_bytes / GIB:.1f}", f"{plan.kv_sequences}"] if plan.fits else ["-", "-"]
            context = longest_context(plan.model, plan.settings)
            cells += [*room, str(plan.settings.tokens), str(context or "-"), fit]
            lines.append(f"| {name}, {card} | {' | '.join(cells)} |")
    return lines


def trainer_flags() -> set[str]:
    return set(all_flags(TrainConfig()))


def main(argv: Sequence[str]) -> int:
    config = configure(argv, PlanConfig)
    if config.table:
        say("\n".join(markdown(config)))
        return 0
    plan = planned(model_shape(config.model, find_config(config.model)), settings_for(config, config.card))
    found = document(plan, trainer_flags())
    say("\n".join([*report(plan, trainer_flags()), json.dumps(found)]))
    if config.run.out.endswith(".json"):  # otherwise it is the run's folder
        write_json(Path(config.run.out), found)
    return 0


if __name__ == "__main__":
    run_program(main)
