"""The ids of a tokenizer, and the text of completions."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def num_ids(tokenizer: "PreTrainedTokenizerBase") -> int:
    """One more than the highest id. `len(tokenizer)` counts tokens, which are fewer where ids are left out."""
    return max(tokenizer.get_vocab().values()) + 1


def num_sampled(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> int:
    """How many ids can be sampled, from 0 on: those of the tokenizer, as far as the head has rows for them."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)  # load_model refuses others
    return min(num_ids(tokenizer), head.weight.shape[0])


def completion_texts(
    tokenizer: "PreTrainedTokenizerBase", completions: Sequence[Sequence[int]], ends: Collection[int]
) -> list[str]:
    """Ids of completions -> their texts as they were sampled, without padding and what ends them.

    ends: ids that end a completion, besides the tokenizer's own.
    Other special tokens stay: the marks of a thought or of a tool's call are something to be rewarded.
    """
    silent = {*ends, tokenizer.eos_token_id, tokenizer.pad_token_id}  # pyright: ignore[reportUnhashable] each is one id
    kept = [[id for id in ids if id not in silent] for ids in completions]
    if not kept:
        return []  # of no rows batch_decode makes one
    return tokenizer.batch_decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
