"""A key-value cache with room to grow: a new token is written in place instead of copying all tokens before it.

Imports transformers, so it is imported where sampling begins.
"""

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

GROWTH = 1.5
LEAST_ROOM = 32  # tokens


class GrowingLayer(CacheLayerMixin):
    """Keys and values [B, heads, T, D] of a layer that attends to all tokens: the first T tokens of larger buffers.

    Builds on the abstract layer, whose methods every cache of transformers has, and not on one that keeps tensors.
    """

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.room = self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        end = past + key_states.shape[-2]
        if self.room[0].shape[-2] < end:
            size = max(LEAST_ROOM, int(end * GROWTH))
            self.room = grown(self.room[0], past, size), grown(self.room[1], past, size)
        for buffer, new in zip(self.room, (key_states, value_states), strict=True):
            buffer[..., past:end, :] = new
        return self.take(end)

    def take(self, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` tokens of the buffers become what the layer holds."""
        self.keys, self.values = keys, values = self.room[0][..., :length, :], self.room[1][..., :length, :]
        return keys, values

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] if self.keys is not None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1  # none

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:  # not so in a layer that keeps nothing, such as an MLP that is counted as one
            # with their room, or the next token would copy the selected rows a second time
            past = self.get_seq_length()
            self.room = self.room[0].index_select(0, beam_idx), self.room[1].index_select(0, beam_idx)
            self.take(past)


def grown(held: Tensor, length: int, size: int) -> Tensor:
    """A buffer for `size` tokens that begins with the first `length` of `held`."""
    buffer = torch.empty((*held.shape[:-2], size, held.shape[-1]), dtype=held.dtype, device=held.device)
    buffer[..., :length, :] = held[..., :length, :]
    return buffer


def growing_cache(config) -> DynamicCache:
    """A DynamicCache for a model's configuration; layers with a sliding window or a state keep their own kind."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Make row i of the cache the former row rows[i]; a row may be left out, or taken several times."""
    cache.reorder_cache(rows)  # pyright: ignore[reportArgumentType] its LongTensor is a tensor of int64
