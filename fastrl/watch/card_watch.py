"""What a run does to its card: memory by phase, energy, load and clocks, sampled by a thread while it goes on."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Lock, Thread
from time import monotonic
from typing import TypeVar

from fastrl.base import ranks
from fastrl.base.log import say
from fastrl.base.spans import Spans
from fastrl.watch.card import MIB, Card, NoCard, Reading

INTERVAL_S = 0.1
JOULES_PER_KWH = 3.6e6
MEANS = {"busy": "gpu/busy_frac", "sm_mhz": "gpu/sm_mhz", "watts": "gpu/power_w"}  # of a reading -> metric
SLOWED = "gpu/slowed_frac"
USUAL = "power_cap"  # what a card under full load meets anyway: no reason for a warning
WORTH_A_WARNING = 0.05  # of a step's samples

T = TypeVar("T")


@dataclass(slots=True)
class Spread:
    count: int = 0
    total: float = 0.0
    peak: float = 0.0

    def add(self, value: float) -> None:
        self.count, self.total, self.peak = self.count + 1, self.total + value, max(self.peak, value)

    @property
    def mean(self) -> float:
        return self.total / self.count


class CardWatch:
    """Samples from `start` to `stop`; `begin_step` and `end_step` are called around a step, on all ranks.

    A driver that fails ends the sampling with one warning, and never the run. Each rank reads its own card.
    """

    def __init__(self, card: Card | NoCard | None = None, spans: Spans | None = None, say: Callable[[str], None] = say):
        """card: None without a GPU, where nothing is done and nothing gathered; NoCard: a GPU without readings."""
        self.card = card if isinstance(card, Card) else None
        self.on_gpu, self.spans, self.say = card is not None, spans or Spans(), say
        self.lock, self.stopped = Lock(), Event()
        self.newest: tuple[float, Reading] | None = None  # monotonic seconds, and what was read then
        self.joules: float | None = None  # since the first sample; None without one, and without such figures
        self.before_kwh = 0.0  # of the starts that this run continues, all ranks
        self.warned: set[str] = set()
        self.memory: defaultdict[tuple[str, str], Spread] = defaultdict(Spread)  # of card or process, by phase: MiB
        self.means: defaultdict[str, Spread] = defaultdict(Spread)
        self.slowed: Counter[str] = Counter()
        self.looks = 0  # samples that say what slows the clocks
        self.joules_at_begin: float | None = None

    def start(self) -> None:
        if self.card:
            self.look()
            Thread(target=self.sample, name="card watch", daemon=True).start()

    def stop(self) -> None:
        self.stopped.set()

    def sample(self) -> None:
        while not self.stopped.wait(INTERVAL_S):
            self.look()

    def look(self) -> None:
        """One sample, of the phase that runs now."""
        with self.lock:
            reading = self.ask(Card.read)
            if reading is None:
                return
            now = monotonic()
            self.count_energy(now, reading)
            self.newest = now, reading
            self.count_memory(self.spans.progress.phase, reading.used, reading.own)
            for field, name in MEANS.items():
                if (value := getattr(reading, field)) is not None:
                    self.means[name].add(value)
            if reading.slowed is not None:
                self.looks += 1
                self.slowed.update(f"{SLOWED}/{reason}" for reason in reading.slowed)
                self.slowed[SLOWED] += bool(reading.slowed)

    def backward(self) -> None:
        """To be called when the backward pass of a microbatch has been issued: by then it has its memory."""
        with self.lock:
            if found := self.ask(Card.memory):
                self.count_memory("backward", *found)

    def ask(self, method: Callable[[Card], T]) -> T | None:
        """What a method of the card returns; None where there is no card any more."""
        if self.card is None or self.stopped.is_set():
            return None
        try:
            return method(self.card)
        except NoCard as error:
            self.stop()
            self.joules = None  # of a run that is not known to its end
            self.say(f"warning: the GPU cannot be read any more, and its metrics end here ({error})")
            return None

    def count_energy(self, now: float, reading: Reading) -> None:
        """By the card's counter, or from its power where it has none."""
        if self.newest is None:
            self.joules = None if reading.joules is None and reading.watts is None else 0.0
            return
        then, before = self.newest
        if self.joules is None:
            return
        if reading.joules is not None and before.joules is not None:
            self.joules += max(0.0, reading.joules - before.joules)  # a driver that is loaded anew counts from 0
        elif reading.watts is not None and before.watts is not None:
            self.joules += (reading.watts + before.watts) / 2 * (now - then)

    def count_memory(self, phase: str, used: int | None, own: int | None) -> None:
        for whose, size in (("card", used), ("process", own)):
            if phase and size is not None:
                self.memory[whose, phase].add(size / MIB)

    def begin_step(self) -> None:
        self.look()
        with self.lock:
            self.means.clear()
            self.slowed.clear()
            self.looks, self.joules_at_begin = 0, self.joules

    def end_step(self) -> dict[str, float]:
        """Metrics of the step, over all ranks; memory since the last step's end, so of saving and evaluating too."""
        if not self.on_gpu:
            return {}
        self.look()
        with self.lock:
            own = self.figures()
            self.memory.clear()
        found = over_ranks(own)
        if "energy/run_kwh" in found:
            found["energy/run_kwh"] += self.before_kwh
        self.warn(found)
        return found

    def figures(self) -> dict[str, float]:
        """Of this rank's card."""
        found = {name: spread.mean for name, spread in self.means.items()}
        for (whose, phase), spread in self.memory.items():
            found |= {f"memory/{whose}_mib/{phase}": spread.peak, f"memory/{whose}_mean_mib/{phase}": spread.mean}
        if self.looks:
            found |= {SLOWED: 0.0} | {name: count / self.looks for name, count in self.slowed.items()}
        if self.joules is not None and self.joules_at_begin is not None:
            found["energy/step_j"] = self.joules - self.joules_at_begin
            found["energy/run_kwh"] = self.joules / JOULES_PER_KWH
        return found

    def warn(self, found: dict[str, float]) -> None:
        for name, fraction in found.items():
            reason = name.removeprefix(f"{SLOWED}/")
            if reason not in (name, USUAL, *self.warned) and fraction >= WORTH_A_WARNING:
                self.warned.add(reason)
                self.say(
                    f"warning: {reason} held the GPU's clocks down in {fraction:.0%} of the samples; "
                    "look at its cooling and its power supply"
                )

    def run_kwh(self) -> float | None:
        """Energy of the run so far, all ranks; None where a card does not give it. To be called on all ranks."""
        if not self.on_gpu:
            return None
        self.look()
        parts = [joules for joules in ranks.gather(self.joules) if joules is not None]
        return self.before_kwh + sum(parts) / JOULES_PER_KWH if len(parts) == ranks.size() else None


def slowed_by(metrics: dict) -> str:
    """What held the clocks down in how many of the samples, such as "power_cap 75%"; empty where nothing did."""
    found = {name.removeprefix(f"{SLOWED}/"): part for name, part in metrics.items() if name.startswith(f"{SLOWED}/")}
    return ", ".join(f"{reason} {part:.0%}" for reason, part in sorted(found.items()))


def over_ranks(own: dict[str, float]) -> dict[str, float]:
    """Energies are added, if all ranks have them; of peaks and of what slows a card the worst counts, else the mean."""
    parts, merged = ranks.gather(own), {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        if name.startswith("energy/"):
            if len(values) == len(parts):
                merged[name] = sum(values)
        elif name.startswith(("memory/card_mib/", "memory/process_mib/", SLOWED)):
            merged[name] = max(values)
        else:
            merged[name] = sum(values) / len(values)
    return merged
