"""What a run is stopped for: gradients that are not finite, and an engine that samples from something else."""

import math
from dataclasses import dataclass, field

from fastrl.types import EngineError, NumericsError


@dataclass
class Guard:
    """Skip a step whose gradient norm is not finite; give up after `max_in_a_row` of them.

    The norm is already reduced over ranks, so every rank decides the same. It is tested before clipping, because
    clipping by a NaN norm would turn every gradient into NaN. A norm of exactly zero means that no completion carried a
    signal: nothing to learn, so the step is left out too, and weights, moments and decay stay as they are.
    """

    max_in_a_row: int = 3
    lr_setting: str = "--optim.lr"  # what to lower when it gives up
    skipped: int = field(default=0, init=False)  # not finite, over the whole run
    in_a_row: int = field(default=0, init=False)
    empty: int = field(default=0, init=False)  # exactly zero, over the whole run

    def admit(self, grad_norm: float) -> bool:
        """Whether to take the step. Raises NumericsError when too many in a row were refused."""
        if math.isfinite(grad_norm):
            self.in_a_row = 0
            self.empty += grad_norm == 0
            return grad_norm > 0
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.max_in_a_row:
            raise NumericsError(
                f"the gradient norm was not finite in {self.in_a_row} optimizer steps in a row (now {grad_norm}). "
                f"The weights are those of the last good step; lower {self.lr_setting}, or resume from an earlier "
                "checkpoint"
            )
        return False

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "empty": self.empty}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row, self.empty = state["skipped"], state["in_a_row"], state["empty"]


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
        ]  # fmt: skip
