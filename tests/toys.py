"""Toys with the interfaces of the program's parts."""

from types import SimpleNamespace

import torch
from torch import Tensor

from fastrl.weights.shard import Gradient


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
