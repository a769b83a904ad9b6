"""AdamW on a master in two halves of 16 bits: bandwidth, beside torch's fused AdamW on a float32 master.

    python bench/bench_split_adamw.py [--shape 100000000 ...] [--out FILE.json]      elements

Bytes are counted as read and written once: halves 8, moments 16, the gradient 4, and 4 more where it is clipped and
written back. A float32 master has bfloat16 weights beside it, written in a pass of their own: 8 for the master, and 6
for the copy. The headline, of_copy, is the bandwidth over that of a device copy in the same run. The error against
float64 is relative to the learning rate, which is the size of a step. Without a GPU it prints what a model of an H100
gives, and says so.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from timing import Provider, device_copy, measure, model, run
from torch import Tensor

from fastrl.kernels.split_adamw import split_adamw_
from fastrl.weights.halves import join, split
from fastrl.weights.halves_adamw import Factors, adamw_halves_ref_
from fastrl.weights.optim import OptimConfig, ShardOptimizer

BENCH = "split_adamw"
COPY = "device copy"
MODES = {"plain": (28, 1.0), "clipped": (32, 2.0)}  # bytes per element; what the gradient is divided by
WHOLE_MORE = 6  # bytes of a float32 master's weights
FACTORS = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
GATE_ELEMENTS = 1 << 20
ALLOWED = 1e-4  # a few roundings of a weight, which is some hundred times as large as a step


def drawn(n: int, device: str) -> tuple[Tensor, Tensor]:
    """Weights and a gradient, float32 [n]."""
    generator = torch.Generator(device).manual_seed(0)
    theta, gradient = (torch.randn(n, generator=generator, device=device) for _ in range(2))
    return theta, gradient


def off(mode: str, moved: Tensor) -> float:
    """From the first step of AdamW in float64."""
    theta, gradient = (x.double() for x in drawn(len(moved), moved.device.type))
    gradient /= MODES[mode][1]
    lr, decay = FACTORS["lr"], FACTORS["weight_decay"]
    truth = theta * (1 - lr * decay) - lr * gradient / (gradient.abs() + FACTORS["eps"])
    return ((moved.double() - truth).abs().max() / lr).item()


def fresh(mode: str, n: int, device: str = "cuda") -> dict[str, Provider]:
    moved, divisor = MODES[mode]
    theta, gradient = drawn(n, device)
    (high, low), (first, second) = split(theta), (torch.zeros_like(theta) for _ in range(2))
    factors = Factors(divisor=divisor, **FACTORS)

    def halves(step: Callable[..., None]) -> tuple[Tensor, Tensor]:
        step(high, low, gradient, first, second, 1, **factors)
        return high, low

    whole, weights = ShardOptimizer(OptimConfig(**FACTORS), theta.clone()), torch.empty_like(high)

    def with_copy() -> Tensor:
        whole.step(gradient, divisor)
        weights.copy_(whole.shard)
        return whole.shard

    def of_halves(found: tuple[Tensor, Tensor]) -> float:
        return off(mode, join(*found))

    return {
        "fastrl, triton": Provider(partial(halves, split_adamw_), of_halves, ALLOWED, moved=moved * n),
        "fastrl, torch": Provider(partial(halves, adamw_halves_ref_), of_halves, ALLOWED, moved=moved * n),
        "float32 master, torch": Provider(with_copy, partial(off, mode), ALLOWED, moved=(moved + WHOLE_MORE) * n),
    } | ({COPY: device_copy(moved * n)} if device == "cuda" else {})


def measured(n: int) -> Iterator[dict]:
    for mode in MODES:
        small, large = (partial(fresh, mode, size) for size in (GATE_ELEMENTS, n))
        yield from measure(BENCH, small, large, yardstick=COPY, warmup=5, case={"mode": mode, "elements": n})


def modelled(n: int) -> list[dict]:
    return [model(moved=moved * n, mode=mode, elements=n) for mode, (moved, _) in MODES.items()]


if __name__ == "__main__":
    run(BENCH, __doc__, ["100000000", "1500000000"], measured, modelled)
