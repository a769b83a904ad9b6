"""Packing: a microbatch as one sequence of its distinct tokens, a prompt once for all completions that share it.

    rows   p p p a a        flat   p p p a a b        every layer but attention works token by token and sees this
           p p p b

Attention is between the tokens of a row: queries, keys and values are gathered into right-padded rows, where causal
attention needs no mask, and its outputs are gathered back. Neither padding nor a repeated prompt costs more than that.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding  # a gather whose backward adds up in a fixed order, in parallel

from fastrl.types import TrainBatch

ATTENTION = "fastrl_sdpa"  # the name transformers knows `attention` by
CAUSAL = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """N distinct input tokens of B rows, without the last token of each row: nothing is predicted from it."""

    input_ids: Tensor  # [1, N] int64
    position_ids: Tensor  # [1, N] int64, the column of each token
    place: Tensor  # [B, S] int64, which flat token stands at column s of row b; any in the padding
    home: Tensor  # [N] int64, b * S + s of one place where each flat token stands


def pack(batch: TrainBatch) -> Packing:
    """The packing of a batch with S + 1 columns."""
    B, S, device = len(batch), batch.input_ids.shape[1] - 1, batch.input_ids.device
    row, column = torch.arange(B, device=device), torch.arange(S, device=device)
    _, inverse = batch.group.unique(return_inverse=True)
    first = torch.full((B,), B, device=device).scatter_reduce(0, inverse, row, "amin")[inverse]
    shared = (column < batch.prompt_lengths[:, None]) & (first != row)[:, None]
    kept = (column < batch.lengths()[:, None] - 1) & ~shared
    number = (kept.flatten().cumsum(0) - 1).clamp(min=0).view(B, S)
    home = kept.flatten().nonzero()[:, 0]
    return Packing(
        input_ids=batch.input_ids[:, :-1].flatten()[home][None],
        position_ids=(home % max(1, S))[None],
        place=torch.where(shared, number[first], number),
        home=home,
    )


def supports(model: nn.Module) -> bool:
    """Whether attention is the only layer of the model that looks at more than one token, and can be replaced."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return model.config._attn_implementation == ATTENTION and kinds <= CAUSAL


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    packing: Packing | None = None, sliding_window: int | None = None, **kwargs,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' SDPA; with a packing, of query, key and value [1, heads, N, d] -> [1, N, heads, d]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    B, S = packing.place.shape

    def rows(x: Tensor) -> Tensor:
        heads, _, d = x.shape[1:]
        return embedding(packing.place, x[0].transpose(0, 1).flatten(1)).view(B, S, heads, d).transpose(1, 2)

    mask = None
    if sliding_window is not None and sliding_window < S:
        mask = query.new_ones(S, S, dtype=torch.bool).tril().triu(1 - sliding_window)[None, None]
    out, _ = sdpa_attention_forward(module, rows(query), rows(key), rows(value), mask, **kwargs)
    return embedding(packing.home, out.reshape(B * S, -1)).view(1, -1, *out.shape[2:]), None


def register() -> str:
    """Make `attention` known to transformers; returns its name there."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return ATTENTION


def forward(model: nn.Module, packing: Packing) -> Tensor:
    """-> last hidden states [N, H] of the flat tokens."""
    # four dimensions: a mask that is ready, so transformers builds none; `attention` does not read it
    ready = packing.input_ids.new_zeros(1, 1, 1, 1, dtype=torch.bool)
    out = model.base_model(
        packing.input_ids, attention_mask=ready, position_ids=packing.position_ids, use_cache=False, packing=packing
    )
    return out.last_hidden_state[0]
