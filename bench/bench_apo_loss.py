"""Squared regression of whole completions and its gradient in the log-probabilities of their tokens.

    python bench/bench_apo_loss.py [--shape 16384x64 ...] [--out FILE.json]      tokens x completions

Bytes are counted as read and written once: 14 per token, padding included, and 16 per completion. The headline,
of_copy, is the bandwidth over that of a device copy of as many bytes in the same run. issue_ms is what the CPU takes to
queue the launches, and a CUDA graph what remains without them. Completions differ in length; rows are as wide as the
longest. The error is that of the gradient against float64, relative to its norm. Without a GPU it prints what a model
of an H100 gives, and says so.
"""

from collections.abc import Callable
from functools import partial

import torch
from timing import OURS, Captured, Provider, compiled, device_copy, distance, measure, model, run
from torch import Tensor

from fastrl.kernels.apo_loss import apo_loss

BENCH = "apo_loss"
COPY = "device copy"
BETA2 = 1e-3
GATE = (4096, 16)  # tokens, completions
ALLOWED = 1e-5


def inputs(N: int, B: int, device: str) -> dict[str, Tensor]:
    """Rows [B, longest] of N tokens; lengths from half to one and a half times the mean."""
    g = torch.Generator(device).manual_seed(0)
    random = dict(generator=g, device=device)
    lengths = (0.5 + torch.rand(B, **random)) * N / B
    lengths = (lengths * (N / lengths.sum())).round().long().clamp(min=1)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    logprobs = -torch.randn(mask.shape, **random).abs()
    return dict(
        logprobs=logprobs,
        ref_logprobs=logprobs + 0.2 * torch.randn(mask.shape, **random),
        mask=mask,
        target=(torch.rand(B, **random) < 0.5).float() - torch.rand(B, **random),
    )


def of_kernel(logprobs: Tensor, x: dict[str, Tensor], triton: bool) -> Tensor:
    rows = (logprobs, x["ref_logprobs"], x["mask"], x["target"])
    return apo_loss(*rows, BETA2, triton=triton).loss.mean()


def of_torch(logprobs: Tensor, x: dict[str, Tensor]) -> Tensor:
    """What one writes with torch alone."""
    u = ((logprobs - x["ref_logprobs"]) * x["mask"]).sum(1)
    return (BETA2 * u - x["target"]).square().mean()


def differentiated(x: dict[str, Tensor], loss: Callable[[Tensor, dict], Tensor]) -> Tensor:
    leaf = x["logprobs"].detach().requires_grad_()
    return torch.autograd.grad(loss(leaf, x), leaf)[0]


def off(x: dict[str, Tensor], found: Tensor) -> float:
    exact = {name: value.double() if value.is_floating_point() else value for name, value in x.items()}
    return distance(found, differentiated(exact, partial(of_kernel, triton=False)))


def providers(x: dict[str, Tensor]) -> dict[str, Provider]:
    on_cuda = x["target"].is_cuda
    moved = 14 * x["mask"].numel() + 16 * len(x["target"])
    calls: dict[str, Callable[[], Tensor]] = {
        OURS: partial(differentiated, x, partial(of_kernel, triton=True)),
        "torch": partial(differentiated, x, of_torch),
    }
    if on_cuda:
        calls["fastrl, CUDA graph"] = Captured(calls[OURS])
        calls["torch, CUDA graph"] = Captured(calls["torch"])
        calls["torch.compile"] = partial(differentiated, x, compiled(of_torch))
    made = {name: Provider(call, partial(off, x), ALLOWED, moved=moved) for name, call in calls.items()}
    return made | ({COPY: device_copy(moved)} if on_cuda else {})


def fresh(N: int, B: int, device: str = "cuda") -> dict[str, Provider]:
    return providers(inputs(N, B, device))


def measured(N: int, B: int) -> list[dict]:
    return measure(BENCH, partial(fresh, *GATE), partial(fresh, N, B), yardstick=COPY, warmup=20, case={"N": N, "B": B})


def modelled(N: int, B: int) -> list[dict]:
    return [model(moved=14 * N + 16 * B, N=N, B=B)]


if __name__ == "__main__":
    run(BENCH, __doc__, ["16384x64", "1000000x1024"], measured, modelled)
