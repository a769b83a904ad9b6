"""What a chat template writes for messages, and which pieces of that are a row's own.

Templates read what they are given: they cut thoughts out of earlier turns, look for switches such as /no_think, trim.
So the real messages are rendered. Where that gives the text of the same roles with the contents put in, which holds for
most rows, template and contents are told apart by that. Elsewhere the row's look-alikes of control tokens are told from
the template's own by rendering once more, with unguessable marks at every character that may begin one.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from fastrl.base.names import did_you_mean
from fastrl.base.types import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Jinja's trim removes it like any white space, so its absence after rendering tells that the template trims
PAD = "\u2003"
Messages = list[dict[str, str]]
# what fastrl decides itself, or what would not be a prompt's text any more
RESERVED = {
    "messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}  # fmt: skip
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)  # as JSON has it: 02 is text
WORDS = {"true": True, "false": False, "none": None, "null": None}


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


# the blanks before a character that may begin a control token, it, and its mark -> what the template is given instead
Way = Callable[[str, str, str], str]


def before(blanks: str, first: str, mark: str) -> str:
    return blanks + mark + first


def before_blanks(blanks: str, first: str, mark: str) -> str:
    """For a template that trims there. Twice the blanks: once are what the template writes after it has trimmed."""
    return mark + 2 * blanks + first


def in_place(blanks: str, first: str, mark: str) -> str:
    return blanks + mark


WAYS: tuple[Way, ...] = (before, before_blanks, in_place)


def template_arguments(given: Iterable[str]) -> dict[str, Any]:
    """["enable_thinking=false", "budget=512"] -> {"enable_thinking": False, "budget": 512}.

    A value is true, false, none, a number, JSON that begins with a bracket, a brace or a quote, else text. Raises
    ValueError on what has no such form, a name given twice, or one that is fastrl's to set.
    """
    arguments: dict[str, Any] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--template-args {each!r:.100}: expected NAME=VALUE, such as enable_thinking=false")
        if name in RESERVED:
            raise ValueError(f"--template-args {each!r:.100}: {name} is set by fastrl; leave it out")
        if name in arguments:
            raise ValueError(f"--template-args: {name} is given twice; leave one of them out")
        arguments[name] = typed(value, each)
    return arguments


def typed(value: str, given: str) -> object:
    if value.lower() in WORDS:
        return WORDS[value.lower()]
    if not NUMBER.fullmatch(value) and value[:1] not in ("[", "{", '"'):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--template-args {given!r:.100}: the value begins as JSON and is none: {error}") from error


class ChatTemplate:
    """The template of a tokenizer, with the generation prompt. control: texts of the control tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", control: Iterable[str], arguments: Mapping[str, Any]):
        self.tokenizer, self.arguments = tokenizer, arguments
        texts = sorted((text for text in control if text), key=len, reverse=True)
        self.controls = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self.firsts = "".join(sorted({text[0] for text in texts}))
        self.skeleton = cache(self.find_skeleton)
        source = str(tokenizer.chat_template)
        for name in arguments:
            if not re.search(rf"\b{re.escape(name)}\b", source):
                words = set(re.findall(r"[A-Za-z_]\w+", source))
                raise ValueError(
                    f"--template-args {name}: the chat template reads nothing of this name"
                    f"{did_you_mean(name, words) or '; leave it out'}"
                )

    def write(self, messages: Messages) -> str:
        """The text for these messages. Raises DataError where the template does not take them."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self.arguments
            )
        except Exception as error:  # templates raise what they like, mostly about the order of roles
            listed = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"the chat template does not take messages of {listed}: {error}; change the row or use --template plain"
            ) from error
        assert isinstance(text, str)  # tokenize=False
        return text

    def parts(self, messages: Messages) -> tuple[list[Part], bool]:
        """-> parts whose joined text is the prompt, and whether that is what the template writes for the messages.

        It is not where the template itself reads what looks like a control token, in a way that cannot be followed:
        then the contents stand in the prompt as they are in the row.
        """
        skeleton = self.skeleton(tuple(message["role"] for message in messages))
        filled = [piece.fill(messages) if isinstance(piece, Slot) else piece for piece in skeleton]
        text = self.write(messages)
        is_filled = "".join(part.text for part in filled) == text
        looks_alike = sum(len(self.controls.findall(part.text)) for part in filled if part.is_data)
        if is_filled and not looks_alike:
            return filled, True
        own = self.told_apart(messages, text)
        # a template that takes a thought apart and writes it again gives the same text, but the marks are its own
        if own and not (is_filled and looks_alike == sum(part.is_data for part in own)):
            return own, True
        return filled, is_filled

    def find_skeleton(self, roles: Sequence[str]) -> list[Part | Slot]:
        """The template's text for messages of these roles, cut where their contents belong."""
        markers = [secrets.token_hex(16) for _ in roles]
        text = self.write([{"role": r, "content": f"{PAD}{m}{PAD}"} for r, m in zip(roles, markers, strict=True)])
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
                f"the chat template leaves out message {min(lost)} of {', '.join(roles)}; change the row or use "
                "--template plain"
            )
        return skeleton

    def told_apart(self, messages: Messages, text: str) -> list[Part] | None:
        """`text` in parts, of which those are data that look like control tokens and come from the contents.

        None where no way of marking leaves what the template does unchanged.
        """
        if not self.firsts or not any(set(self.firsts) & set(message["content"]) for message in messages):
            return [Part(text, is_data=False)]
        marks = {first: secrets.token_hex(16) for first in self.firsts}
        found = re.compile(f"(\\s*)([{re.escape(self.firsts)}])")
        for way in WAYS:

            def marked(match: re.Match, way: Way = way) -> str:
                return way(match[1], match[2], marks[match[2]])

            written = [message | {"content": found.sub(marked, message["content"])} for message in messages]
            try:
                undone, starts = undo(self.write(written), marks, way)
            except DataError:
                continue
            if undone == text:
                return self.cut_at(text, starts)
        return None

    def cut_at(self, text: str, starts: set[int]) -> list[Part]:
        """The text, with the control tokens that begin at one of `starts` as parts of their own."""
        parts, end = [], 0
        for match in self.controls.finditer(text):
            if match.start() in starts:
                parts += [Part(text[end : match.start()], is_data=False), Part(match[0], is_data=True)]
                end = match.end()
        return [part for part in [*parts, Part(text[end:], is_data=False)] if part.text]


def undo(written: str, marks: dict[str, str], way: Way) -> tuple[str, set[int]]:
    """-> the text without marks, and where characters stand in it that the contents have, and not the template."""
    first_of = {mark: first for first, mark in marks.items()}
    pieces = re.split(f"({'|'.join(first_of)})", written)
    undone, starts = pieces[0], set()
    for mark, following in zip(pieces[1::2], pieces[2::2], strict=True):
        first = first_of[mark]
        blanks = following[: len(following) - len(following.lstrip())]
        half = blanks[: len(blanks) // 2]
        if way is in_place:
            following = first + following
            starts.add(len(undone))
        elif way is before and following[:1] == first:
            starts.add(len(undone))
        elif way is before_blanks and blanks == 2 * half and following[len(blanks) : len(blanks) + 1] == first:
            following = following[len(half) :]
            starts.add(len(undone) + len(half))
        undone += following  # what else is behind a mark is the template's: it has cut the character off
    return undone, starts
