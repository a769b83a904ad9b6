"""AdamW over a shard that is kept as bfloat16 weights and the 16 bits that they lack: on a GPU one launch.

The definition joins a chunk, takes torch's fused AdamW to it and splits it again. It is what runs without a GPU, and
where Triton is missing or its kernel does not come out right.
"""

import importlib.util
import warnings
from functools import cache
from typing import TypedDict, Unpack

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fastrl.weights.buffer import PART
from fastrl.weights.halves import join, split
from fastrl.weights.optim import OptimConfig, ShardOptimizer, own


class Factors(TypedDict):
    """Of one step."""

    divisor: float  # of the gradient, in place
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class HalvesAdamW(ShardOptimizer):
    """As `ShardOptimizer` with --optim.name adamw, of high [n] bfloat16 and low [n] int16; states float32 [n].

    The number of steps is on the host, so that factors can be calculated there without a wait.
    """

    def __init__(self, config: OptimConfig, high: Tensor, low: Tensor):
        self.shard, self.low = high, low
        # holds settings and states; its step, which would round to bfloat16, is not called
        self.optimizer = torch.optim.AdamW(
            [high], lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )

    @torch.no_grad()
    def step(self, gradient: Tensor, divisor: float = 1.0) -> None:
        """Divide a gradient [n] by `divisor`, in place, and move both halves by it."""
        held, (group,) = self.optimizer.state[self.shard], self.optimizer.param_groups
        if not held:
            held["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_avg_sq"):
                held[name] = torch.zeros_like(self.shard, dtype=torch.float32)
        if divisor != 1 and gradient.dtype != torch.float32:
            gradient.mul_(1 / divisor)
            divisor = 1.0
        held["step"] += 1
        factors = Factors(divisor=divisor, **{n: group[n] for n in ("lr", "betas", "eps", "weight_decay")})
        adamw_halves_(
            self.shard, self.low, gradient, held["exp_avg"], held["exp_avg_sq"], int(held["step"].item()), **factors
        )

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.optimizer.state[self.shard] = {
            name: own(tensor).to("cpu" if name == "step" else self.shard.device) for name, tensor in tensors.items()
        }


def adamw_halves_(
    high: Tensor, low: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, **factors: Unpack[Factors]
) -> None:
    """Step number `step` (from 1 on), in place: halves, moments float32 [n], and the gradient by the divisor."""
    if not kernel_on(high.device):
        adamw_halves_ref_(high, low, gradient, first, second, step, **factors)
        return
    from fastrl.kernels.split_adamw import split_adamw_

    # autograd does not see a kernel write
    torch.autograd.graph.increment_version([high, low, gradient, first, second])
    split_adamw_(high, low, gradient, first, second, step, **factors)


def adamw_halves_ref_(
    high: Tensor, low: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, **factors: Unpack[Factors]
) -> None:
    """The definition, a chunk at a time."""
    divisor, (beta_1, beta_2) = factors["divisor"], factors["betas"]
    scale = torch.full((), divisor, device=high.device) if divisor != 1 else None
    chunks = zip(*(x.split(PART) for x in (high, low, gradient, first, second)), strict=True)
    for upper, lower, grad, mean, square in chunks:
        theta = join(upper, lower)
        adamw(
            [theta],
            [grad.float()],
            [mean],
            [square],
            [],
            [torch.full((), step - 1.0, device=high.device)],
            fused=True,
            grad_scale=scale,
            amsgrad=False,
            maximize=False,
            beta1=beta_1,
            beta2=beta_2,
            lr=factors["lr"],
            weight_decay=factors["weight_decay"],
            eps=factors["eps"],
        )
        for half, moved in zip((upper, lower), split(theta), strict=True):
            half.copy_(moved)


@cache
def kernel_on(device: torch.device) -> bool:
    """Whether Triton's kernel steps on this device; the first call tries it out, and a failure is a warning."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        try_out(device)
    except Exception as error:  # whatever a compiler or a driver finds to object to
        warnings.warn(f"AdamW on a split master runs in torch, slower, for its kernel failed: {error}", stacklevel=2)
        return False
    return True


def try_out(device: torch.device) -> None:
    """Raise unless a first step comes out right: lr times the gradient's sign, whatever the gradient."""
    from fastrl.kernels.split_adamw import split_adamw_

    n = 2 * 1024 + 5
    theta = torch.arange(n, device=device).remainder(512).float() + 1
    gradient = torch.arange(n, device=device).remainder(3).float() - 1  # -1, 0, 1
    high, low = split(theta)
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    factors = Factors(divisor=2.0, lr=0.25, betas=(0.5, 0.75), eps=1e-8, weight_decay=0.0)
    split_adamw_(high, low, gradient.mul_(4), first, second, 1, **factors)
    moved = join(high, low)
    wrong = ((moved - theta + gradient / 8).abs() > 1e-4).sum() + (first != gradient / 2).sum()
    if wrong or not torch.equal(second, gradient.square() / 4):
        raise RuntimeError(f"{int(wrong)} of {n} elements came out wrong")
