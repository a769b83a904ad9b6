"""What a run has allocated, against its plan.

torch's counters see what went through its allocator, and go on counting a KV cache whose pages have been given back;
the device's own count (NVML's, by `mem_get_info`) sees contexts, NCCL, captured graphs and mapped pages, but no peak.
Together: what the device has beyond torch's blocks, plus torch's peak; pages that were given back cancel in it.
"""

import gc
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastrl.memory.parts import MIB
from fastrl.memory.plan import MemoryPlan

TOLERANCE = 0.05


class MemoryWatch:
    """Call it at the end of each phase: "generate" after sampling, "train" after the update; `begin` when one begins.

    held: for the CPU, tensors that the garbage collector does not show because they were frozen with the modules.
    others: bytes that other processes held of the card when the run began, which are none of its own.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        device: str,
        say: Callable[[str], None],
        held: Callable[[], Iterable[Tensor]] = lambda: (),
        others: int = 0,
    ):
        self.plan, self.device, self.say, self.held, self.others = plan, device, say, held, others
        self.warned: set[str] = set()
        self.peak = 0  # of torch in this step, bytes

    def __call__(self, phase: str) -> dict[str, float]:
        """-> memory/planned_mib/PHASE and memory/measured_mib/PHASE; one warning per phase that is TOLERANCE above.

        On a GPU also memory/peak_mib, torch's own peak of the step so far. On the CPU the tensors that are alive now
        are measured, and no warning is given: they are no peak.
        """
        cuda = self.device.startswith("cuda")
        if cuda:
            own = torch.cuda.max_memory_allocated(self.device)
            self.peak = own if phase == "generate" else max(self.peak, own)
        planned, measured = self.planned(phase), measure(self.device, self.held()) - self.others
        if cuda and phase not in self.warned and measured > (1 + TOLERANCE) * planned:
            self.warned.add(phase)
            self.say(
                f"warning: memory in {phase}: planned {planned / MIB:.0f} MiB, measured {measured / MIB:.0f} MiB "
                f"({measured / planned - 1:+.0%})"
            )
        found = {f"memory/planned_mib/{phase}": planned / MIB, f"memory/measured_mib/{phase}": measured / MIB}
        return found | ({"memory/peak_mib": self.peak / MIB} if cuda else {})

    def begin(self) -> None:
        """Forget what was there before: gradients that have just given their memory back are no part of sampling."""
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)

    def planned(self, phase: str) -> int:
        return max(self.plan.total(p) for p in self.plan.phases if (p == "generate") == (phase == "generate"))


def outcome(rows: Iterable[dict[str, float]]) -> list[str]:
    """Metrics of a run's steps -> one line, the most that each phase took beside its plan; none without a GPU.

    Example: "memory: at most 61.2 of 64.0 GiB planned in generate, 70.1 of 70.9 GiB planned in train"
    """
    most: dict[str, tuple[float, float]] = {}
    for row in rows:
        for phase in ("generate", "train"):
            measured, planned = (row.get(f"memory/{what}_mib/{phase}") for what in ("measured", "planned"))
            if measured is not None and planned is not None:
                most[phase] = max(most.get(phase, (0.0, 0.0)), (measured, planned))
    parts = [f"{mib / 1024:.1f} of {planned / 1024:.1f} GiB planned in {p}" for p, (mib, planned) in most.items()]
    return [f"memory: at most {', '.join(parts)}"] if parts else []


def measure(device: str, held: Iterable[Tensor] = ()) -> int:
    """Bytes: on CUDA the device's peak since the last call, as far as it is torch's; else tensors that are alive."""
    if not device.startswith("cuda"):
        return live_bytes(held)
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return outside + peak


def live_bytes(held: Iterable[Tensor] = ()) -> int:
    """Bytes of the tensors that the garbage collector shows and of `held`, storages shared by several counted once."""
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    storages = {}
    for tensor in [*found, *held]:
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
