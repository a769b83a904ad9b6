"""The cache of sampling holds what transformers' own holds, and copies it only where it has to grow."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from fastrl.models.cache import GrowingLayer, growing_cache, select_rows


@pytest.fixture
def config():
    return LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=8, intermediate_size=16)


def states(batch: int, tokens: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, of different widths as some models have them."""
    return torch.randn(batch, 2, tokens, 8).to(dtype), torch.randn(batch, 2, tokens, 6).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_holds_what_a_dynamic_cache_holds(config, dtype):
    torch.manual_seed(0)
    ours, theirs = growing_cache(config), DynamicCache(config=config)
    assert [type(layer) for layer in ours.layers] == [GrowingLayer, GrowingLayer]
    select_rows(ours, torch.tensor([0]))  # before there is anything to select
    assert ours.get_seq_length() == 0
    batch = 3
    # the last one of 40 tokens does not fit into the room that was made before it
    for tokens, rows in ((5, [2, 0, 0, 1]), (1, None), (1, [3, 1]), (40, None), (1, [1, 1, 0]), (1, None)):
        for index in (0, 1):
            given = states(batch, tokens, dtype)
            assert ours.get_mask_sizes(tokens, index) == theirs.get_mask_sizes(tokens, index)
            for held, wanted in zip(ours.update(*given, index), theirs.update(*given, index), strict=True):
                assert held.dtype == dtype and torch.equal(held, wanted)
        assert ours.get_seq_length() == theirs.get_seq_length()
        if rows is not None:
            select_rows(ours, torch.tensor(rows))
            select_rows(theirs, torch.tensor(rows))
            batch = len(rows)
    assert torch.equal(ours.layers[1].keys, theirs.layers[1].keys)
    assert torch.equal(ours.layers[1].values, theirs.layers[1].values)


def test_a_token_is_written_in_place(config):
    cache = growing_cache(config)
    first, _ = cache.update(*states(2, 4), 0)
    for _ in range(28):
        held, _ = cache.update(*states(2, 1), 0)
        assert held.data_ptr() == first.data_ptr()
    assert held.shape[-2] == 32  # all of the room that was made for the first four
    held, _ = cache.update(*states(2, 1), 0)
    assert held.data_ptr() != first.data_ptr()
    # selected rows keep their room: 33 * 1.5 = 49 tokens
    select_rows(cache, torch.tensor([1]))
    first = cache.layers[0].keys
    for _ in range(16):
        held, _ = cache.update(*states(1, 1), 0)
        assert held.data_ptr() == first.data_ptr()
