"""Prompts as token ids, once per run. Control tokens come from the chat template only, never from a data row.

The text is what the chat template writes for the messages (fastrl.data.template), and is encoded as a whole, which
gives what the tokenizer gives everywhere else. If that holds control tokens which the template did not write, template
and data are encoded apart, data as ordinary text.
"""

import re
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from fastrl.base.types import DataError, Problem
from fastrl.data.template import ChatTemplate, Messages, Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = ("auto", "chat", "plain")


def encode_prompts(
    problems: list[Problem],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    template: str = "auto",
    instruction: str,
    max_prompt_tokens: int,
    template_args: Mapping[str, Any] | None = None,
) -> tuple[list[Problem], list[tuple[str, int]]]:
    """-> the problems that fit, and (id, number of tokens) of those that do not.

    Fills `prompt_ids` in place, and `as_template`: whether they are the ids of the tokenizer's `apply_chat_template`.
    They are not where text of the row looks like a control token, for it stays text.

    template: chat (the tokenizer's own, with the generation prompt), plain (the bare text, after BOS if the tokenizer
    puts one there), auto (chat if there is a template). template_args: what the template is called with besides.
    instruction: appended to the last user message on a new line, unless empty. Raises ValueError on a template that
    cannot be had, DataError if no prompt fits or one has no ids.
    """
    if template not in TEMPLATES:
        raise ValueError(f"--template is {template!r}, expected one of {', '.join(TEMPLATES)}")
    if template == "chat" and not tokenizer.chat_template:
        raise ValueError("--template chat, but the tokenizer has no chat template; use --template plain")
    is_chat = bool(tokenizer.chat_template) and template != "plain"
    if template_args and not is_chat:
        raise ValueError("--template-args are for a chat template, and prompts are plain here; leave them out")
    encoder = Encoder(tokenizer)
    start = [] if is_chat else encoder.bos
    chat = ChatTemplate(tokenizer, encoder.control, template_args or {}) if is_chat else None

    prompts = []
    for problem in problems:
        with naming(problem):
            messages = with_instruction(problem.prompt, instruction)
            prompts.append(chat.parts(messages) if chat else (plain(messages), True))
    joined = encoder.ids_of_all(["".join(part.text for part in parts) for parts, _ in prompts])
    kept, dropped = [], []
    for problem, (parts, is_own_text), whole in zip(problems, prompts, joined, strict=True):
        with naming(problem):
            checked = encoder.checked(parts, whole)
        ids = start + checked
        if 0 < len(ids) <= max_prompt_tokens:
            problem.prompt_ids = ids
            problem.as_template = is_own_text and checked == whole
            kept.append(problem)
        else:
            dropped.append((problem.id, len(ids)))
    if dropped and not kept:
        lengths = sorted(length for _, length in dropped)
        raise DataError(
            f"none of the {len(dropped)} prompts fits: they have {lengths[0]} to {lengths[-1]} tokens (median "
            f"{statistics.median_low(lengths)}), and --max-prompt-tokens is {max_prompt_tokens}; raise it"
        )
    return kept, dropped


@contextmanager
def naming(problem: Problem) -> Iterator[None]:
    """Say in a DataError which problem it is about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"problem {problem.id}: {error}") from error


def describe_prompt(problem: Problem, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The encoded prompt in one line for a terminal: number of tokens, and the text with control characters escaped."""
    text = tokenizer.decode(problem.prompt_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f"{len(problem.prompt_ids)} tokens: {shown}"


def with_instruction(prompt: str | Messages, instruction: str) -> Messages:
    """The prompt as messages, the instruction on a line of its own at the end of the last user message."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    if instruction:
        messages[last] = {"role": "user", "content": f"{messages[last]['content']}\n{instruction}"}
    return messages


def plain(messages: Messages) -> list[Part]:
    """The messages below each other, a blank line between; nothing marks who speaks."""
    others = {message["role"] for message in messages} - {"system", "developer", "user"}
    if others:
        raise DataError(
            f"a conversation with messages of {', '.join(sorted(others))} has no plain form; "
            "use --template chat and a tokenizer with a chat template"
        )
    return [Part("\n\n".join(message["content"] for message in messages), is_data=True)]


class Encoder:
    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.control = control_tokens(tokenizer)  # text -> id
        self.control_ids = set(self.control.values())
        # what the tokenizer may put at the end of a text (EOS) would end the completion before it begins
        empty = tokenizer.encode("")
        self.bos = empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []
        self.template_ids = cache(self.ids)

    def checked(self, parts: list[Part], ids: list[int]) -> list[int]:
        """Ids of the joined text -> ids of it in which all control tokens are from parts that are not data."""
        refused = DataError("the tokenizer has no other ids for a control token in this text; delete the row")
        if not any(part.is_data for part in parts):
            unknown = self.tokenizer.unk_token_id
            written = "".join(part.text for part in parts).count(str(self.tokenizer.unk_token or "\0"))
            if unknown in self.control_ids and ids.count(unknown) != written:
                raise refused
            return ids
        wanted = [id for part in parts if not part.is_data for id in self.controls(self.template_ids(part.text))]
        if self.controls(ids) == wanted:
            return ids
        ids = []
        for part in parts:
            ids += self.data_ids(part.text) if part.is_data else self.template_ids(part.text)
        if self.controls(ids) != wanted:
            raise refused
        return ids

    def ids_of_all(self, texts: list[str]) -> list[list[int]]:
        """As `ids` for each, at once: a call per text costs more than its encoding."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=False, verbose=False).input_ids

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)

    def data_ids(self, text: str) -> list[int]:
        """Ids of ordinary text. Splitting covers the tokens declared special; if others remain, the text is cut
        inside each of them and the pieces are encoded apart."""
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if not self.controls(ids):
            return ids
        starts = re.finditer(f"(?={'|'.join(map(re.escape, self.control))})", text)
        cuts = [0, *(match.start() + 1 for match in starts), len(text)]
        pieces = [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
        encoded = [self.tokenizer.encode(p, add_special_tokens=False, split_special_tokens=True) for p in pieces]
        return [id for ids in encoded for id in ids]

    def controls(self, ids: list[int]) -> list[int]:
        return [id for id in ids if id in self.control_ids]


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Text -> id of the tokens that structure a conversation: the special ones, and those the chat template names.

    The latter because some models declare their role marks as not special; a single character or white space among
    them is no mark. Nor is the unknown token, for ordinary text may give it, unless it also begins or ends a text.
    """
    source = str(tokenizer.chat_template or "")
    unknown = tokenizer.unk_token_id
    if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        unknown = None

    def is_mark(text: str) -> bool:
        return len(text) > 1 and not text.isspace() and text in source

    return {
        token.content: id
        for id, token in tokenizer.added_tokens_decoder.items()
        if id != unknown and (token.special or is_mark(token.content))
    }
