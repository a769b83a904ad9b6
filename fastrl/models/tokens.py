"""The ids of a tokenizer, and the text of completions."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def num_ids(tokenizer: "PreTrainedTokenizerBase") -> int:
    """One more than the highest id. `len(tokenizer)` counts tokens, which are fewer where ids are left out."""
    return max(tokenizer.get_vocab().values()) + 1


def completion_texts(
    tokenizer: "PreTrainedTokenizerBase", completions: Sequence[Sequence[int]], ends: Collection[int]
) -> list[str]:
    """Ids of completions -> their texts as they were sampled, without the ids of `ends` and of padding.

    Other special tokens stay: the marks of a thought or of a tool's call are something to be rewarded.
    """
    silent = {*ends, tokenizer.pad_token_id}
    kept = [[id for id in ids if id not in silent] for ids in completions]
    if not kept:
        return []  # of no rows batch_decode makes one
    return tokenizer.batch_decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
