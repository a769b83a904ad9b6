"""Squared regression of whole completions and its gradient in the log-probabilities of their tokens.

    python bench/bench_apo_loss.py [--shape 16384x64 ...] [--out FILE.json]      tokens x completions

Bytes are counted as read and written once: 12 per token and 24 per completion. The headline, of_copy, is the bandwidth
over that of a device copy of as many bytes in the same run. issue_ms is what the CPU takes to queue the launches, and a
CUDA graph what remains without them. Completions differ in length; padded rows are as wide as the longest. The error is
that of the gradient against float64, relative to its norm. Without a GPU it prints what a model of an H100 gives, and
says so.
"""

from collections.abc import Callable
from functools import partial

import torch
from timing import OURS, Captured, Provider, compiled, device_copy, distance, measure, model, run
from torch import Tensor

from fastrl.kernels.apo_loss import apo_loss, apo_loss_ref

BENCH = "apo_loss"
COPY = "device copy"
BETA2 = 1e-3
GATE = (4096, 16)  # tokens, completions
ALLOWED = 1e-5


def inputs(N: int, B: int, device: str) -> dict[str, Tensor]:
    """Lengths from half to one and a half times the mean."""
    g = torch.Generator(device).manual_seed(0)
    random = dict(generator=g, device=device)
    lengths = (0.5 + torch.rand(B, **random)) * N / B
    ends = (lengths.cumsum(0) * (N / lengths.sum())).round().int()
    ends[-1] = N
    cu_seqlens = torch.cat([ends.new_zeros(1), ends])
    logprobs = -torch.randn(N, **random).abs()
    completion = torch.arange(B, device=device).repeat_interleave(cu_seqlens.diff())
    position = torch.arange(N, device=device) - cu_seqlens[completion]
    return dict(
        logprobs=logprobs,
        ref_logprobs=logprobs + 0.2 * torch.randn(N, **random),
        cu_seqlens=cu_seqlens,
        optimal_value=torch.rand(B, **random),
        reward=(torch.rand(B, **random) < 0.5).float(),
        w_seq=torch.full((B,), 1 / B, device=device),
        completion=completion,
        position=position.long(),
    )


def coefficients(x: dict[str, Tensor], function: Callable) -> Tensor:
    order = ("logprobs", "ref_logprobs", "cu_seqlens", "optimal_value", "reward", "w_seq")
    return function(*(x[name] for name in order), BETA2).coef


def regression(u: Tensor, x: dict[str, Tensor]) -> Tensor:
    return (x["w_seq"] * (BETA2 * u + x["optimal_value"] - x["reward"]).square()).sum()


def of_segments(logprobs: Tensor, ref_logprobs: Tensor, x: dict[str, Tensor]) -> Tensor:
    u = torch.zeros_like(x["reward"]).index_add(0, x["completion"], logprobs - ref_logprobs)
    return regression(u, x)


def of_padded(logprobs: Tensor, ref_logprobs: Tensor, x: dict[str, Tensor]) -> Tensor:
    return regression(((logprobs - ref_logprobs) * x["mask"]).sum(1), x)


def differentiated(x: dict[str, Tensor], loss: Callable[[Tensor, Tensor, dict], Tensor]) -> Tensor:
    leaf = x["logprobs"].detach().requires_grad_()
    return torch.autograd.grad(loss(leaf, x["ref_logprobs"], x), leaf)[0]


def padded(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows [B, longest] and their mask, as a trainer of padded batches has them."""
    mask = x["reward"].new_zeros(len(x["reward"]), int(x["cu_seqlens"].diff().max()))
    at = (x["completion"], x["position"])
    rows = {name: torch.zeros_like(mask).index_put(at, x[name]) for name in ("logprobs", "ref_logprobs")}
    return x | rows | {"mask": mask.index_put(at, torch.ones_like(x["logprobs"]))}


def off(x: dict[str, Tensor], found: Tensor) -> float:
    exact = {name: value.double() if value.is_floating_point() else value for name, value in x.items()}
    truth = coefficients(exact, apo_loss_ref)
    return distance(found[x["completion"], x["position"]] if found.ndim == 2 else found, truth)


def providers(x: dict[str, Tensor]) -> dict[str, Provider]:
    on_cuda = x["reward"].is_cuda
    moved = 12 * len(x["logprobs"]) + 24 * len(x["reward"])
    wide = padded(x)
    calls: dict[str, Callable[[], Tensor]] = {
        OURS: partial(coefficients, x, partial(apo_loss, triton=True)),
        "torch": partial(differentiated, x, of_segments),
        "torch, padded rows": partial(differentiated, wide, of_padded),
    }
    if on_cuda:
        calls["fastrl, CUDA graph"] = Captured(calls[OURS])
        calls["torch, padded rows, CUDA graph"] = Captured(calls["torch, padded rows"])
        calls["torch.compile"] = partial(differentiated, x, compiled(of_segments))
        calls["torch.compile, padded rows"] = partial(differentiated, wide, compiled(of_padded))
    made = {name: Provider(call, partial(off, x), ALLOWED, moved=moved) for name, call in calls.items()}
    return made | ({COPY: device_copy(moved)} if on_cuda else {})


def fresh(N: int, B: int, device: str = "cuda") -> dict[str, Provider]:
    return providers(inputs(N, B, device))


def measured(N: int, B: int) -> list[dict]:
    return measure(BENCH, partial(fresh, *GATE), partial(fresh, N, B), yardstick=COPY, warmup=20, case={"N": N, "B": B})


def modelled(N: int, B: int) -> list[dict]:
    return [model(moved=12 * N + 24 * B, N=N, B=B)]


if __name__ == "__main__":
    run(BENCH, __doc__, ["16384x64", "1000000x1024"], measured, modelled)
