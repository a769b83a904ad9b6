"""What a run takes on one GPU, by part and phase, before anything is loaded.

    generate   the engine samples
    score      log-probabilities and values without gradients, where the objective needs any
    backward   forward and backward of one microbatch
    step       the gradient reduced and clipped, the optimizer's step, the weights gathered

The last three are a run's train phase.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fastrl.memory.parts import (
    CONTEXT,
    GRAPHS,
    HF_GROWTH,
    MIB,
    MemorySettings,
    ModelShape,
    backward_moments,
    buffer,
    checkpoints,
    engine_bytes,
    head_bytes,
    kv_per_sequence,
    optimizer_bytes,
    score_moments,
    snapshot_bytes,
    staying,
    step_bytes,
    trained,
)
from fastrl.weights.buffer import round_up
from fastrl.weights.host_slabs import SLAB

PHASES = ("generate", "score", "backward", "step")
CARDS = {"h100": 79.6, "h200": 139.8}  # GiB that NVML calls total
USABLE = 0.97  # of a card: the rest is lost between blocks of the allocators; estimate until measured


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by part and phase, for one rank; `host`: what lies in the host's memory instead, at its largest."""

    model: ModelShape
    settings: MemorySettings
    parts: dict[str, dict[str, int]]
    host: dict[str, int]
    least_kv: int  # bytes without which the engine cannot run

    @property
    def usable(self) -> int:
        return int(USABLE * self.settings.capacity)

    def at(self, phase: str) -> int:
        """Bytes in a phase without the KV cache."""
        return sum(part.get(phase, 0) for part in self.parts.values())

    def kv_at(self, phase: str) -> bool:
        return phase == "generate" or (self.settings.kv_kept and self.settings.engine == "vllm")

    @property
    def kv_bytes(self) -> int:
        """Of the KV cache: as asked for, else what the other parts leave, up to what all running sequences take."""
        s = self.settings
        if s.kv_bytes or s.engine == "hf" or not s.capacity:
            return max(s.kv_bytes, self.least_kv)
        room = min(self.usable - self.at(phase) for phase in PHASES if self.kv_at(phase))
        most = max(s.running, 1) * kv_per_sequence(self.model, s)
        return max(self.least_kv, min(room, most))

    @property
    def kv_sequences(self) -> int:
        """Sequences of the whole context that the KV cache holds."""
        return self.kv_bytes // (kv_per_sequence(self.model, self.settings) or 1)

    def total(self, phase: str) -> int:
        return self.at(phase) + (self.kv_bytes if self.kv_at(phase) else 0)

    def missing(self, phase: str) -> int:
        """Bytes that a phase needs beyond the usable ones, with the smallest KV cache; negative: what is left."""
        least = max(self.least_kv, self.settings.kv_bytes) if self.kv_at(phase) else 0
        return self.at(phase) + least - self.usable

    @property
    def worst(self) -> str:
        """The phase that needs the most."""
        return max(self.phases, key=self.missing)

    @property
    def phases(self) -> list[str]:
        return [p for p in PHASES if p != "score" or self.settings.scores]

    @property
    def fits(self) -> bool:
        return not self.settings.capacity or self.missing(self.worst) <= 0

    def __str__(self) -> str:
        totals = ", ".join(f"{self.total(p) / MIB:.1f} MiB in {p}" for p in self.phases)
        worst = {name: part.get(self.worst, 0) for name, part in self.parts.items()}
        parts = ", ".join(f"{name} {size / MIB:.1f}" for name, size in worst.items() if size)
        return f"planned, not measured: {totals} ({self.worst}: {parts})"


def plan_memory(model: ModelShape, settings: MemorySettings) -> MemoryPlan:
    """Never raises: a run that does not fit has a plan that says by how much."""
    s, shard = settings, buffer(model.elements, settings.ranks) // settings.ranks
    policy = trained(model.elements, s.optimizer, s)
    host: dict[str, int] = {}
    whole = dict.fromkeys(PHASES)
    state = PHASES[2:] if "optimizer" in s.offload else PHASES
    parts: dict[str, tuple[Iterable[str], int]] = {
        "weights": (whole, policy["weights"]),
        "gradients": (PHASES[2:], policy["gradients"]),
        "master": (state, policy["master"]),
        "optimizer": (state, policy["optimizer"]),
        "snapshots": (("backward", "step"), snapshot_bytes(shard, s)),
        "rule": (whole, s.keeps * shard * max(4, s.dtype.itemsize)),
    }
    if "optimizer" in s.offload:
        host["master"], host["optimizer"] = policy["master"], policy["optimizer"]
    if s.optimizer.startswith("paged"):
        host["optimizer"] = optimizer_bytes(shard, s.optimizer)
    if s.reference:
        # on the host it comes for as long as it scores
        parts["reference"] = (("score",) if s.reference_on_host else whole, model.parameters * s.dtype.itemsize)
        if s.reference_on_host:
            host["reference"] = model.parameters * s.dtype.itemsize
    table = {name: dict.fromkeys(phases, size) for name, (phases, size) in parts.items()}
    if s.critic_optimizer:
        critic = trained(model.critic_elements, s.critic_optimizer, s)
        # its gradients have memory while it learns, in the place of the policy's
        held = {"weights": whole, "master": state, "optimizer": state}
        table["critic"] = {phase: sum(critic[name] for name in held if phase in held[name]) for phase in PHASES}
        if "optimizer" in s.offload:
            host["critic"] = critic["master"] + critic["optimizer"]
    if "activations" in s.offload:
        host["activations"] = round_up(checkpoints(model, s) - staying(model, s), SLAB)
    peaks = {"score": score_moments(model, s), "backward": backward_moments(model, s)}
    worst = {phase: max(moments, key=lambda moment: moment.total) for phase, moments in peaks.items()}
    table["activations"] = {phase: moment.activations for phase, moment in worst.items()}
    table["logits"] = {phase: moment.logits for phase, moment in worst.items()} | {"step": head_bytes(model, s)["step"]}
    table["workspace"] = {"generate": engine_bytes(model, s), "step": step_bytes(model, s)}
    if s.cuda:
        graphs = GRAPHS if s.engine == "vllm" else 0
        table["graphs"], table["context"] = dict.fromkeys(PHASES, graphs), dict.fromkeys(PHASES, CONTEXT)
    if s.engine == "hf":
        least = int(HF_GROWTH * s.running * kv_per_sequence(model, s))
    else:
        least = kv_per_sequence(model, s)
    return MemoryPlan(model=model, settings=s, parts=table, host=host, least_kv=least)
