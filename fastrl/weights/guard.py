"""What a run is stopped for: steps that are not finite or out of proportion, and an engine that samples otherwise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastrl.base.types import EngineError, NumericsError


@dataclass
class Guard:
    """Whether to take an optimizer step; counts what is refused, and gives up when that goes on.

    Refused are a loss or a gradient norm that is not finite, and spikes: above mean + `spike_sigma` standard deviations
    of the last WINDOW steps that were taken, once there are FEWEST of them, and above FACTOR times the largest of them.
    Norms of policy gradients have heavy tails: of 500 sound steps of the embedded run 26 to 64 lie above the first
    bound, up to a hundred times the median, when a group of right answers holds a rare wrong one. None is above both.
    Both numbers are already reduced over ranks, so every rank decides the same. The norm is tested before clipping,
    because clipping by a NaN norm would turn every gradient into NaN. A norm of exactly zero means that no completion
    carried a signal: nothing to learn, so the step is left out too, and weights, moments and decay stay as they are.

    An update rule may take many optimizer steps on one batch. All are tested, and all are one training step when it
    comes to giving up: a single bad batch is bad in each of its passes. A spike now and then is no reason to.
    """

    max_in_a_row: int = 3  # training steps
    max_recent: int = 10  # training steps of the last RECENT, spikes not counted
    spike_sigma: float = 6.0  # 0: spikes pass
    lr_setting: str = "--optim.lr"  # what to lower when it gives up
    skipped: int = field(default=0, init=False)  # optimizer steps refused, over the whole run
    empty: int = field(default=0, init=False)  # norm exactly zero, over the whole run
    in_a_row: int = field(default=0, init=False)  # training steps
    bad_steps: list[int] = field(default_factory=list, init=False)  # numbers of the recent ones that were not finite
    window: list[list[float]] = field(default_factory=list, init=False)  # loss and norm of steps taken, oldest first
    refused: list[str] = field(default_factory=list, init=False)  # why, in this training step
    last: list[str] = field(default_factory=list, init=False)  # why, in the last step that had any

    WINDOW, FEWEST, RECENT = 128, 64, 1000
    FACTOR = 5.0

    def admit(self, grad_norm: float, loss: float = 0.0) -> bool:
        """Whether to take the step."""
        reason = self.fault(grad_norm, loss)
        if reason:
            self.skipped += 1
            self.refused.append(reason)
        elif grad_norm == 0:
            self.empty += 1
        else:
            self.window = [*self.window, [loss, grad_norm]][-self.WINDOW :]
        return not reason and grad_norm > 0

    def fault(self, grad_norm: float, loss: float) -> str:
        """What is wrong with a step, in words; empty if nothing is."""
        values = {"loss": loss, "grad_norm": grad_norm}
        for name, value in values.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
        if not self.spike_sigma or grad_norm == 0 or len(self.window) < self.FEWEST:
            return ""
        for (name, value), past in zip(values.items(), zip(*self.window, strict=True), strict=True):
            mean, sigma = spread(past)
            largest = max(map(abs, past))
            if value > max(mean + self.spike_sigma * sigma, self.FACTOR * largest):
                return (
                    f"{name} {value:.4g} is a spike: the last {len(past)} steps had {mean:.3g} on average, a standard "
                    f"deviation of {sigma:.3g} and at most {largest:.3g}"
                )
        return ""

    def end_step(self, step: int) -> list[str]:
        """Close training step number `step`; why optimizer steps of it were refused."""
        reasons, self.refused = self.refused, []
        self.in_a_row = self.in_a_row + 1 if reasons else 0
        broken = any("spike" not in reason for reason in reasons)
        self.bad_steps = [n for n in self.bad_steps if n > step - self.RECENT] + [step] * broken
        self.last = reasons or self.last
        return reasons

    def give_up(self) -> None:
        """Raise NumericsError if too many training steps were refused."""
        if self.in_a_row >= self.max_in_a_row:
            count = f"{self.in_a_row} steps in a row"
        elif len(self.bad_steps) > self.max_recent:
            count = f"{len(self.bad_steps)} of the last {self.RECENT} steps"
        else:
            return
        spikes = "; --spike-sigma 0 lets spikes pass" if "spike" in self.last[-1] else ""
        raise NumericsError(
            f"{count} were refused, the last because {self.last[-1]}. The weights are those of the last good step. "
            f"The batches are in the run's folder `bad`; lower {self.lr_setting}, or resume from an earlier checkpoint"
            f"{spikes}"
        )

    def state_dict(self) -> dict:
        return {
            "skipped": self.skipped,
            "empty": self.empty,
            "in_a_row": self.in_a_row,
            "bad_steps": self.bad_steps,
            "window": self.window,
        }

    def load_state_dict(self, state: dict) -> None:
        self.skipped, self.empty, self.in_a_row = state["skipped"], state["empty"], state["in_a_row"]
        self.bad_steps, self.window = list(state["bad_steps"]), list(state["window"])


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a population)."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))


@dataclass
class MismatchWatch:
    """How far the engine's log-probabilities of a step are from the trainer's, before any update.

    exp |difference| of a token is 1 where they agree; on the embedded model bfloat16 makes its mean 1.003. Beyond WARN
    each kind is warned of once; beyond STOP in `max_in_a_row` steps in a row the run ends: it learns from others.
    """

    max_in_a_row: int = 3
    in_a_row: int = field(default=0, init=False)
    warned: set[str] = field(default_factory=set, init=False)

    WARN = {"sampling/token_mult_prob_error/mean": 1.05, "sampling/mismatch_kl": 1e-3}
    STOP = {"sampling/token_mult_prob_error/median": 1.1, "sampling/mismatch_kl": 0.1}
    RATIO = (0.5, 2.0)  # of the mean importance ratio

    def observe(self, metrics: dict[str, float]) -> list[str]:
        """`metrics.sampling_mismatch` of a step, empty if nothing was sampled -> warnings. Raises EngineError."""
        if not metrics:
            return []
        ratio = metrics["sampling/importance_sampling_ratio/mean"]
        broken = [f"{name} {metrics[name]:.3g}" for name, limit in self.STOP.items() if not metrics[name] <= limit]
        if not self.RATIO[0] <= ratio <= self.RATIO[1]:
            broken.append(f"sampling/importance_sampling_ratio/mean {ratio:.3g}")
        self.in_a_row = self.in_a_row + 1 if broken else 0
        if self.in_a_row >= self.max_in_a_row:
            raise EngineError(
                f"in {self.in_a_row} steps in a row the engine's log-probabilities were not the trainer's: "
                f"{', '.join(broken)}; the last good checkpoint is older than that"
            )
        found = [name for name, limit in self.WARN.items() if not metrics[name] <= limit and name not in self.warned]
        self.warned |= set(found)
        return [
            f"warning: engine and trainer disagree: {name} {metrics[name]:.3g}, usually below {self.WARN[name]:g}; "
            "--is-correction tis weighs tokens by the ratio"
            for name in found
        ]

    def state_dict(self) -> dict:
        return {"in_a_row": self.in_a_row, "warned": sorted(self.warned)}

    def load_state_dict(self, state: dict) -> None:
        self.in_a_row, self.warned = state["in_a_row"], set(state["warned"])
