"""AdamW over a flat shard, by libraries: torch (fused) or bitsandbytes (8-bit, paged). Learning-rate schedules."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastrl.base.setting import check_bounds, setting

EIGHT_BIT_LEAST = 4096  # elements
GRAD_SCALE = "grad_scale"  # attribute of a fused optimizer: what it divides by, as torch.amp.GradScaler sets it


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """lr is reached after `warmup` steps; then it stays, or falls to zero at the last step."""

    # 8 bits: of the moments; paged: moved to the host when memory is short
    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    # learning rate
    lr: float = setting(1e-6, "(0, 1)", known_as="learning_rate", hint="1e-6 is usual, 1e-4 for tiny models")
    betas: tuple[float, float] = setting((0.9, 0.999), "[0, 1)")  # decay of the first and the second moment
    eps: float = setting(1e-8, "[0, 1]")  # added to the root of the second moment
    weight_decay: float = setting(0.01, "[0, 100]")  # decoupled, on every parameter
    max_grad_norm: float = setting(1.0, "[0, 1e9]")  # global norm the gradient is clipped to; 0 = no clipping
    warmup: int = setting(0, "[0, 1e9]")  # steps of linear warm-up
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up: constant, or falling to zero

    def __post_init__(self):
        check_bounds(self, "optim.")

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step 0, 1, ... of `total`."""
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, total - self.warmup)
        decay = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return self.lr * decay[self.lr_schedule]


def make_optimizer(config: OptimConfig, shard: Tensor) -> torch.optim.Optimizer:
    """An optimizer over one flat float32 (float64 in tests) shard.

    Raises ValueError when bitsandbytes is missing, or would not keep 8 bits, which must not depend on the ranks.
    """
    lr, betas, eps, decay = config.lr, config.betas, config.eps, config.weight_decay
    if config.name == "adamw":
        # the step count lives on the device with fused, and with it one kernel updates the whole shard
        return torch.optim.AdamW([shard], lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=True)
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError(
            f"--optim.name {config.name} needs bitsandbytes, which is not installed. "
            "Run `pip install bitsandbytes`, or use --optim.name adamw"
        ) from None
    if len(shard) < EIGHT_BIT_LEAST:
        raise ValueError(
            f"--optim.name {config.name}: a rank's shard has {len(shard)} elements, and bitsandbytes keeps the state "
            f"of fewer than {EIGHT_BIT_LEAST} in float32; use --optim.name adamw, or fewer ranks"
        )
    cls = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}
    return cls[config.name]([shard], lr=lr, betas=betas, eps=eps, weight_decay=decay)


class ShardOptimizer:
    """A library's optimizer over one flat shard, and what a trainer does with its state."""

    def __init__(self, config: OptimConfig, shard: Tensor):
        self.shard, self.optimizer = shard, make_optimizer(config, shard)

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    @property
    def state(self) -> dict:
        return self.optimizer.state

    def step(self, gradient: Tensor, divisor: float = 1.0) -> None:
        """Divide a gradient of the shard's length by `divisor`, in place, and move the shard by it.

        Fused AdamW does both in one pass: it writes the gradient that it has divided back. Of another dtype than the
        shard's, or with another optimizer, the division is a pass of its own.
        """
        fused = isinstance(self.optimizer, torch.optim.AdamW) and gradient.dtype == self.shard.dtype == torch.float32
        if divisor != 1 and not fused:
            gradient.mul_(1 / divisor)
        scale = torch.full((), divisor, device=gradient.device) if divisor != 1 and fused else None
        setattr(self.optimizer, GRAD_SCALE, scale)
        self.shard.grad = gradient.to(self.shard.dtype)
        self.optimizer.step()
        self.shard.grad = None

    def state_names(self) -> list[str]:
        return list(state_tensors(self.optimizer))

    def resident(self) -> list[Tensor]:
        """The tensors of the state as they lie on the device."""
        return list(state_tensors(self.optimizer).values())

    def state_tensors(self, read: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor]:
        """The state by name; read: gives the values of a tensor that may be elsewhere."""
        return {name: read(tensor) for name, tensor in state_tensors(self.optimizer).items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        load_state_tensors(self.optimizer, tensors)

    def snapshot(self) -> dict[str, Tensor]:
        return snapshot(self.optimizer)

    def restore(self, state: dict[str, Tensor]) -> None:
        restore(self.optimizer, state)

    def scale_first_moment(self, factor: float) -> None:
        scale_first_moment(self.optimizer, factor)


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state over its one shard, as named tensors; scalars become one-element tensors."""
    state = optimizer.state.get(optimizer.param_groups[0]["params"][0], {})
    return {
        name: value.detach() if isinstance(value, Tensor) else torch.tensor([value])
        for name, value in state.items()
        if value is not None
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `state_tensors` returned."""
    plain = {name: t.item() if name == "step" and t.dtype == torch.int64 else own(t) for name, t in tensors.items()}
    state = optimizer.state_dict()
    state["state"] = {0: plain} if plain else {}
    optimizer.load_state_dict(state)


def own(tensor: Tensor) -> Tensor:
    """A tensor that may go on as an optimizer's: the memory of one that was read from a file may be the file's."""
    return tensor if tensor.untyped_storage().resizable() else tensor.clone()


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A copy of the state over the one shard."""
    return {name: tensor.clone() for name, tensor in state_tensors(optimizer).items()}


@torch.no_grad()
def restore(optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Put a `snapshot` back in place; one from before the first step makes the state empty again."""
    held = optimizer.state[optimizer.param_groups[0]["params"][0]]
    if not state:
        held.clear()
    for name, kept in state.items():
        if isinstance(held[name], Tensor):
            held[name].copy_(kept)
        else:
            held[name] = kept.item()


@torch.no_grad()
def scale_first_moment(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply the running mean of the gradients: exp_avg of torch, state1 of bitsandbytes (its scales if 8-bit)."""
    state = state_tensors(optimizer)
    name = next(n for n in ("exp_avg", "absmax1", "state1") if n in state)
    state[name].mul_(factor)
