"""8-bit AdamW over a shard that is kept as bfloat16 weights and the 16 bits that they lack, a chunk at a time.

One float32 buffer is enough for all chunks: a chunk is joined in it, moved by an optimizer of its own and split again.
The states are those of one optimizer over the whole shard, cut where the chunks are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastrl.weights.buffer import ALIGN, PART
from fastrl.weights.halves import join, split
from fastrl.weights.optim import OptimConfig, ShardOptimizer


class SplitOptimizer:
    """As `fastrl.weights.optim.ShardOptimizer`, of high [n] bfloat16 and low [n] int16, n a multiple of 1024."""

    def __init__(self, config: OptimConfig, high: Tensor, low: Tensor, chunk: int = PART):
        self.high, self.low = high, low
        blocks = torch.arange(len(high) // ALIGN).tensor_split(-(-len(high) // chunk))
        self.sizes = [len(part) * ALIGN for part in blocks]  # all alike, so that 8-bit states are for all or for none
        buffer = torch.empty(max(self.sizes), dtype=torch.float32, device=high.device)
        self.parts = [ShardOptimizer(config, buffer[:size]) for size in self.sizes]

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, gradient: Tensor, divisor: float = 1.0) -> None:
        """Divide a gradient [n] by `divisor`, in place, and move both halves by it."""
        chunks = zip(self.parts, *(x.split(self.sizes) for x in (self.high, self.low, gradient)), strict=True)
        for part, high, low, own in chunks:
            part.shard.copy_(join(high, low))
            part.step(own, divisor)
            moved, rest = split(part.shard)
            high.copy_(moved)
            low.copy_(rest)

    def state_names(self) -> list[str]:
        return self.parts[0].state_names()

    def resident(self) -> list[Tensor]:
        return [tensor for part in self.parts for tensor in part.resident()]

    def state_tensors(self, read: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor]:
        """As those of one optimizer over the whole shard, put together on the host."""
        states = [part.state_tensors(read) for part in self.parts]
        return {
            name: one if alike(name, one) else torch.cat([state[name].cpu() for state in states])
            for name, one in states[0].items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        total, start = sum(self.sizes), 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            own = {  # copies: an optimizer goes on with the tensors it is given
                name: (x if alike(name, x) else x[start * len(x) // total : (start + size) * len(x) // total]).clone()
                for name, x in tensors.items()
            }
            part.load_state_tensors(own)
            start += size

    def snapshot(self) -> dict[str, Tensor]:
        parts = enumerate(self.parts)
        return {f"{number}.{name}": x for number, part in parts for name, x in part.snapshot().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        for number, part in enumerate(self.parts):
            prefix = f"{number}."
            part.restore({n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)})

    def scale_first_moment(self, factor: float) -> None:
        for part in self.parts:
            part.scale_first_moment(factor)


def alike(name: str, tensor: Tensor) -> bool:
    """Whether a state is the same for every element: a step count, or the values that 8 bits stand for."""
    return tensor.numel() == 1 or name.startswith("qmap")
