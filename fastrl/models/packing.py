"""Packing: a microbatch as one sequence of its distinct tokens, a prompt once for all completions that share it.

    rows   p p p a a        flat   p p p a a b        every layer but attention works token by token and sees this
           p p p b

Attention is between the tokens of a row: queries, keys and values are gathered into rows and its outputs gathered back.
On a GPU the rows stand one after the other and each is attended to in its own length, so padding costs nothing at all.
Elsewhere, which is the definition, they are right-padded, where causal attention needs no mask.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding  # a gather whose backward adds up in a fixed order, in parallel

from fastrl.base.exhausted import means_out_of_memory
from fastrl.base.types import TrainBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "fastrl_sdpa"  # the name transformers knows `attention` by
CAUSAL = {"full_attention", "sliding_attention"}
# arguments of attention that SDPA has no place for
EAGER_ONLY = {
    "softcap": "bounds the model's attention scores (attn_logit_softcapping)",
    "s_aux": "takes part of the model's attention away (attention sinks)",
}


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """N distinct input tokens of B rows, without the last token of each row: nothing is predicted from it."""

    input_ids: Tensor  # [1, N] int64
    position_ids: Tensor  # [1, N] int64, the column of each token
    place: Tensor  # [B, S] int64, which flat token stands at column s of row b; any in the padding
    home: Tensor  # [N] int64, b * S + s of one place where each flat token stands
    rows: Tensor  # [M] int64, `place` without the padding, row after row
    row_starts: Tensor  # [B + 1] int32, where each row begins among the M, and M
    row_home: Tensor  # [N] int64, one place among the M where each flat token stands


def pack(batch: TrainBatch) -> Packing:
    """The packing of a batch with S + 1 columns."""
    B, S, device = len(batch), batch.input_ids.shape[1] - 1, batch.input_ids.device
    row, column = torch.arange(B, device=device), torch.arange(S, device=device)
    _, inverse = batch.group.unique(return_inverse=True)
    first = torch.full((B,), B, device=device).scatter_reduce(0, inverse, row, "amin")[inverse]
    shared = (column < batch.prompt_lengths[:, None]) & (first != row)[:, None]
    real = column < batch.lengths()[:, None] - 1
    kept = real & ~shared
    number = (kept.flatten().cumsum(0) - 1).clamp(min=0).view(B, S)
    home = kept.flatten().nonzero()[:, 0]
    place = torch.where(shared, number[first], number)
    lengths = torch.cat([real.new_zeros(1, dtype=torch.int64), real.sum(dim=1)])
    return Packing(
        input_ids=batch.input_ids[:, :-1].flatten()[home][None],
        position_ids=(home % max(1, S))[None],
        place=place,
        home=home,
        rows=place[real],
        row_starts=lengths.cumsum(0).int(),
        row_home=(real.flatten().cumsum(0) - 1)[home],
    )


class HasBody(Protocol):
    """A transformers model with a head of any kind."""

    @property
    def base_model(self) -> nn.Module: ...


def supports(model: "PreTrainedModel") -> bool:
    """Whether attention is the only layer of the model that looks at more than one token, and can be replaced.

    `layer_types` says so where a configuration has it. In any case `attention` must have been given a packing in every
    layer, and a window in every layer that has one: a family may have attention of its own, layers that its
    configuration does not name, or windows that it puts into masks only.
    """
    config = model.config.get_text_config()
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or []
    if model.config._attn_implementation != ATTENTION or not CAUSAL.issuperset(kinds):
        return False
    windowed = kinds.count("sliding_attention") if kinds else layers * bool(getattr(config, "sliding_window", None))
    calls = packed_calls(model)
    return len(calls) >= layers and len([window for window in calls if window]) >= windowed


def packed_calls(model: "PreTrainedModel") -> list[int | None]:
    """Windows, or None, with which a forward of a packing asks `attention`."""
    from transformers import AttentionInterface

    calls: list[int | None] = []

    def counted(*args, packing: Packing | None = None, sliding_window: int | None = None, **kwargs):
        if packing is not None:
            calls.append(sliding_window)
        return attention(*args, packing=packing, sliding_window=sliding_window, **kwargs)

    row = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    flat = Packing(
        input_ids=row,
        position_ids=torch.arange(2, device=model.device)[None],
        place=torch.arange(2, device=model.device)[None],
        home=torch.arange(2, device=model.device),
        rows=torch.arange(2, device=model.device),
        row_starts=torch.tensor([0, 2], dtype=torch.int32, device=model.device),
        row_home=torch.arange(2, device=model.device),
    )
    AttentionInterface.register(ATTENTION, counted)
    try:
        with torch.no_grad():
            forward(model, flat)
    except Exception as error:  # whatever a family says that cannot take flat rows: its rows are padded
        if means_out_of_memory(error):
            raise
        return []
    finally:
        AttentionInterface.register(ATTENTION, attention)
    return calls


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' SDPA; with a packing, of query, key and value [1, heads, N, d] -> [1, N, heads, d].

    Raises ValueError for what SDPA cannot do and transformers' would leave out.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    left_out = [name for name in EAGER_ONLY if kwargs.get(name) is not None]
    if left_out:
        raise ValueError(f"--attention sdpa leaves out what {EAGER_ONLY[left_out[0]]}; use --attention eager")
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    B, S = packing.place.shape
    kernel = ragged_kernel(query)
    if kernel is not None:
        inputs = (
            embedding(packing.rows, x[0].transpose(0, 1).flatten(1)).view(-1, x.shape[1], x.shape[3])
            for x in (query, key, value)
        )
        out = kernel(
            *inputs,
            packing.row_starts,
            packing.row_starts,
            S,
            S,
            scale=kwargs.get("scaling"),
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return embedding(packing.row_home, out.flatten(1)).view(1, -1, *out.shape[1:]), None

    def rows(x: Tensor) -> Tensor:
        heads, _, d = x.shape[1:]
        return embedding(packing.place, x[0].transpose(0, 1).flatten(1)).view(B, S, heads, d).transpose(1, 2)

    mask = None
    if sliding_window is not None and sliding_window < S:
        mask = query.new_ones(S, S, dtype=torch.bool).tril().triu(1 - sliding_window)[None, None]
    out, _ = sdpa_attention_forward(module, rows(query), rows(key), rows(value), mask, **kwargs)
    return embedding(packing.home, out.reshape(B * S, -1)).view(1, -1, *out.shape[2:]), None


def ragged_kernel(query: Tensor) -> Callable | None:
    """Attention over rows of their own lengths, where it can take queries [1, heads, N, d]; else None."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    if not (query.is_cuda and half and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0):
        return None
    return varlen_attn() if torch.cuda.get_device_capability(query.device) >= (8, 0) else None


@cache
def varlen_attn() -> Callable | None:
    """PyTorch's own, in versions whose it can share keys between heads and look back through a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn as attend
    except ImportError:
        return None
    return attend if {"scale", "window_size", "enable_gqa"} <= inspect.signature(attend).parameters.keys() else None


def register() -> str:
    """Make `attention` known to transformers; returns its name there."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return ATTENTION


def forward(model: HasBody, packing: Packing) -> Tensor:
    """-> last hidden states [N, H] of the flat tokens."""
    # four dimensions: a mask that is ready, so transformers builds none; `attention` does not read it
    ready = packing.input_ids.new_zeros(1, 1, 1, 1, dtype=torch.bool)
    out = model.base_model(
        packing.input_ids, attention_mask=ready, position_ids=packing.position_ids, use_cache=False, packing=packing
    )
    return out.last_hidden_state[0]
