"""The memory plan beside what steps of real widths allocate on the pretended device.

PYTHONPATH=tests python -m support.pretend.planned      the table of docs/memory.md
"""

import support.pretend.cuda  # noqa: F401  isort: skip  before torch

import gc
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fastrl.memory.plan import MemoryPlan
from support.pretend.widths import MIB, Measured, Sizes, real_widths, watch, write_model

MODES = ("none", "selective", "full")
METHODS: dict[str, tuple[object, ...]] = {  # in every checkpoint mode
    "GRPO": (),
    "PPO": ("--objective", "ppo", "--kl", 0.01),
    "A*-PO": ("--objective", "apo", "--objective.value-mode", "zero"),
    "REBEL": ("--objective", "rebel"),
    "SFPO": ("--update", "sfpo"),
    "GXPO": ("--update", "gxpo"),
    "split master": ("--master", "split"),
    "offload optimizer": ("--offload", "optimizer"),
    "offload optimizer,activations": ("--offload", "optimizer,activations"),
}
OTHERS: dict[str, tuple[object, ...]] = {
    "REBEL, paired": ("--objective", "rebel", "--paired"),
    "SFPO, state restored": ("--update", "sfpo", "--opt-state", "restore"),
    "GXPO, coord_grad": ("--update", "gxpo", "--ratio", "coord_grad"),
    "GXPO, tensor": ("--update", "gxpo", "--ratio", "tensor"),
    "bfloat16 gradients": ("--grad-dtype", "bfloat16"),
    "split master, bfloat16 gradients": ("--master", "split", "--grad-dtype", "bfloat16"),
    "reference on the host": ("--kl", 0.01, "--reference-on-host"),
}
# the layer's own peak is the largest in the last ones, as in large models and long contexts
SHAPES = {
    "qwen2.5-0.5b, 4 layers": ("qwen2.5-0.5b", dict(num_hidden_layers=4), Sizes()),
    "qwen3-0.6b, 2 layers": ("qwen3-0.6b", dict(num_hidden_layers=2), Sizes()),
    "llama-3.2-1b, 2 layers, own head": (
        "llama-3.2-1b", dict(num_hidden_layers=2, tie_word_embeddings=False), Sizes(tokens=16384),
    ),
    "qwen2.5-3b, 1 layer": ("qwen2.5-3b", dict(num_hidden_layers=1), Sizes(tokens=16384)),
}  # fmt: skip
FIRST = next(iter(SHAPES))
NOT_COUNTED = ("graphs", "context")  # what no allocator of torch sees


@dataclass(frozen=True)
class Phase:
    """Bytes by part, without what torch's allocator does not see."""

    name: str
    planned: dict[str, int]
    measured: dict[str, int]

    @property
    def sums(self) -> tuple[int, int]:
        return sum(self.planned.values()), sum(self.measured.values())

    @property
    def deviation(self) -> float:
        """Of the plan from what was measured."""
        planned, measured = self.sums
        return planned / measured - 1

    def part(self) -> tuple[str, float]:
        """The part that is off the most, as a share of the phase."""
        off = {
            name: (self.planned.get(name, 0) - self.measured.get(name, 0)) / self.sums[1]
            for name in self.planned.keys() | self.measured.keys()
        }
        return max(off.items(), key=lambda item: abs(item[1]))


def compared(plan: MemoryPlan, found: Measured) -> list[Phase]:
    """The phases of which something was measured."""
    phases = []
    for phase in plan.phases:
        parts = {name: size for name, size in found.get(phase, {}).items() if size}
        if not parts or phase == "score" and parts.get("activations", 0) < MIB:  # nothing was scored
            continue
        planned = {name: size[phase] for name, size in plan.parts.items() if size.get(phase)}
        planned |= {"KV cache": plan.kv_bytes} if phase == "generate" else {}
        phases.append(Phase(phase, {n: x for n, x in planned.items() if n not in NOT_COUNTED}, parts))
    return phases


def trained(model: Path, *flags: object, sizes: Sizes = Sizes()) -> list[Phase]:  # noqa: B008  it is frozen
    """Phases of a step that is not the first, in which the optimizer makes its state."""
    with tempfile.TemporaryDirectory() as folder:
        with real_widths(Path(folder), model, *flags, sizes=sizes) as (trainer, probe):
            watch(trainer, probe)
            trainer.step()
            probe.found.clear()
            trainer.step()
            phases = [phase for phase in compared(trainer.memory.plan, probe.found) if phase.name != "generate"]  # pyright: ignore[reportFunctionMemberAccess]
        del trainer, probe
        gc.collect()  # a trainer is in cycles, and the next case counts from nothing
    return phases


def sampled(model: Path, *flags: object) -> list[Phase]:
    """The phase in which the Hugging Face engine samples 24 tokens after prompts of up to 1000."""
    sizes = Sizes(prompt=1000, problems=8)
    with tempfile.TemporaryDirectory() as folder:
        with real_widths(Path(folder), model, *flags, sizes=sizes, samples=True) as (trainer, probe):
            watch(trainer, probe)
            trainer.step()
            probe.found.clear()
            trainer.step()
            phases = [phase for phase in compared(trainer.memory.plan, probe.found) if phase.name == "generate"]  # pyright: ignore[reportFunctionMemberAccess]
        del trainer, probe
        gc.collect()
    return phases


def row(model: str, case: str, phases: list[Phase]) -> str:
    cells = [f"{phase.sums[0] / MIB:.0f} / {phase.sums[1] / MIB:.0f} ({phase.deviation:+.1%})" for phase in phases]
    by_phase = dict(zip([phase.name for phase in phases], cells, strict=True))
    name, off = max((phase.part() for phase in phases), key=lambda found: abs(found[1]))
    shown = " | ".join(by_phase.get(phase, "-") for phase in ("generate", "score", "backward", "step"))
    return f"| {model} | {case} | {shown} | {name} {off:+.1%} |"


HEADER = "| model | case | generate | score | backward | step | part that is off the most |"


def main() -> None:
    print(HEADER, "|---|---|---|---|---|---|---|", sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for number, (name, (shape, changes, _)) in enumerate(SHAPES.items()):
            models[name] = write_model(Path(folder) / str(number), shape, **changes)
        first = models[FIRST]
        print(row(FIRST, "GRPO, `--engine hf`", sampled(first)))
        cases = [(case, mode, METHODS[case]) for case in METHODS for mode in MODES]
        for case, mode, flags in [*cases, *((case, "full", OTHERS[case]) for case in OTHERS)]:
            print(row(FIRST, f"{case}, {mode}", trained(first, *flags, "--checkpoint-activations", mode)), flush=True)
        for name, (_, _, sizes) in list(SHAPES.items())[1:]:
            for mode in MODES:
                phases = trained(models[name], "--checkpoint-activations", mode, sizes=sizes)
                print(row(name, f"GRPO, {mode}", phases), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # torch's threads for the device have no end in a CPU build
