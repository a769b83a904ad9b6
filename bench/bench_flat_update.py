"""In-place interpolation and extrapolation of a flat shard: bandwidth, beside torch's foreach operations.

    python bench/bench_flat_update.py [--shape 100000000 ...] [--out FILE.json]      elements

Bytes are counted as read and written once: SFPO's interpolation 14 per parameter (two float32 in, one out, one bfloat16
out), 12 where the master is the bfloat16 weight and 16 more bits, GXPO's extrapolation 18 from displacements and 22
from gradients. The headline, of_copy, is the bandwidth over that of a device copy in the same run. Statistics come with
an update of ours and of the foreach recipe; what makes neither them nor the bfloat16 weights says so. The error against
float64 is relative to the parameter's size. Without a GPU it prints what a model of an H100 gives, and says so.
"""

import warnings
from collections.abc import Iterator
from functools import cache, partial

import torch
from timing import Provider, device_copy, measure, model, run
from torch import Tensor

from fastrl.weights import backends, library
from fastrl.weights.halves import join, split
from fastrl.weights.moves import extrapolate_, interpolate_

BENCH = "flat_update"
COPY = "device copy"
BYTES = {"interpolate": 14, "interpolate, split master": 12, "displacements": 18, "gradients": 22}
LOOKAHEAD, ALPHA, LR = 10, 0.5, 1e-6
GATE_ELEMENTS = 1 << 20
ALLOWED = 5e-7  # a few roundings of a parameter; a move is twice as large
WITHOUT_THRESHOLD = 2e-6  # a parameter that stood still in the first step is moved too far


def shards(mode: str, n: int, device: str) -> dict[str, Tensor]:
    """Weights two AdamW steps of LR from their anchor, and what the mode takes of the steps."""
    generator = torch.Generator(device).manual_seed(0)
    anchor, x0, x1 = (torch.randn(n, generator=generator, device=device) for _ in range(3))
    x1.mul_(0.5).add_(0.5).mul_(x0)
    theta = anchor - LR * x0
    u0 = theta - anchor  # as a trainer knows it: no more exact than weights are
    theta.sub_(x1, alpha=LR)
    if mode == "interpolate, split master":
        high, low = split(theta)
        return dict(anchor=anchor, theta=high, low=low)
    steps = {"interpolate": {}, "displacements": dict(u0=u0), "gradients": dict(x0=x0, x1=x1)}[mode]
    return dict(anchor=anchor, theta=theta, half=torch.empty(n, dtype=torch.bfloat16, device=device), **steps)


def update(mode: str, s: dict[str, Tensor], backend: str | None) -> dict[str, Tensor]:
    if mode.startswith("interpolate"):
        halves = dict(low=s["low"]) if "low" in s else dict(out_bf16=s["half"])
        interpolate_(s["theta"], s["anchor"], ALPHA, **halves, backend=backend)
        return s
    inputs = dict(grads=(s["x0"], s["x1"])) if mode == "gradients" else dict(u0=s["u0"])
    extrapolate_(s["theta"], s["anchor"], LOOKAHEAD, ALPHA, **inputs, lr=LR, out_bf16=s["half"], backend=backend)
    return s


def foreach(mode: str, s: dict[str, Tensor]) -> dict[str, Tensor]:
    """What one writes with torch alone: a pass for each of the move, the cast, the displacement and its norm."""
    theta, anchor, half = [s["theta"]], [s["anchor"]], [s["half"]]
    before = torch._foreach_sub(theta, anchor)
    torch._foreach_norm(before)
    if mode == "interpolate":
        torch._foreach_lerp_(theta, anchor, 1 - ALPHA)
    else:
        first, second = (s["x0"], s["x1"]) if mode == "gradients" else (s["u0"], before[0] - s["u0"])
        ratio = torch.nan_to_num(second / first, 1.0).clamp_(-2.0, 3.0)
        total = torch.ones_like(ratio)
        for _ in range(LOOKAHEAD - 1):
            total.mul_(ratio).add_(1)
        scale = torch.nan_to_num_(total.div_(ratio.add_(1)), 1.0).clamp_(1.0, LOOKAHEAD / 2 + 1)
        torch.addcmul(anchor[0], before[0], scale, value=ALPHA, out=theta[0])
    torch._foreach_copy_(half, theta)
    torch._foreach_norm(torch._foreach_sub(theta, anchor))
    return s


def move_alone(s: dict[str, Tensor]) -> dict[str, Tensor]:
    torch._foreach_lerp_([s["theta"]], [s["anchor"]], 1 - ALPHA)
    return s


def off(mode: str, rounds: bool, found: dict[str, Tensor]) -> float:
    """rounds: whether bfloat16 weights are there, which must then be the rounded ones; if not, all is wrong."""
    n, device = len(found["theta"]), found["theta"].device.type
    truth = shards(mode, n, device)
    if "low" in truth:
        truth["theta"] = join(truth["theta"], truth.pop("low"))
    truth = {name: x.double() for name, x in truth.items() if name != "half"} | {"half": None}
    update(mode, truth, "torch")
    theta = join(found["theta"], found["low"]) if "low" in found else found["theta"]
    if rounds and "half" in found and not torch.equal(found["half"], theta.bfloat16()):
        return float("inf")
    return ((theta.double() - truth["theta"]).abs() / found["anchor"].abs().clamp(min=1e-3)).max().item()


@cache
def ours_on(device: str) -> list[str]:
    """Those of ours that run on this machine."""
    if device != "cuda":
        return ["torch", "triton"]
    found = ["cuda"] if library.find() else []
    try:
        backends.try_out("nvrtc", torch.device("cuda"))
        found.append("nvrtc")
    except OSError as error:  # no compiler here; a wrong result is no such error
        warnings.warn(f"no NVRTC: {error}", stacklevel=2)
    return [*found, "triton"]


def providers(mode: str, s: dict[str, Tensor]) -> dict[str, Provider]:
    device, moved = s["theta"].device.type, BYTES[mode] * len(s["theta"])
    made = {}
    for backend in ours_on(device):
        rounds = device == "cuda" or backend == "torch"  # the interpreter of Triton truncates
        call = partial(update, mode, s, backend)
        made[f"fastrl, {backend}"] = Provider(call, partial(off, mode, rounds), ALLOWED, moved=moved)
    if mode != "interpolate, split master":
        allowed = WITHOUT_THRESHOLD if mode == "displacements" else ALLOWED
        made["foreach"] = Provider(partial(foreach, mode, s), partial(off, mode, True), allowed, moved=moved)
    if mode == "interpolate":
        call, moved_alone = partial(move_alone, s), 12 * len(s["theta"])
        made["_foreach_lerp_ (the move only)"] = Provider(call, partial(off, mode, False), ALLOWED, moved=moved_alone)
    return made | ({COPY: device_copy(moved)} if device == "cuda" else {})


def fresh(mode: str, n: int, device: str = "cuda") -> dict[str, Provider]:
    return providers(mode, shards(mode, n, device))


def measured(n: int) -> Iterator[dict]:
    for mode in BYTES:
        small, large = (partial(fresh, mode, size) for size in (GATE_ELEMENTS, n))
        case = {"mode": mode, "elements": n}
        yield from measure(BENCH, small, large, yardstick=COPY, warmup=5, case=case)


def modelled(n: int) -> list[dict]:
    return [model(moved=moved * n, mode=mode, elements=n) for mode, moved in BYTES.items()]


if __name__ == "__main__":
    run(BENCH, __doc__, ["100000000", "1500000000"], measured, modelled)
