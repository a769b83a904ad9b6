"""Toys: an optimizer's interface on functions of a vector, and a signal for gates."""

from types import SimpleNamespace

import torch
from torch import Tensor

from fastrl.weights.shard import Gradient

F64 = torch.float64
FLAT_SIGNAL = [1.0, 3.0] * 15  # mean 2, population std 1


class Descent:
    """Gradient descent on a function of one vector, as update rules see a policy. Counts its steps in `state`."""

    def __init__(self, theta: Tensor, gradient_of, lr: float = 1.0):
        self.master, self.gradient_of, self.lr = theta.clone(), gradient_of, lr
        self.optim = SimpleNamespace(weight_decay=0.0)
        self.seen: list[Tensor] = []  # every gradient taken
        self.state = {"step": torch.zeros(())}
        self.first_moment = torch.ones(())

    def accumulate(self) -> dict[str, float]:
        self.grad = self.gradient_of(self.master).clone()
        self.seen.append(self.grad.clone())
        return {"loss": 0.0, "entropy": 1.0}

    def gradient(self) -> Gradient:
        return Gradient(self.grad, self.grad.norm().item())

    def apply(self, gradient: Gradient) -> dict[str, float]:
        if not gradient.shard.isfinite().all():
            return {"grad_norm": gradient.norm, "skipped": 1.0}
        self.master -= self.lr * gradient.shard
        self.state["step"] += 1
        return {"grad_norm": gradient.norm, "skipped": 0.0}

    def optimizer_step(self) -> dict[str, float]:
        return self.apply(self.gradient())

    weights_bf16 = low = None

    def values(self) -> Tensor:
        return self.master.clone()

    def assign(self, values: Tensor) -> None:
        self.master.copy_(values)

    def publish(self, written: bool = False) -> None:
        pass

    def optimizer_snapshot(self) -> dict[str, Tensor]:
        return {name: t.clone() for name, t in self.state.items()}

    def optimizer_restore(self, state: dict[str, Tensor]) -> None:
        self.state = {name: t.clone() for name, t in state.items()}

    def scale_first_moment(self, factor: float) -> None:
        self.first_moment *= factor

    def all_sum(self, values: Tensor) -> Tensor:
        return values

    def tensor_slices(self) -> list[slice]:
        return [slice(0, len(self.master))]

    def tensor_rms(self, values) -> Tensor:
        return torch.stack([values(part).square().mean().sqrt() for part in self.tensor_slices()])


def quadratic(n=20, seed=0):
    """H, b and a start; gradient H x - b, minimum H^-1 b."""
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(n, n, generator=generator, dtype=F64)
    b, theta = torch.randn(2, n, generator=generator, dtype=F64)
    return m @ m.T / n + 0.05 * torch.eye(n, dtype=F64), b, theta
