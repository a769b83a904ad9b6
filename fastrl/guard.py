"""The check before every optimizer step: a gradient that is not finite never reaches the weights."""

import math
from dataclasses import dataclass, field

from fastrl.types import NumericsError


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
