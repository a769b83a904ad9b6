"""The head, the loss of tokens and both gradients: time, useful TFLOP/s, peak memory and error of each way to do it.

    python bench/bench_linear_policy_loss.py [--shape 16384x1536x151936 ...] [--out FILE.json]      N x H x V

Useful work is 6 N H V, three products, whatever a provider spends.
The headline, of_bare, is the time over that of the bare products of the vendor library in the same run. A provider that
computes another loss is marked so, and set against that one. The error is the larger of those of the gradients in
hidden and in weight against float64, relative to their norms. Without a GPU it prints what a model of an H100 gives,
and says so, once for each row kernel: rows of logits that are read twice, the default, or once.
"""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from bench_policy_loss import DUAL_CLIP, EPSILON, token_loss, torch_loss
from heads import EXACT, GATE_ROWS, ROUNDED, SEQUENCES, LogprobFunction, bare_products, head_inputs, logprob_functions
from timing import OURS, Provider, distance, measure, model, run
from torch import Tensor
from torch.nn import functional as F

from fastrl.kernels.linear_logprob import CHUNK_ROWS, linear_logprob
from fastrl.kernels.linear_policy_loss import TokenVectors, linear_policy_loss, linear_policy_loss_ref
from fastrl.kernels.row_once import RowKernel
from fastrl.models.row_once import CompiledRowKernel, has_clusters

BENCH = "linear_policy_loss"
BARE = "bare products"
ONCE = "logits read once"  # fastrl with another row kernel, which may not run everywhere: a fault is a note in its row
ROW_BYTES = {"twice": 10, "once": 6}  # of each float32 logit: read so often, written once as bfloat16

Gradients = tuple[Tensor, Tensor]  # in hidden and in weight


def inputs(N: int, H: int, V: int, device: str) -> dict[str, Tensor]:
    x = head_inputs(N, H, V, device)
    g = torch.Generator(device).manual_seed(1)
    random = dict(generator=g, device=device)
    logprobs = linear_logprob(x["hidden"], x["weight"], x["target"])[0]
    advantage = torch.randn(SEQUENCES, **random)[torch.arange(N, device=device) * SEQUENCES // N]
    return x | dict(
        advantage=advantage,
        w=torch.full((N,), 1 / N, device=device),
        old_logprobs=logprobs + 0.1 * torch.randn(N, **random),
    )


def fused(x: dict[str, Tensor], triton: bool, row_kernel: RowKernel | None = None) -> Gradients:
    """Both gradients are there after the forward; that in weight is added to a float32 buffer."""
    vectors = TokenVectors(x["advantage"], x["w"], x["old_logprobs"])
    head = (x["hidden"], x["weight"], x["target"])
    how = dict(weight_grad=x["gradient"], triton=triton, row_kernel=row_kernel)
    made = linear_policy_loss(token_loss(x), *head, vectors, **how)
    return made.hidden_grad, x["gradient"]


def recomputed(x: dict[str, Tensor]) -> Gradients:
    leaf = x["hidden"].detach().requires_grad_()
    logprobs = linear_logprob(leaf, x["weight"], x["target"], weight_grad=x["gradient"], triton=True)[0]
    torch_loss(logprobs, x).backward()
    return leaf.grad, x["gradient"]


def differentiated(x: dict[str, Tensor], loss: Callable[[Tensor, Tensor], Tensor]) -> Gradients:
    """Of a loss of hidden and weight, by autograd."""
    hidden, weight = x["hidden"].detach().requires_grad_(), x["weight"].detach().requires_grad_()
    loss(hidden, weight).backward()
    return hidden.grad, weight.grad


def loss_after(function: LogprobFunction, x: dict[str, Tensor], hidden: Tensor, weight: Tensor) -> Tensor:
    return torch_loss(function(hidden, weight, x["target"], False)[0], x)


def cross_entropy(x: dict[str, Tensor], hidden: Tensor, weight: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, x["target"], options=torch.nn.LinearCrossEntropyOptions())


def liger_cross_entropy(x: dict[str, Tensor], hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, x["target"])


def in_sequences(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """[sequences, tokens] and one advantage each, as a trainer of padded batches has them."""
    shape = (min(SEQUENCES, len(x["target"])), -1)
    return {name: x[name].view(shape) for name in ("target", "old_logprobs")} | {
        "advantage": x["advantage"].view(shape)[:, 0].contiguous()
    }


def liger_fused_linear(x: dict[str, Tensor], hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    s = in_sequences(x)
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        epsilon_low=EPSILON[0],
        epsilon_high=EPSILON[1],
        delta=DUAL_CLIP,
        compiled=hidden.is_cuda,
    )
    states = hidden.view(*s["target"].shape, -1)
    return loss(
        states, weight, s["target"], torch.ones_like(s["target"]), s["advantage"], old_per_token_logps=s["old_logprobs"]
    )[0]


def liger_full_logits(x: dict[str, Tensor], hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    s = in_sequences(x)
    states = F.pad(hidden.view(*s["target"].shape, -1), (0, 0, 0, 1))  # a position more, which it leaves out
    return triton_grpo_loss(
        states @ weight.T,
        s["old_logprobs"],
        None,
        s["target"],
        s["advantage"],
        temperature=1.0,
        beta=0.0,
        eps_low=EPSILON[0],
        eps_high=EPSILON[1],
        delta=DUAL_CLIP,
        reduce=True,
    )[0]


def off(x: dict[str, Tensor], no_rl: bool, found: Gradients) -> float:
    """The larger of the distances in hidden and in weight; no_rl: of the cross-entropy, advantage and ratio 1."""
    exact = {key: value.double() if value.is_floating_point() else value for key, value in x.items()}
    vectors = TokenVectors(exact["advantage"], exact["w"], exact["old_logprobs"])
    if no_rl:
        vectors = vectors._replace(advantage=torch.ones_like(vectors.w), old_logprobs=None)
    truth = linear_policy_loss_ref(token_loss(x), exact["hidden"], exact["weight"], exact["target"], vectors)
    return max(distance(ours, right) for ours, right in zip(found, (truth.hidden_grad, truth.weight_grad), strict=True))


def providers(x: dict[str, Tensor]) -> dict[str, Provider]:
    flop = 6 * x["hidden"].numel() * len(x["weight"])
    on_cuda = x["hidden"].is_cuda
    clip = partial(off, x, False)

    def ours(call: Callable[[], Gradients]) -> Provider:
        return Provider(call, clip, EXACT, flop)

    made = {
        OURS: ours(partial(fused, x, True)),
        "fastrl, recomputing": ours(partial(recomputed, x)),
        "fastrl, torch": ours(partial(fused, x, False)),
    }
    losses: dict[str, Callable[[dict, Tensor, Tensor], Tensor]] = {}
    for name, function in logprob_functions(x["hidden"].device.type, gradient=True, entropy=False).items():
        losses[name] = partial(loss_after, function)
    if importlib.util.find_spec("liger_kernel"):
        losses["Liger fused linear GRPO loss"] = liger_fused_linear
        losses["Liger GRPO loss of full logits"] = liger_full_logits
        losses["Liger cross-entropy (no RL loss)"] = liger_cross_entropy
    if hasattr(F, "linear_cross_entropy"):
        losses["F.linear_cross_entropy (no RL loss)"] = cross_entropy
    for name, loss in losses.items():
        error = partial(off, x, "no RL loss" in name)
        made[name] = Provider(partial(differentiated, x, partial(loss, x)), error, ROUNDED, flop)
    if on_cuda and has_clusters():
        made[ONCE] = ours(partial(fused, x, True, CompiledRowKernel()))
    return made | ({BARE: bare_products(x, gradient=True)} if on_cuda else {})


def fresh(N: int, H: int, V: int, device: str = "cuda") -> dict[str, Provider]:
    return providers(inputs(N, H, V, device))


def measured(N: int, H: int, V: int) -> list[dict]:
    small, large = (partial(fresh, rows, H, V) for rows in (GATE_ROWS, N))
    return measure(BENCH, small, large, yardstick=BARE, case={"N": N, "H": H, "V": V})


def modelled(N: int, H: int, V: int) -> list[dict]:
    made = []
    for logits_read, row_bytes in ROW_BYTES.items():
        row = model(6 * N * H * V, row_bytes * N * V, N=N, H=H, V=V, logits_read=logits_read)
        workspace = 4 * min(N, CHUNK_ROWS) * V
        made.append(row | {"of_bare": row["ms"] / row["products_ms"], "workspace_mib": workspace / 2**20})
    return made


if __name__ == "__main__":
    run(BENCH, __doc__, ["16384x1536x151936", "8192x3584x152064"], measured, modelled)
