"""Log-probabilities of tokens from hidden states, alone and with both gradients: each way to get them.

    python bench/bench_linear_logprob.py [--shape 16384x1536x151936 ...] [--out FILE.json]      N x H x V

Useful work is 2 N H V forward and 6 N H V with gradients, whatever a provider spends. The headline, of_bare, is the
time over that of the bare products of the vendor library in the same run. The error against float64 is in nats forward,
and of the gradients' norm otherwise. Without a GPU it prints what a model of an H100 gives, and says so.
"""

from collections.abc import Iterator
from functools import partial

import torch
from heads import EXACT, EXACT_NATS, GATE_ROWS, ROUNDED, ROUNDED_NATS, bare_products, head_inputs, logprob_functions
from timing import OURS, Provider, distance, measure, model, run
from torch import Tensor
from torch.nn import functional as F

from fastrl.kernels.linear_logprob import TritonChunks, linear_logprob, linear_logprob_ref

BENCH = "linear_logprob"
# mode -> gradient, entropy
MODES = {"forward": (False, False), "gradient": (True, False), "gradient, entropy": (True, True)}
BARE = "bare products"


def inputs(N: int, H: int, V: int, device: str) -> dict[str, Tensor]:
    x = head_inputs(N, H, V, device)
    g = torch.Generator(device).manual_seed(1)
    x["dlogprobs"], x["dentropy"] = torch.randn(2, N, generator=g, device=device) / N
    return x


def streamed(x: dict[str, Tensor], hidden, weight, target, entropy):
    into = x["gradient"] if torch.is_grad_enabled() else None
    return linear_logprob(hidden, weight, target, need_entropy=entropy, weight_grad=into, triton=True)[:2]


def in_row_chunks(hidden, weight, target, entropy):
    logprobs, lse = torch.empty(2, len(hidden), dtype=torch.float32, device=hidden.device)
    chunks = TritonChunks(hidden, weight)
    for rows in chunks:
        chunks.forward(chunks.logits(rows), target[rows], 1.0, logprobs[rows], lse[rows], None)
    return logprobs, None


def forward(x: dict[str, Tensor], function) -> Tensor:
    with torch.no_grad():
        return function(x["hidden"], x["weight"], x["target"], False)[0]


def gradients(x: dict[str, Tensor], function, entropy: bool, into_buffer: bool) -> tuple[Tensor, Tensor]:
    hidden, weight = x["hidden"].detach().requires_grad_(), x["weight"].detach().requires_grad_(not into_buffer)
    found = function(hidden, weight, x["target"], entropy)
    torch.autograd.backward(found[: 1 + entropy], (x["dlogprobs"], x["dentropy"])[: 1 + entropy])
    return hidden.grad, x["gradient"] if into_buffer else weight.grad


def mean_cross_entropy(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    hidden, weight = x["hidden"].detach().requires_grad_(), x["weight"].detach().requires_grad_()
    F.linear_cross_entropy(hidden, weight, x["target"], options=torch.nn.LinearCrossEntropyOptions()).backward()
    return hidden.grad, weight.grad


def nats_off(x: dict[str, Tensor], found: Tensor) -> float:
    truth = linear_logprob_ref(x["hidden"].double(), x["weight"].double(), x["target"])[0]
    return (found.double() - truth).abs().max().item()


def gradients_off(x: dict[str, Tensor], dlogprobs: Tensor, dentropy: Tensor | None, found) -> float:
    """The larger of the distances in hidden and in weight."""
    hidden, weight = (x[name].double().requires_grad_() for name in ("hidden", "weight"))
    logprobs, entropy, _ = linear_logprob_ref(hidden, weight, x["target"], need_entropy=dentropy is not None)
    outputs, upstream = (logprobs, entropy), (dlogprobs, dentropy)
    used = 1 if dentropy is None else 2
    torch.autograd.backward(outputs[:used], [d.double() for d in upstream[:used]])
    return max(distance(ours, truth.grad) for ours, truth in zip(found, (hidden, weight), strict=True))


def providers(x: dict[str, Tensor], mode: str) -> dict[str, Provider]:
    gradient, entropy = MODES[mode]
    device = x["hidden"].device.type
    functions = {OURS: partial(streamed, x)} | logprob_functions(device, gradient, entropy)
    if not gradient:
        functions["fastrl, chunks of rows"] = in_row_chunks
    flop = (6 if gradient else 2) * x["hidden"].numel() * len(x["weight"])
    off = partial(gradients_off, x, x["dlogprobs"], x["dentropy"] if entropy else None) if gradient else None
    made = {}
    for name, function in functions.items():
        ours = name.startswith(OURS)
        if gradient:
            call = partial(gradients, x, function, entropy, into_buffer=ours)
            made[name] = Provider(call, off, EXACT if ours else ROUNDED, flop)
        else:
            allowed = EXACT_NATS if ours else ROUNDED_NATS
            made[name] = Provider(partial(forward, x, function), partial(nats_off, x), allowed, flop)
    if mode == "gradient" and hasattr(F, "linear_cross_entropy"):
        off = partial(gradients_off, x, torch.full_like(x["dlogprobs"], -1 / len(x["target"])), None)
        made["F.linear_cross_entropy (mean only)"] = Provider(partial(mean_cross_entropy, x), off, ROUNDED, flop)
    return made | ({BARE: bare_products(x, gradient)} if device == "cuda" else {})


def fresh(mode: str, N: int, H: int, V: int, device: str = "cuda") -> dict[str, Provider]:
    return providers(inputs(N, H, V, device), mode)


def measured(N: int, H: int, V: int) -> Iterator[dict]:
    for mode in MODES:
        small, large = (partial(fresh, mode, rows_of, H, V) for rows_of in (GATE_ROWS, N))
        yield from measure(BENCH, small, large, yardstick=BARE, case={"N": N, "H": H, "V": V, "mode": mode})


def modelled(N: int, H: int, V: int) -> list[dict]:
    """Forward reads each float32 logit once; the backward makes it again, reads it twice and writes a bfloat16."""
    work = {"forward": (2, 4, 2), "gradient": (8, 14, 6), "gradient, entropy": (8, 14, 6)}
    rows = []
    for mode, (products, moved, useful) in work.items():
        row = model(products * N * H * V, moved * N * V, N=N, H=H, V=V, mode=mode)
        rows.append(row | {"of_bare": row["ms"] / (row["products_ms"] * useful / products)})
    return rows


if __name__ == "__main__":
    run(BENCH, __doc__, ["16384x1536x151936", "8192x3584x152064"], measured, modelled)
