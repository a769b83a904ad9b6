"""Toys: an optimizer's interface on functions of a vector, and a signal for gates."""

import torch
from torch import Tensor

from fastrl.weights.buffer import BLOCK
from fastrl.weights.moves import Extrapolation, extrapolate_, interpolate_
from fastrl.weights.shard import Gradient

F64 = torch.float64
FLAT_SIGNAL = [1.0, 3.0] * 15  # mean 2, population std 1


class Descent:
    """Gradient descent on a function of one vector, as update rules see a policy. Counts its steps in `state`."""

    def __init__(self, theta: Tensor, gradient_of, lr: float = 1.0):
        self.master, self.gradient_of, self.lr = theta.clone(), gradient_of, lr
        self.seen: list[Tensor] = []  # every gradient taken
        self.state = {"step": torch.zeros(())}
        self.first_moment = torch.ones(())

    def accumulate(self) -> dict[str, float]:
        self.grad = self.gradient_of(self.master).clone()
        self.seen.append(self.grad.clone())
        return {"loss": 0.0, "entropy": 1.0}

    def gradient(self, loss: float) -> Gradient:
        return Gradient(self.grad, self.grad.norm().item(), loss)

    def apply(self, gradient: Gradient) -> dict[str, float]:
        if not gradient.shard.isfinite().all():
            return {"grad_norm": gradient.norm, "skipped": 1.0}
        self.master -= self.lr * gradient.shard
        self.state["step"] += 1
        return {"grad_norm": gradient.norm, "skipped": 0.0}

    def optimizer_step(self, loss: float) -> dict[str, float]:
        return self.apply(self.gradient(loss))

    def snapshot(self) -> Tensor:
        return self.master.clone()

    def restore(self, anchor: Tensor) -> None:
        self.master.copy_(anchor)

    def interpolate(self, anchor: Tensor, alpha: float) -> dict[str, float]:
        return interpolate_(self.master, anchor, alpha).named()

    def extrapolate(self, anchor: Tensor, law: Extrapolation, *, grads=None, u0=None) -> dict[str, float]:
        """The whole vector is one tensor of the model."""
        first = grads[0] if u0 is None else -u0 / self.lr
        limits = {}
        if law.active_threshold:
            limits["threshold"] = law.active_threshold * first.square().mean().sqrt()[None]
            limits["segment"] = torch.zeros(-(-len(anchor) // BLOCK), dtype=torch.int64)
        stats = extrapolate_(
            self.master,
            anchor,
            law.lookahead,
            law.alpha,
            grads=grads,
            u0=u0,
            lr=self.lr,
            ratio_min=law.ratio_min,
            ratio_max=law.ratio_max,
            scale_max=law.scale_max,
            **limits,
        )
        return self.checked(stats.named(), anchor, law)

    def extrapolate_by_tensor(self, anchor: Tensor, law: Extrapolation, grads) -> dict[str, float]:
        g0, g1 = grads
        ratio, scale = law.by_tensor((g0 * g1).sum(), g0.square().sum())
        n = len(anchor)
        stats = interpolate_(self.master, anchor, law.alpha * scale.item()).named()
        stats |= {"active": n, "ratio": n * ratio.item(), "scale": n * scale.item()}
        return self.checked(stats, anchor, law)

    def checked(self, stats: dict[str, float], anchor: Tensor, law: Extrapolation) -> dict[str, float]:
        refused = law.multiplier(stats) < law.min_multiplier
        if refused:
            self.restore(anchor)
        return stats | {"refused": float(refused)}

    def optimizer_snapshot(self) -> dict[str, Tensor]:
        return {name: t.clone() for name, t in self.state.items()}

    def optimizer_restore(self, state: dict[str, Tensor]) -> None:
        self.state = {name: t.clone() for name, t in state.items()}

    def scale_first_moment(self, factor: float) -> None:
        self.first_moment *= factor

    def inner_products(self, pairs) -> list[float]:
        return [(a * b).sum().item() for a, b in pairs]


def quadratic(n=20, seed=0):
    """H, b and a start; gradient H x - b, minimum H^-1 b."""
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(n, n, generator=generator, dtype=F64)
    b, theta = torch.randn(2, n, generator=generator, dtype=F64)
    return m @ m.T / n + 0.05 * torch.eye(n, dtype=F64), b, theta
