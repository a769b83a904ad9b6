"""Causal attention of packed rows of unequal lengths, forward and backward: every kernel that is installed.

    python bench/bench_attention.py [--shape 16384x2048x12x2x128 ...]    tokens x longest x heads x key heads x width

bfloat16. Rows have lengths from an eighth of the longest to all of it. Products are counted without padding: two in the
forward and five in the backward for each pair of tokens of which one sees the other. The headline, of_bare, is the time
over that of padded rows, the definition. `cuDNN, new lengths` is SDPA's cuDNN kernel on padded rows, which are another
token shorter in every call, as the rows of a run differ: it makes a plan for each. The error is that of the output and
of the three gradients against float64, relative to their norm. Without a GPU it prints what a model of an H100 gives,
and says so.
"""

from collections.abc import Callable
from functools import partial
from itertools import count, pairwise

import torch
from timing import OURS, Provider, distance, measure, model, run
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fastrl.models.attention import attention
from fastrl.models.packing import Packing
from fastrl.models.ragged import Kernel, Layer, candidates, definition, unfit

BENCH = "attention"
PADDED = f"{OURS}, padded rows"
GATE = (700, 200, 4, 2, 64)
ALLOWED = 0.02
SHORTER = 64  # lengths that rows of the cuDNN provider go through


def lengths_of(N: int, longest: int) -> list[int]:
    """Lengths of rows that have N tokens together."""
    left, found = N, []
    for number in count():
        length = min(left, longest * (8 - number % 8) // 8)
        if not length:
            return found
        found.append(length)
        left -= length
    raise AssertionError


def packing_of(lengths: list[int], device: str) -> Packing:
    """Rows without anything in common."""
    M, S = sum(lengths), max(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    place = (starts[:-1, None] + torch.arange(S)).clamp(max=M - 1)
    home = (torch.arange(len(lengths))[:, None] * S + torch.arange(S))[torch.arange(S) < torch.tensor(lengths)[:, None]]
    flat = torch.arange(M)
    tensors = dict(input_ids=flat[None], position_ids=flat[None], place=place, home=home, rows=flat, row_home=flat)
    return Packing(**{name: x.to(device) for name, x in tensors.items()}, row_starts=starts.int().to(device))


def differentiated(leaves: list[Tensor], upstream: Tensor, attend: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """[1, heads, N, d] -> output and the three gradients."""
    inputs = [x.detach().requires_grad_() for x in leaves]
    out = attend(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, upstream.view_as(out))


def of_layer(module: nn.Module, packing: Packing, kernel: Kernel | None, *inputs: Tensor) -> Tensor:
    return attention(module, *inputs, None, packing=packing, kernel=kernel)[0]


def one_by_one(starts: list[int], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    rows = [
        scaled_dot_product_attention(*(x[:, :, a:b] for x in (query, key, value)), is_causal=True, enable_gqa=True)
        for a, b in pairwise(starts)
    ]
    return torch.cat(rows, dim=2).transpose(1, 2)


def new_lengths(rows: list[Tensor], number: count) -> tuple[Tensor, ...]:
    """SDPA by cuDNN of [B, heads, S, d], S smaller by one each time."""
    cut = next(number) % SHORTER
    inputs = [x[:, :, cut:].detach().requires_grad_() for x in rows]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    return torch.autograd.grad(out, inputs, torch.ones_like(out))


def fresh(N: int, longest: int, heads: int, key_heads: int, d: int, device: str = "cuda") -> dict[str, Provider]:
    lengths = lengths_of(N, longest)
    packing, flop = packing_of(lengths, device), products(lengths, heads, d)
    generator = torch.Generator(device).manual_seed(0)
    drawn = [
        torch.randn(1, n, N, d, generator=generator, device=device).bfloat16()
        for n in (heads, key_heads, key_heads, heads)
    ]
    leaves, upstream = drawn[:3], drawn[3].transpose(1, 2)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads // key_heads, True

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        flat = (x[0].transpose(0, 1) for x in (query, key, value))
        return definition(*flat, packing.row_starts, longest, d**-0.5, None)[None]

    def off(found: tuple[Tensor, ...]) -> float:
        truth = differentiated([x.double() for x in leaves], upstream.double(), exact)
        return max(distance(mine, right) for mine, right in zip(found, truth, strict=True))

    kernels: dict[str, Kernel | None] = {PADDED: None}
    layer = Layer(heads, key_heads, d, d, d**-0.5, None, torch.bfloat16, leaves[0].device)
    if not unfit(layer):
        loaded = [load() for _, load in candidates("auto", torch.cuda.get_device_capability()[0])]
        kernels |= {kernel.said: kernel for kernel in loaded}
    calls = {name: partial(of_layer, module, packing, kernel) for name, kernel in kernels.items()}
    calls["one row after the other"] = partial(one_by_one, packing.row_starts.tolist())
    made = {
        name: Provider(partial(differentiated, leaves, upstream, call), off, ALLOWED, flop=flop)
        for name, call in calls.items()
    }
    if device != "cpu":
        rows = [x[0][:, packing.place].transpose(0, 1).contiguous() for x in leaves]
        made["cuDNN, new lengths"] = Provider(partial(new_lengths, rows, count()), flop=flop)
    return made


def products(lengths: list[int], heads: int, d: int) -> float:
    return 7 * 2 * heads * d * sum(n * (n + 1) / 2 for n in lengths)


def measured(*shape: int) -> list[dict]:
    case = dict(zip(("N", "longest", "heads", "key_heads", "d"), shape, strict=True))
    return measure(BENCH, partial(fresh, *GATE), partial(fresh, *shape), yardstick=PADDED, case=case)


def modelled(N: int, longest: int, heads: int, key_heads: int, d: int) -> list[dict]:
    flop = products(lengths_of(N, longest), heads, d)
    # queries, outputs and their gradients, and the same of keys and values, are read or written once
    return [model(flop, 2 * N * d * (6 * heads + 6 * key_heads), N=N, longest=longest, heads=heads, d=d)]


if __name__ == "__main__":
    run(BENCH, __doc__, ["16384x2048x12x2x128", "16384x16384x28x4x128"], measured, modelled)
