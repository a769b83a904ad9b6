"""What a run is stopped for: steps that are not finite or out of proportion, and an engine that samples otherwise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

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

    KL is the mean of exp d - d - 1 over sampled tokens, d their difference in nats; RATIO the mean of exp |d|, 1 where
    they agree. They are held against three limits:

    FIRST, absolute, until there is a normal level: a run that is wrong from its first step has none of its own.
    Rounding that gives d a standard deviation of s makes KL s^2 / 2 and RATIO about 1 + 0.8 s, and s goes as the
    spacing of the numbers. Measured in bfloat16, with 8 bits: a sound model of 135 M parameters has KL 0.0012, s 0.05;
    the embedded one, with two layers, 1e-7. FIRST there is four times the former. float16 has 3 bits more, which makes
    KL 64 times smaller, and a float32 product may be taken in TF32, with as many: 0.001 is far above it. Measured on
    the embedded model, what samples from something else is above FIRST in either type: layers exchanged, KL 6 to 8;
    a temperature that one side leaves out, 0.07 where it is 0.7 and 0.009 where it is 0.9.
    LATER, from the run itself, after BASE_STEPS steps within FIRST: FACTOR times the largest of them, but not below a
    tenth of FIRST, which single batches may reach.
    STOP, absolute and the same for all types: `max_in_a_row` steps in a row beyond it end the run, for it learns from
    other completions than its own.

    Of FIRST and of LATER each number is warned of once.
    """

    dtype: torch.dtype = torch.float32  # of the weights that are compared
    max_in_a_row: int = 3
    in_a_row: int = field(default=0, init=False)
    warned: set[str] = field(default_factory=set, init=False)
    base_steps: int = field(default=0, init=False)  # within FIRST, up to BASE_STEPS
    base: dict[str, float] = field(default_factory=dict, init=False)  # the largest number of each kind in them

    KL, RATIO = "sampling/mismatch_kl", "sampling/token_mult_prob_error/mean"
    WEIGHT = "sampling/importance_sampling_ratio/mean"
    FIRST = {RATIO: 1.05, KL: 1e-3}
    FIRST_BFLOAT16 = {RATIO: 1.1, KL: 5e-3}
    BASE_STEPS, FACTOR = 10, 5.0
    STOP = {"sampling/token_mult_prob_error/median": 1.1, KL: 0.1}
    WEIGHTS = (0.5, 2.0)  # of the mean importance ratio

    def observe(self, metrics: dict[str, float]) -> list[str]:
        """`metrics.sampling_mismatch` of a step, empty if nothing was sampled -> warnings. Raises EngineError."""
        if not metrics:
            return []
        broken = [f"{name} {metrics[name]:.3g}" for name, limit in self.STOP.items() if not metrics[name] <= limit]
        if not self.WEIGHTS[0] <= metrics[self.WEIGHT] <= self.WEIGHTS[1]:
            broken.append(f"{self.WEIGHT} {metrics[self.WEIGHT]:.3g}")
        self.in_a_row = self.in_a_row + 1 if broken else 0
        if self.in_a_row >= self.max_in_a_row:
            raise EngineError(
                f"in {self.in_a_row} steps in a row the engine's log-probabilities were not the trainer's: "
                f"{', '.join(broken)}; the last good checkpoint is older than that"
            )
        lines = []
        for name in self.first:
            limit, usual = self.limit(name)
            kind = f"{name} {usual}"
            if not metrics[name] <= limit and kind not in self.warned:
                self.warned.add(kind)
                lines.append(
                    f"warning: engine and trainer disagree: {name} {metrics[name]:.3g}, {usual} {limit:.3g}; "
                    "--is-correction tis weighs tokens by the ratio"
                )
        if self.base_steps < self.BASE_STEPS and all(metrics[name] <= limit for name, limit in self.first.items()):
            self.base_steps += 1
            self.base = {name: max(metrics[name], self.base.get(name, 0.0)) for name in self.first}
        return lines

    @property
    def first(self) -> dict[str, float]:
        return self.FIRST_BFLOAT16 if self.dtype == torch.bfloat16 else self.FIRST

    def limit(self, name: str) -> tuple[float, str]:
        """Of a number in this step, and what kind of limit it is."""
        if self.base_steps < self.BASE_STEPS:
            return self.first[name], f"in {str(self.dtype).removeprefix('torch.')} usually below"
        if name == self.KL:
            later = max(self.FACTOR * self.base[name], self.first[name] / 10)
        else:  # RATIO - 1 goes as the root of KL
            later = 1 + max(self.FACTOR**0.5 * (self.base[name] - 1), (self.first[name] - 1) / 10**0.5)
        return later, "in this run usually below"

    def state_dict(self) -> dict:
        return {
            "in_a_row": self.in_a_row,
            "warned": sorted(self.warned),
            "base_steps": self.base_steps,
            "base": dict(self.base),
        }

    def load_state_dict(self, state: dict) -> None:
        self.in_a_row, self.warned = state["in_a_row"], set(state["warned"])
        self.base_steps, self.base = state["base_steps"], dict(state["base"])
