"""Text that grows token by token: the model's own weights, its cache, and the distribution of the next token."""

import inspect
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrl.kernels.linear_logprob import chunk_logits
from fastrl.models.head import head_weight, logit_map

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Decoding:
    """n rows, left-padded, what the model keeps of them, and `hidden` [n, H] after their last token.

    pad_id fills rows up on the left and is masked, so any id will do.
    """

    def __init__(self, model: "PreTrainedModel", prompts: list[list[int]], *, pad_id: int):
        from fastrl.models.cache import growing_cache  # imports transformers

        self.model, device = model, next(model.parameters()).device
        width = max(map(len, prompts))
        ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=device)
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.cache = growing_cache(model.config)
        # since transformers 5.24 its models call it cache, and warn of the former name
        named = inspect.signature(model.base_model.forward).parameters
        self.cache_argument = {"cache" if "cache" in named else "past_key_values": self.cache}
        self.hidden = self.forward(ids)

    def select(self, rows: Tensor) -> None:
        """Make row i the former row rows[i]; a row may be left out, or taken several times."""
        from fastrl.models.cache import select_rows

        self.hidden, self.mask = self.hidden[rows], self.mask[rows]
        select_rows(self.cache, rows)

    def append(self, tokens: Tensor) -> None:
        """tokens [n]: the next one of each row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.hidden = self.forward(tokens[:, None])

    def logits(self, num_tokens: int) -> Tensor:
        """The model's logits [n, num_tokens] of the next token, in at least float32."""
        return logit_map(self.model)(chunk_logits(self.hidden, head_weight(self.model)[:num_tokens]))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [n, T], put behind what the cache holds -> hidden [n, H] of the last of them."""
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self.model.base_model(
            ids, attention_mask=self.mask, position_ids=positions, use_cache=True, **self.cache_argument
        )
        return out.last_hidden_state[:, -1]
