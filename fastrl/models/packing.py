"""Packing: a microbatch as one sequence of its distinct tokens, a prompt once for all completions that share it.

    rows   p p p a a        flat   p p p a a b        every layer but attention works token by token and sees this
           p p p b

Attention is between the tokens of a row, see `attention`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fastrl.base.types import TrainBatch


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


def forward(model: HasBody, packing: Packing) -> Tensor:
    """-> last hidden states [N, H] of the flat tokens."""
    # four dimensions: a mask that is ready, so transformers builds none; `models.attention` does not read it
    ready = packing.input_ids.new_zeros(1, 1, 1, 1, dtype=torch.bool)
    out = model.base_model(
        packing.input_ids, attention_mask=ready, position_ids=packing.position_ids, use_cache=False, packing=packing
    )
    return out.last_hidden_state[0]
