"""The check before every optimizer step: a gradient that is not finite never reaches the weights."""

import math
from dataclasses import dataclass, field

from fastrl.types import NumericsError


@dataclass
class Guard:
    """Skip a step whose gradient norm is not finite; give up after `max_in_a_row` of them.

    The norm is already reduced over ranks, so every rank decides the same. It is tested before clipping, because
    clipping by a NaN norm would turn every gradient into NaN.
    """

    max_in_a_row: int = 3
    skipped: int = field(default=0, init=False)  # over the whole run
    in_a_row: int = field(default=0, init=False)

    def admit(self, grad_norm: float) -> bool:
        """Whether to take the step. Raises NumericsError when too many in a row were refused."""
        if math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.max_in_a_row:
            raise NumericsError(
                f"the gradient norm was not finite in {self.in_a_row} optimizer steps in a row (now {grad_norm}). "
                "The weights are those of the last good step; lower --optim.lr, or resume from an earlier checkpoint"
            )
        return False

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
