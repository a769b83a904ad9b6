"""Prompts as token ids, once per run. Control tokens come from the chat template only, never from a data row.

The template is rendered with a marker in place of each message, so it never sees data. The text between the markers is
the template's. The joined text is encoded as a whole, which gives what the tokenizer gives everywhere else; if that
holds control tokens which the template did not write, template and data are encoded apart, data as ordinary text.
"""

import re
import secrets
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from fastrl.base.types import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = ("auto", "chat", "plain")
# Jinja's trim removes it like any white space, so its absence after rendering tells that the template trims
PAD = "\u2003"
Messages = list[dict[str, str]]


def encode_prompts(
    problems: list[Problem],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    template: str = "auto",
    instruction: str,
    max_prompt_tokens: int,
) -> tuple[list[Problem], list[tuple[str, int]]]:
    """-> the problems that fit, prompt_ids filled in place, and (id, number of tokens) of those that do not.

    template: chat (the tokenizer's own, with the generation prompt), plain (the bare text, after BOS if the tokenizer
    puts one there), auto (chat if there is a template). instruction: appended to the last user message on a new line,
    unless empty. Raises ValueError on a template that cannot be had, DataError if no prompt fits or one has no ids.
    """
    if template not in TEMPLATES:
        raise ValueError(f"--template is {template!r}, expected one of {', '.join(TEMPLATES)}")
    if template == "chat" and not tokenizer.chat_template:
        raise ValueError("--template chat, but the tokenizer has no chat template; use --template plain")
    encoder = Encoder(tokenizer)
    chat = tokenizer.chat_template and template != "plain"
    parts_of, start = (encoder.chat, []) if chat else (encoder.plain, encoder.bos)

    prompts = []
    for problem in problems:
        with naming(problem):
            prompts.append(parts_of(with_instruction(problem.prompt, instruction)))
    joined = encoder.ids_of_all(["".join(part.text for part in parts) for parts in prompts])
    kept, dropped = [], []
    for problem, parts, ids in zip(problems, prompts, joined, strict=True):
        with naming(problem):
            ids = start + encoder.checked(parts, ids)
        if 0 < len(ids) <= max_prompt_tokens:
            problem.prompt_ids = ids
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


@dataclass(frozen=True, slots=True)
class Part:
    text: str
    is_data: bool


@dataclass(frozen=True, slots=True)
class Slot:
    """Where message `index` goes, and how the template trims it there."""

    index: int
    lstrip: bool
    rstrip: bool

    def fill(self, messages: Messages) -> Part:
        text = messages[self.index]["content"]
        text = text.lstrip() if self.lstrip else text
        return Part(text.rstrip() if self.rstrip else text, is_data=True)


class Encoder:
    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.control = control_tokens(tokenizer)  # text -> id
        self.control_ids = set(self.control.values())
        # what the tokenizer may put at the end of a text (EOS) would end the completion before it begins
        empty = tokenizer.encode("")
        self.bos = empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []
        self.skeleton = cache(self.render)
        self.template_ids = cache(self.ids)

    def chat(self, messages: Messages) -> list[Part]:
        skeleton = self.skeleton(tuple(message["role"] for message in messages))
        return [piece.fill(messages) if isinstance(piece, Slot) else piece for piece in skeleton]

    def plain(self, messages: Messages) -> list[Part]:
        """The messages below each other, a blank line between; nothing marks who speaks."""
        others = {message["role"] for message in messages} - {"system", "developer", "user"}
        if others:
            raise DataError(
                f"a conversation with messages of {', '.join(sorted(others))} has no plain form; "
                "use --template chat and a tokenizer with a chat template"
            )
        return [Part("\n\n".join(message["content"] for message in messages), is_data=True)]

    def render(self, roles: tuple[str, ...]) -> list[Part | Slot]:
        """The template's text for messages of these roles, cut where their contents belong."""
        markers = [secrets.token_hex(16) for _ in roles]
        messages = [{"role": r, "content": f"{PAD}{m}{PAD}"} for r, m in zip(roles, markers, strict=True)]
        listed = ", ".join(roles)
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like, mostly about the order of roles
            raise DataError(
                f"the chat template does not take messages of {listed}: {error}; change the row or use --template plain"
            ) from error
        assert isinstance(text, str)  # tokenize=False
        pieces = re.split(f"({PAD}?(?:{'|'.join(markers)}){PAD}?)", text)
        skeleton: list[Part | Slot] = []
        for i, piece in enumerate(pieces):
            if i % 2:
                index = markers.index(piece.strip(PAD))
                skeleton.append(Slot(index, lstrip=not piece.startswith(PAD), rstrip=not piece.endswith(PAD)))
            elif piece:
                skeleton.append(Part(piece, is_data=False))
        lost = set(range(len(roles))) - {piece.index for piece in skeleton if isinstance(piece, Slot)}
        if lost:
            raise DataError(
                f"the chat template leaves out message {min(lost)} of {listed}; change the row or use --template plain"
            )
        return skeleton

    def checked(self, parts: list[Part], ids: list[int]) -> list[int]:
        """Ids of the joined text -> ids of it in which all control tokens are from parts that are not data."""
        wanted = [id for part in parts if not part.is_data for id in self.controls(self.template_ids(part.text))]
        if self.controls(ids) == wanted:
            return ids
        ids = []
        for part in parts:
            ids += self.data_ids(part.text) if part.is_data else self.template_ids(part.text)
        if self.controls(ids) != wanted:
            raise DataError("the tokenizer has no other ids for a control token in this text; delete the row")
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
    them is no mark. Nor is the unknown token: ordinary text may give it.
    """
    source = str(tokenizer.chat_template or "")

    def is_mark(text: str) -> bool:
        return len(text) > 1 and not text.isspace() and text in source

    return {
        token.content: id
        for id, token in tokenizer.added_tokens_decoder.items()
        if id != tokenizer.unk_token_id and (token.special or is_mark(token.content))
    }
