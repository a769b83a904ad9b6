"""Inputs of the LM head for its benchmarks, and how others get log-probabilities of tokens from hidden states.

Each of `logprob_functions` is called as f(hidden, weight, target, entropy) -> logprobs [N], entropy [N] or None, and is
differentiable unless its name says otherwise. Rivals are taken where their package is installed.
"""

import importlib.util
from collections.abc import Callable

import torch
from timing import Provider, compiled
from torch import Tensor
from torch.nn import functional as F

from fastrl.kernels.linear_logprob import CHUNK_ROWS

SEQUENCES = 16  # completions that the rows belong to; one advantage each
GATE_ROWS = 256
# of a gradient's norm, and nats of a log-probability: what bfloat16 logits make of them, and what float32 ones do
ROUNDED, EXACT = 0.08, 0.01
ROUNDED_NATS, EXACT_NATS = 0.15, 5e-4

LogprobFunction = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


def head_inputs(N: int, H: int, V: int, device: str) -> dict[str, Tensor]:
    g = torch.Generator(device).manual_seed(0)
    random = dict(generator=g, device=device)
    hidden = torch.randn(N, H, **random).bfloat16()
    weight = (torch.randn(V, H, **random) * 2 * H**-0.5).bfloat16()
    return dict(
        hidden=hidden,
        weight=weight,
        target=torch.randint(0, V, (N,), **random),
        gradient=torch.zeros(V, H, device=device),
    )


def full_logits(hidden: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """What one writes with torch alone, all logits alive."""
    logp = (hidden @ weight.T).float().log_softmax(-1)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1) if entropy else None


def trl_full_logits(hidden, weight, target, entropy):
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    logits = hidden @ weight.T
    if entropy:
        return selective_log_softmax_and_entropy(logits, target)
    return selective_log_softmax(logits, target), None


def trl_chunked(hidden, weight, target, entropy):
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    outputs = ("entropy",) if entropy else ()
    width = min(_CHUNKED_LOGPROB_CHUNK_SIZE, len(weight))
    return ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, width, None, 1.0, outputs)[:2]


def liger_scaled_cross_entropy(hidden, weight, target, entropy):
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    found = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target, return_entropy=entropy)
    return (-found[0], found[1]) if entropy else (-found, None)


def liger_full_logits(hidden, weight, target, entropy):
    from liger_kernel.transformers.grpo_loss import fused_selective_log_softmax

    logits = F.pad(hidden, (0, 0, 0, 1)) @ weight.T  # a position more, which it leaves out
    return fused_selective_log_softmax(logits[None], target[None], temperature=1.0)[0], None


def logprob_functions(device: str, gradient: bool, entropy: bool) -> dict[str, LogprobFunction]:
    made: dict[str, LogprobFunction] = {"torch": full_logits}
    if device == "cuda":
        made["torch.compile"] = compiled(full_logits)
    if importlib.util.find_spec("trl"):
        made |= {"TRL log-softmax of full logits": trl_full_logits, "TRL chunked log-probabilities": trl_chunked}
    if importlib.util.find_spec("liger_kernel"):
        made["Liger scaled cross-entropy"] = liger_scaled_cross_entropy
        if not gradient and not entropy:
            made["Liger log-softmax of full logits (forward only)"] = liger_full_logits
    return made


def bare_products(x: dict[str, Tensor], gradient: bool) -> Provider:
    """The yardstick: one product of N H V forward, three with both gradients, of the vendor library, and no loss."""
    hidden, weight = x["hidden"], x["weight"]
    z = torch.empty(min(CHUNK_ROWS, len(hidden)), len(weight), dtype=torch.float32, device=hidden.device)
    # not the bits of z: a GPU multiplies infinities and zeros at another clock than gradients
    dz = torch.randn(z.shape, device=hidden.device).mul_(1e-6).bfloat16() if gradient else None

    def call() -> None:
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = hidden[start : start + CHUNK_ROWS]
            torch.mm(rows, weight.T, out_dtype=torch.float32, out=z[: len(rows)])
            if dz is not None:
                torch.mm(dz[: len(rows)], weight)
                torch.addmm(x["gradient"], dz[: len(rows)].T, rows, out_dtype=torch.float32, out=x["gradient"])

    return Provider(call, flop=(6 if gradient else 2) * hidden.numel() * len(weight))
