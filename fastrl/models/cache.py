"""A key-value cache with room to grow: a new token is written in place instead of copying all tokens before it.

Imports transformers, so it is imported where sampling begins.
"""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

GROWTH = 1.5
LEAST_ROOM = 32  # tokens


class GrowingLayer(DynamicLayer):
    """DynamicLayer whose keys and values [B, heads, T, D] are the first T tokens of larger buffers."""

    room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        end = past + key_states.shape[-2]
        if self.room is None or self.room[0].shape[-2] < end:
            held = (self.keys, self.values)
            size = (*key_states.shape[:-2], max(LEAST_ROOM, int(end * GROWTH)), key_states.shape[-1])
            self.room = (
                torch.empty(size, dtype=self.dtype, device=self.device),
                torch.empty((*size[:-1], value_states.shape[-1]), dtype=self.dtype, device=self.device),
            )
            for buffer, kept in zip(self.room, held, strict=True):
                if kept is not None and past:
                    buffer[..., :past, :] = kept
        for buffer, new in zip(self.room, (key_states, value_states), strict=True):
            buffer[..., past:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        # with their room, or the next token would copy the selected rows a second time
        past = self.get_seq_length()
        if self.room is None:  # a layer that keeps nothing, such as an MLP that is counted as one
            return
        keys, values = self.room
        self.room = keys.index_select(0, indices), values.index_select(0, indices)
        self.keys, self.values = (buffer[..., :past, :] for buffer in self.room)


def growing_cache(config) -> DynamicCache:
    """A DynamicCache for a model's configuration; layers with a sliding window or a state keep their own kind."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Make row i of the cache the former row rows[i]; a row may be left out, or taken several times."""
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            # states, and in hybrid layers keys and values with them
            layer.reorder_cache(rows)  # pyright: ignore[reportArgumentType] its LongTensor is a tensor of int64
        else:
            assert isinstance(layer, DynamicLayer)  # what a DynamicCache is made of
            layer.batch_select_indices(rows)
