"""The head, the loss of tokens and both gradients: time, useful TFLOP/s, peak memory and error of each way to do it.

    python bench/bench_linear_policy_loss.py [--shape 16384x1536x151936 ...] [--out FILE.json]      N x H x V

Useful work is 6 N H V, three products, whatever a provider spends. The headline is the time over that of the three bare
products of the vendor library in the same run. A provider that does not compute the loss is marked so. Nothing wrong is
timed: the gradient in hidden of the first rows is set against float64. Without a GPU it prints what a model of an H100
gives, and says so.
"""

import argparse
import importlib.util
from collections.abc import Callable

import torch
from timing import PEAK_FLOPS, REACHED_BYTES_PER_S, REACHED_FLOPS, distance, finish, peak_mib, quantiles, sample, show
from torch.nn import functional as F

from fastrl.kernels.linear_logprob import CHUNK_ROWS, linear_logprob
from fastrl.kernels.linear_policy_loss import linear_policy_loss, linear_policy_loss_ref

GATE_ROWS, GATE_WORDS = 256, 151_936
ROW_BYTES = 10  # of each float32 logit: read twice, written once as bfloat16
LOSS = dict(epsilon=(0.2, 0.28))


def inputs(N: int, H: int, V: int, device: str, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    g = torch.Generator(device).manual_seed(0)
    random = dict(generator=g, device=device)
    hidden = torch.randn(N, H, **random).to(dtype)
    weight = (torch.randn(V, H, **random) * 2 * H**-0.5).to(dtype)
    target = torch.randint(0, V, (N,), **random)
    logprobs = linear_logprob(hidden, weight, target)[0]
    return dict(
        hidden=hidden, weight=weight, target=target, advantage=torch.randn(N, **random),
        w=torch.full((N,), 1 / N, device=device), old_logprobs=logprobs + 0.1 * torch.randn(N, **random),
    )  # fmt: skip


def loss_of(x: dict, logprobs: torch.Tensor) -> torch.Tensor:
    """The clipped surrogate in torch."""
    ratio = (logprobs - x["old_logprobs"]).clamp(-20, 20).exp()
    low, high = LOSS["epsilon"]
    loss = torch.maximum(-x["advantage"] * ratio, -x["advantage"] * ratio.clamp(1 - low, 1 + high))
    loss = torch.where(x["advantage"] < 0, torch.minimum(loss, -3.0 * x["advantage"]), loss)
    return (x["w"] * loss).sum()


def providers(x: dict, gradient: torch.Tensor) -> dict[str, Callable[[], torch.Tensor | None]]:
    """name -> a call that adds the weight's gradient somewhere and returns the hidden one; None: no loss computed."""
    hidden, weight, target = x["hidden"], x["weight"], x["target"]
    vectors = {name: x[name] for name in ("advantage", "w", "old_logprobs")}

    def fused(triton: bool) -> torch.Tensor:
        return linear_policy_loss(hidden, weight, target, **vectors, **LOSS, weight_grad=gradient, need_entropy=False,
                                  triton=triton).hidden_grad  # fmt: skip

    def recomputed() -> torch.Tensor:
        leaf = hidden.detach().requires_grad_()
        loss_of(x, linear_logprob(leaf, weight, target, weight_grad=gradient)[0]).backward()
        return leaf.grad

    def naive(function: Callable) -> torch.Tensor:
        leaf, head = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss_of(x, function(leaf, head, target)).backward()
        return leaf.grad

    def products() -> None:
        z = torch.empty(min(CHUNK_ROWS, len(hidden)), len(weight), dtype=torch.float32, device=hidden.device)
        dz = z.view(torch.bfloat16)[:, : len(weight)]
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = hidden[start : start + CHUNK_ROWS]
            torch.mm(rows, weight.T, out_dtype=torch.float32, out=z[: len(rows)])
            torch.mm(dz[: len(rows)], weight)
            torch.addmm(gradient, dz[: len(rows)].T, rows, out_dtype=torch.float32, out=gradient)

    def cross_entropy() -> None:
        leaf, head = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        F.linear_cross_entropy(leaf, head, target).backward()

    def liger() -> None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        leaf, head = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        LigerFusedLinearCrossEntropyLoss()(head, leaf, target).backward()

    made = {"fastrl": lambda: fused(True), "fastrl, recomputing": recomputed, "fastrl, torch": lambda: fused(False)}
    if hidden.is_cuda:
        made |= {"bare products": products, "torch": lambda: naive(full_logits)}
        compiled = torch.compile(full_logits)
        made["torch.compile"] = lambda: naive(compiled)
        if hasattr(F, "linear_cross_entropy"):
            made["F.linear_cross_entropy (no RL loss)"] = cross_entropy
        if importlib.util.find_spec("liger_kernel"):
            made["Liger cross-entropy (no RL loss)"] = liger
    return made


def full_logits(hidden, weight, target):
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def gate(name: str, H: int, device: str, rows: int = GATE_ROWS, words: int = GATE_WORDS) -> float | None:
    """Error of the gradient in hidden against float64. Raises where it is more than bfloat16 logits make of it."""
    x = inputs(rows, H, words, device)
    gradient = torch.zeros(words, H, device=device)
    found = providers(x, gradient)[name]()
    if found is None:
        return None
    exact = {key: value.double() if value.is_floating_point() else value for key, value in x.items()}
    truth = linear_policy_loss_ref(
        exact["hidden"], exact["weight"], exact["target"], advantage=exact["advantage"], w=exact["w"],
        old_logprobs=exact["old_logprobs"], **LOSS,
    )  # fmt: skip
    error = distance(found, truth.hidden_grad)
    if not error <= 0.08:
        raise SystemExit(f"bench_linear_policy_loss: {name} is off by {error:.2e} of the gradient's norm: no times")
    return error


def measured(N: int, H: int, V: int) -> list[dict]:
    x = inputs(N, H, V, "cuda")
    gradient = torch.zeros(V, H, device="cuda")
    calls, errors, peaks = {}, {}, {}
    for name, call in providers(x, gradient).items():
        try:
            errors[name], peaks[name] = gate(name, H, "cuda", words=V), peak_mib(call)
            calls[name] = call
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            peaks[name] = None
    times = {name: quantiles(ms) for name, ms in sample(calls, warmup=5, samples=20).items()}
    bare = times["bare products"]["ms"]
    return [
        {"N": N, "H": H, "V": V, "provider": name, **times[name], "of_bare": times[name]["ms"] / bare,
         "useful_tflops": 6 * N * H * V / times[name]["ms"] / 1e9, "peak_mib": peaks[name], "error": errors[name]}
        if name in times else {"N": N, "H": H, "V": V, "provider": f"{name}: out of memory"}
        for name in peaks
    ]  # fmt: skip


def modelled(N: int, H: int, V: int) -> dict:
    products, rows = 6 * N * H * V / REACHED_FLOPS * 1e3, ROW_BYTES * N * V / REACHED_BYTES_PER_S * 1e3
    return {"N": N, "H": H, "V": V, "provider": "model of an H100, not measured", "ms": products + rows,
            "products_ms": products, "rows_ms": rows, "products_ms_at_peak": 6 * N * H * V / PEAK_FLOPS * 1e3,
            "of_bare": 1 + rows / products, "workspace_mib": 4 * min(N, CHUNK_ROWS) * V / 2**20}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="NxHxV; may be given several times")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    shapes = [tuple(map(int, s.split("x"))) for s in args.shape or ["2048x1536x151936", "16384x1536x151936",
                                                                    "16384x3584x152064"]]  # fmt: skip
    gpu = torch.cuda.is_available()
    rows = [row for shape in shapes for row in (measured(*shape) if gpu else [modelled(*shape)])]
    columns = ["N", "H", "V", "provider", "ms", "ms_20", "ms_80", "of_bare", "useful_tflops", "peak_mib", "error"]
    model = ["N", "H", "V", "provider", "ms", "products_ms", "rows_ms", "of_bare", "workspace_mib"]
    show(rows, columns if gpu else model)
    finish("linear_policy_loss", rows, args.out, measured=gpu)


if __name__ == "__main__":
    main()
