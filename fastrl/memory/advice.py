"""What fits: tokens of a microbatch, the longest context, the largest model; and what to change when a run does not.

Every search plans again and again, which costs microseconds, and relies on more tokens never taking less memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from fastrl.memory.parts import GIB, MIB, MemorySettings, ModelShape
from fastrl.memory.plan import MemoryPlan, plan_memory

STEP = 1024  # tokens; every number of tokens that is searched for is a multiple of it
MOST_TOKENS = 16384  # of a microbatch, unless one sequence has more: the head is as fast with these as with more
LONGEST = 1 << 20  # tokens of context that are looked at


@dataclass(frozen=True, slots=True)
class Knob:
    """One way to take less memory. Of those of one group a run has one."""

    group: str
    flag: str
    changes: dict[str, object]

    def apply(self, settings: MemorySettings) -> MemorySettings:
        return replace(settings, **self.changes)


def round_up(tokens: int) -> int:
    return -(-tokens // STEP) * STEP


def largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest multiple of STEP from low to high that fits; 0 if low does not. low is a multiple of it."""
    if not fits(low):
        return 0
    good, bad = low // STEP, high // STEP + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle * STEP) else (good, middle)
    return good * STEP


def best_tokens(model: ModelShape, settings: MemorySettings) -> int:
    """Tokens of a microbatch: as many as fit, at least what cannot be cut, at most MOST_TOKENS or that."""
    least = round_up(settings.least_rows * settings.context)

    def fits(tokens: int) -> bool:
        return plan_memory(model, replace(settings, tokens_per_microbatch=tokens)).fits

    return largest(least, max(least, MOST_TOKENS), fits) or least


def longest_context(model: ModelShape, settings: MemorySettings) -> int:
    """Tokens of the longest context that runs under these settings, with as small a microbatch as it allows."""

    def fits(context: int) -> bool:
        return plan_memory(model, replace(settings, context=context, tokens_per_microbatch=STEP)).fits

    return largest(STEP, LONGEST, fits)


def largest_model(shapes: dict[str, ModelShape], settings: MemorySettings) -> str:
    """The name of the model with the most parameters that runs under these settings, or an empty one."""
    small = replace(settings, tokens_per_microbatch=STEP)
    fitting = [model for model in shapes.values() if plan_memory(model, small).fits]
    return max(fitting, key=lambda model: model.parameters).name if fitting else ""


def knobs(s: MemorySettings) -> Iterator[Knob]:
    """All that would change something, what costs the least speed first."""
    two_bytes = s.dtype.itemsize == 2
    if s.checkpoint == "none" and s.attention != "eager":
        yield Knob("checkpoint", "--checkpoint-activations selective", dict(checkpoint="selective"))
    if s.checkpoint != "full":
        yield Knob("checkpoint", "--checkpoint-activations full", dict(checkpoint="full"))
    least = round_up(s.least_rows * s.context)
    if s.tokens > least:
        yield Knob("tokens", f"--tokens-per-microbatch {least}", dict(tokens_per_microbatch=least))
    if s.optimizer == "adamw" and not s.per_coordinate:
        yield Knob("optimizer", "--optim.name adamw8bit", dict(optimizer="adamw8bit"))
    if s.critic_optimizer == "adamw":
        yield Knob("critic", "--critic.optim.name adamw8bit", dict(critic_optimizer="adamw8bit"))
    if two_bytes and s.master == "float32":
        yield Knob("master", "--master split", dict(master="split"))
    if two_bytes and s.grad_dtype.itemsize > 2:
        yield Knob("gradients", "--grad-dtype bfloat16", dict(grad_dtype=s.dtype))
    if s.reference and not s.reference_on_host:
        yield Knob("reference", "--reference-on-host", dict(reference_on_host=True))
    if s.optimizer != "paged_adamw8bit" and not s.per_coordinate:
        yield Knob("optimizer", "--optim.name paged_adamw8bit", dict(optimizer="paged_adamw8bit"))
    if not s.offload:
        yield Knob("offload", "--offload optimizer", dict(offload=("optimizer",)))
    if "activations" not in s.offload:
        yield Knob("offload", "--offload optimizer,activations", dict(offload=("optimizer", "activations")))
    for fewer in sorted({max(1, s.running // 4), max(1, s.running // 16)} - {s.running}, reverse=True):
        yield Knob("sequences", f"--max-num-seqs {fewer}", dict(max_num_seqs=fewer))


def saved(plan: MemoryPlan, knob: Knob) -> int:
    """Bytes less in the phase that needs the most."""
    after = plan_memory(plan.model, knob.apply(plan.settings))
    return plan.missing(plan.worst) - after.missing(plan.worst)


def smallest_set(plan: MemoryPlan, choice: list[Knob]) -> tuple[Knob, ...] | None:
    """The fewest of the knobs with which the run fits, the cheapest of those; None if all together are not enough."""
    for count in range(1, len({knob.group for knob in choice}) + 1):
        for chosen in combinations(choice, count):
            if len({knob.group for knob in chosen}) == count and with_knobs(plan, chosen).fits:
                return chosen
    return None


def with_knobs(plan: MemoryPlan, chosen: tuple[Knob, ...]) -> MemoryPlan:
    settings = plan.settings
    for knob in chosen:
        settings = knob.apply(settings)
    return plan_memory(plan.model, settings)


def table(plan: MemoryPlan) -> list[str]:
    """Parts by phases, GiB (MiB for small runs), and what is left of the card."""
    unit, name = (GIB, "GiB") if max(map(plan.total, plan.phases)) >= GIB else (MIB, "MiB")

    def row(label: str, sizes: list[int | None], host: int = 0) -> str:
        cells = [f"{'-' if not size else f'{size / unit:.2f}':>10}" for size in [*sizes, host]]
        return f"{label:22}" + "".join(cells)

    header = "".join(f"{phase:>10}" for phase in [*plan.phases, "host"])
    lines = [f"{f'{name} per GPU, planned':22}{header}"]
    for part, sizes in plan.parts.items():
        if any(sizes.values()) or plan.host.get(part):
            lines.append(row(part, [sizes.get(phase, 0) for phase in plan.phases], plan.host.get(part, 0)))
    lines.append(row("KV cache", [plan.kv_bytes if plan.kv_at(phase) else 0 for phase in plan.phases]))
    lines.append(row("sum", [plan.total(phase) for phase in plan.phases], sum(plan.host.values())))
    if plan.settings.capacity:
        lines.append(row("usable", [plan.usable] * len(plan.phases)))
    return lines


def advice(plan: MemoryPlan, flags: set[str]) -> list[str]:
    """For a run that does not fit: by how much, what each knob saves there, and the flags to copy; else nothing.

    flags: those that the trainer has; others are marked.
    """
    if plan.fits:
        return []
    choice = list(knobs(plan.settings))
    lines = [f"does not fit: {plan.missing(plan.worst) / GIB:.2f} GiB too much in {plan.worst}; what would save there:"]
    for knob in choice:
        if saved(plan, knob) > 0:
            note = "" if available(knob, flags) else "   (not an option of fastrl.train)"
            lines.append(f"  {knob.flag:40} {saved(plan, knob) / GIB:8.2f} GiB{note}")
    chosen = smallest_set(plan, [knob for knob in choice if available(knob, flags)]) or smallest_set(plan, choice)
    if chosen is None:
        everything = "all of them together are not enough: more GPUs, a shorter context or a smaller model"
        return [*lines, everything]
    return [*lines, f"enough: {' '.join(knob.flag for knob in chosen)}"]


def available(knob: Knob, flags: set[str]) -> bool:
    return knob.flag.split()[0] in flags
