"""Log-probabilities and entropies of tokens from logits that exist, and the gradient over them: each way to get them.

    python bench/bench_selective_logprob.py [--shape 16384x151936 ...] [--out FILE.json]      N x V

Bytes are counted as a logit read once forward, and read and written once backward. The headline, of_copy, is the
bandwidth over that of a device copy in the same run. A provider without entropy or gradient says so. The error against
float64 is in nats forward, and of the gradient's norm otherwise. Without a GPU it prints what a model of an H100 gives,
and says so.
"""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from timing import OURS, Provider, compiled, device_copy, distance, measure, model, run
from torch import Tensor

from fastrl.kernels.selective_logprob import selective_logprob, selective_logprob_ref

BENCH = "selective_logprob"
COPY = "device copy"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PASSES = {"forward": 1, "gradient": 3}  # times that a logit is moved
GATE_ROWS = 64
NATS = {torch.bfloat16: 0.3, torch.float32: 1e-4}  # a rival may give its log-probabilities in the dtype of logits
FRACTION = {torch.bfloat16: 0.02, torch.float32: 1e-4}  # of the gradient's norm, which has that dtype

Function = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # logits, ids -> logprobs, and maybe entropy as the last


def inputs(N: int, V: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    g = torch.Generator(device).manual_seed(0)
    random = dict(generator=g, device=device)
    logits = torch.empty(N, V, dtype=dtype, device=device).normal_(0, 2, generator=g)
    return dict(logits=logits, ids=torch.randint(0, V, (N,), **random), upstream=torch.randn(N, **random) / N)


def ours(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    return selective_logprob(logits, ids, triton=True)


def naive(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    logp = logits.float().log_softmax(-1)
    return logp.gather(-1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def trl(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, ids)


def trl_without_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    from trl.trainer.utils import selective_log_softmax

    return (selective_log_softmax(logits, ids),)


def liger(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """It leaves out the last position, so that one must not count: its number is of a row less."""
    from liger_kernel.transformers.grpo_loss import fused_selective_log_softmax

    return (fused_selective_log_softmax(logits[None], ids[None, :-1].contiguous(), temperature=1.0)[0],)


def forward(x: dict[str, Tensor], function: Function) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return function(x["logits"], x["ids"])


def gradient(x: dict[str, Tensor], function: Function) -> Tensor:
    leaf = x["logits"].detach().requires_grad_()
    logprobs = function(leaf, x["ids"])[0]
    return torch.autograd.grad(logprobs, leaf, x["upstream"].to(logprobs.dtype))[0]


def nats_off(x: dict[str, Tensor], found: tuple[Tensor, ...]) -> float:
    """The largest error of a log-probability or, where there are any, of an entropy."""
    logprobs, _, entropy = selective_logprob_ref(x["logits"].double(), x["ids"])
    pairs = [(found[0], logprobs)] + ([(found[-1], entropy)] if len(found) > 1 else [])
    return max((ours.double() - truth[: len(ours)]).abs().max().item() for ours, truth in pairs)


def gradient_off(x: dict[str, Tensor], found: Tensor) -> float:
    """From that of logits as they were: it may lie over them."""
    logits = x["logits"]
    leaf = inputs(*logits.shape, logits.dtype, logits.device.type)["logits"].double().requires_grad_()
    selective_logprob_ref(leaf, x["ids"])[0].backward(x["upstream"].double())
    return distance(found, leaf.grad)


def providers(x: dict[str, Tensor], mode: str) -> dict[str, Provider]:
    device, dtype = x["logits"].device.type, x["logits"].dtype
    functions: dict[str, Function] = {OURS: ours, "torch": naive}
    if device == "cuda":
        functions["torch.compile"] = compiled(naive)
    if importlib.util.find_spec("trl"):
        functions |= {"TRL": trl, "TRL (no entropy)": trl_without_entropy}
    if importlib.util.find_spec("liger_kernel") and mode == "forward":
        functions["Liger (no entropy, no gradient)"] = liger
    moved = PASSES[mode] * x["logits"].numel() * dtype.itemsize
    if mode == "forward":
        run_of, error, allowed = forward, partial(nats_off, x), NATS[dtype]
    else:
        run_of, error, allowed = gradient, partial(gradient_off, x), FRACTION[dtype]
    made = {}
    for name, function in functions.items():
        strict = 1e-4 if name == OURS and mode == "forward" else allowed  # float32 whatever the logits are
        made[name] = Provider(partial(run_of, x, function), error, strict, moved=moved)
    return made | ({COPY: device_copy(moved)} if device == "cuda" else {})


def fresh(N: int, V: int, dtype: torch.dtype, mode: str, device: str = "cuda") -> dict[str, Provider]:
    return providers(inputs(N, V, dtype, device), mode)


def measured(N: int, V: int) -> list[dict]:
    rows = []
    for name, dtype in DTYPES.items():
        for mode in PASSES:
            small, large = (partial(fresh, size, V, dtype, mode) for size in (GATE_ROWS, N))
            case = {"N": N, "V": V, "dtype": name, "mode": mode}
            rows += measure(BENCH, small, large, yardstick=COPY, case=case)
    return rows


def modelled(N: int, V: int) -> list[dict]:
    return [
        model(moved=passes * N * V * dtype.itemsize, N=N, V=V, dtype=name, mode=mode)
        for name, dtype in DTYPES.items()
        for mode, passes in PASSES.items()
    ]


if __name__ == "__main__":
    run(BENCH, __doc__, ["8192x151936", "16384x151936"], measured, modelled)
