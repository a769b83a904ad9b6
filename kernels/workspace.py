"""Memory for logits that one call after another takes."""

import torch
from torch import Tensor


class Workspace:
    """Allocated by the first call that is given it, kept for the next ones: a run has one, and its owner releases it.

    Example: workspace = Workspace(); linear_logprob(..., workspace=workspace). A call leaves nothing in it that is read
    later, so its backward may take it too. Calls on two streams need two.
    """

    __slots__ = ("memory",)

    def __init__(self):
        self.memory: Tensor | None = None

    def logits(self, rows: int, words: int, device: torch.device) -> Tensor:
        """Uninitialized float32 [rows, words], contiguous; new memory only where no call before needed as much."""
        needed = rows * words
        if self.memory is None or self.memory.numel() < needed or self.memory.device != device:
            self.release()  # first: both at a time may not fit
            self.memory = torch.empty(needed, dtype=torch.float32, device=device)
        return self.memory[:needed].view(rows, words)

    def release(self) -> None:
        """Give the memory back until the next call."""
        self.memory = None
