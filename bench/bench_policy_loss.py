"""Clipped surrogate of tokens and its gradient in their log-probabilities: one launch against many.

    python bench/bench_policy_loss.py [--shape 16384 ...] [--out FILE.json]      tokens

Bytes are counted as read and written once: 20 per token, 24 with a reference. The headline, of_copy, is the bandwidth
over that of a device copy of as many bytes in the same run. A batch is so small that launches take longer than bytes:
issue_ms is what the CPU takes to queue them, and a CUDA graph what remains without. The error is that of the gradient
against float64, relative to its norm. Without a GPU it prints what a model of an H100 gives, and says so.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
from timing import OURS, Captured, Provider, compiled, device_copy, distance, measure, model, run
from torch import Tensor

from fastrl.kernels.policy_loss import TokenLoss, policy_loss, policy_loss_ref

BENCH = "policy_loss"
COPY = "device copy"
BYTES = {"clip": 20, "clip, kl": 24}
EPSILON, DUAL_CLIP, KL_COEF = (0.2, 0.28), 3.0, 0.04
GATE_TOKENS = 4096
ALLOWED = 1e-5


def inputs(N: int, mode: str, device: str) -> dict[str, Tensor]:
    g = torch.Generator(device).manual_seed(0)
    noise = torch.randn(4, N, generator=g, device=device)
    logprobs = -noise[0].abs()
    old_logprobs = logprobs + 0.3 * noise[1] * noise[1].abs()  # some ratios are beyond the dual clip, too
    x = dict(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantage=noise[2].clone(),
        w=torch.full((N,), 1 / N, device=device),
    )
    return x | ({"ref_logprobs": logprobs + 0.2 * noise[3]} if "kl" in mode else {})


def token_loss(x: dict[str, Tensor]) -> TokenLoss:
    (low, high), kl = EPSILON, KL_COEF if "ref_logprobs" in x else 0.0
    return TokenLoss(clip_low=low, clip_high=high, dual_clip=DUAL_CLIP, kl=kl)


def coefficients(x: dict[str, Tensor], function: Callable) -> Tensor:
    return function(token_loss(x), **x).coef


def torch_loss(logprobs: Tensor, x: dict[str, Tensor]) -> Tensor:
    """What one writes with torch alone."""
    ratio = (logprobs - x["old_logprobs"]).clamp(-20, 20).exp()
    low, high = EPSILON
    loss = torch.maximum(-x["advantage"] * ratio, -x["advantage"] * ratio.clamp(1 - low, 1 + high))
    loss = torch.where(x["advantage"] < 0, torch.minimum(loss, -DUAL_CLIP * x["advantage"]), loss)
    if "ref_logprobs" in x:
        d = (x["ref_logprobs"] - logprobs).clamp(-20, 20)
        loss = loss + KL_COEF * (torch.expm1(d) - d)
    return (x["w"] * loss).sum()


def liger_loss(logprobs: Tensor, x: dict[str, Tensor]) -> Tensor:
    """Each token as a completion of its own, so that each has its advantage."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    column = {name: value[:, None] for name, value in x.items()}
    mask = torch.ones_like(column["w"])
    return LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logprobs[:, None],
        mask,
        x["advantage"],
        mask,
        ref_per_token_logps=column.get("ref_logprobs"),
        old_per_token_logps=column["old_logprobs"],
        epsilon_low=EPSILON[0],
        epsilon_high=EPSILON[1],
        beta=KL_COEF if "ref_logprobs" in x else 0.0,
        delta=DUAL_CLIP,
    )[0]


def differentiated(x: dict[str, Tensor], loss: Callable[[Tensor, dict], Tensor]) -> Tensor:
    leaf = x["logprobs"].detach().requires_grad_()
    return torch.autograd.grad(loss(leaf, {name: value for name, value in x.items() if name != "logprobs"}), leaf)[0]


def off(x: dict[str, Tensor], found: Tensor) -> float:
    return distance(found, coefficients({name: value.double() for name, value in x.items()}, policy_loss_ref))


def providers(x: dict[str, Tensor]) -> dict[str, Provider]:
    on_cuda, moved = x["w"].is_cuda, BYTES["clip, kl" if "ref_logprobs" in x else "clip"] * len(x["w"])
    kernel, eager = partial(policy_loss, triton=True), partial(differentiated, x, torch_loss)
    calls: dict[str, Callable[[], Tensor]] = {OURS: partial(coefficients, x, kernel), "torch": eager}
    if importlib.util.find_spec("liger_kernel"):
        calls["Liger loss of tokens"] = partial(differentiated, x, liger_loss)
    if on_cuda:
        calls |= {"fastrl, CUDA graph": Captured(calls[OURS]), "torch, CUDA graph": Captured(eager)}
        calls["torch.compile"] = partial(differentiated, x, compiled(torch_loss))
        if importlib.util.find_spec("liger_kernel"):
            calls["Liger loss of tokens, compiled"] = partial(differentiated, x, compiled(liger_loss))
    made = {name: Provider(call, partial(off, x), ALLOWED, moved=moved) for name, call in calls.items()}
    return made | ({COPY: device_copy(moved)} if on_cuda else {})


def fresh(N: int, mode: str, device: str = "cuda") -> dict[str, Provider]:
    return providers(inputs(N, mode, device))


def measured(N: int) -> Iterator[dict]:
    for mode in BYTES:
        small, large = (partial(fresh, tokens, mode) for tokens in (GATE_TOKENS, N))
        yield from measure(BENCH, small, large, yardstick=COPY, warmup=20, case={"N": N, "mode": mode})


def modelled(N: int) -> list[dict]:
    return [model(moved=moved * N, N=N, mode=mode) for mode, moved in BYTES.items()]


if __name__ == "__main__":
    run(BENCH, __doc__, ["16384", "1000000"], measured, modelled)
