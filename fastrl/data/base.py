"""Rows of any known shape -> Problems. Rows are data: nothing in them is ever a format string or a template.

    prompt + answer                                      fastrl
    prompt + solution | ground_truth | label | target    TRL
    prompt + reward_model.ground_truth                   verl
    messages + ground_truth                              open-instruct
    question + answer (the text after ####)              GSM8K as published
    problem + solution (its last \\boxed{})               MATH as published

A row that cannot be used is listed and left out; too many of them end the run.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

from fastrl.base.types import DataError, Problem
from fastrl.rewards.math import Math

BOXED_INSTRUCTION = Math.instruction
MAX_ROW_BYTES = 1_000_000
MAX_BAD_FRAC = 0.05
ROLES = ("system", "developer", "user", "assistant", "tool")
EXPECTED = (
    'expected an object with "prompt" (text or chat messages) and "answer" (text or a number), '
    "or the columns of TRL, verl, open-instruct, GSM8K or MATH"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    file: str
    line: int  # from 1; the row number where the file has no lines
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(slots=True, kw_only=True)
class Loaded:
    problems: list[Problem]
    bad_rows: list[BadRow]
    mapping: str  # which columns became prompt and answer, for the start-up screen
    excluded: dict[str, list[str]]  # id -> reasons, of the rows left out on purpose
    source: str = ""  # repository, commit and file, of what the hub has given


class Dataset(Protocol):
    """What a member of DATASETS offers."""

    @property
    def name(self) -> str: ...

    @property
    def default_reward(self) -> str: ...

    @property
    def default_instruction(self) -> str:
        """Appended to the prompt unless the user gives another; may be empty."""
        ...

    def load(self, split: str, data_dir: str) -> Loaded: ...


class Source(Protocol):
    """A generator of problems, such as Arithmetic."""

    @property
    def name(self) -> str: ...

    def load(self, split: str) -> list[Problem]: ...


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A data set that needs no file."""

    source: Source
    default_reward: str
    default_instruction: str = ""

    @property
    def name(self) -> str:
        return self.source.name

    def load(self, split: str, data_dir: str = "") -> Loaded:
        return Loaded(problems=self.source.load(split), bad_rows=[], mapping="generated", excluded={})


def problems_from_rows(
    rows: Iterable[tuple[str, int, object]], source: str, exclude: Mapping[str, list[str]] | None = None
) -> Loaded:
    """(file name, line, row or the DataError met while reading it) -> problems, with ids of `exclude` left out.

    Raises DataError when more than MAX_BAD_FRAC of the rows are bad, or none is good.
    """
    exclude = exclude or {}
    problems, bad_rows, excluded, mappings, lines = [], [], {}, Counter(), {}
    for file, line, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            columns = check_row(row)
            id = row_id(columns, f"{file}:{line}")
            if id in exclude:
                excluded[id] = exclude[id]
                continue
            problem, mapping = convert_row(columns, id)
            if id in lines:
                raise DataError(f"id {id!r} is already used by {lines[id]}")
        except DataError as error:
            bad_rows.append(BadRow(file=file, line=line, reason=str(error)))
            continue
        lines[id] = f"{file}:{line}"
        mappings[mapping] += 1
        problems.append(problem)

    total = len(problems) + len(bad_rows)
    if len(bad_rows) > MAX_BAD_FRAC * total or not problems:
        shown = "".join(f"\n  {row}" for row in bad_rows[:5])
        more = f"\n  and {len(bad_rows) - 5} more" if len(bad_rows) > 5 else ""
        raise DataError(
            f"{source}: {len(bad_rows)} of {total} rows cannot be used (at most {MAX_BAD_FRAC:.0%} may be bad, "
            f"and at least one must be good); {EXPECTED}. Correct or delete these rows:{shown}{more}"
        )
    several = len(mappings) > 1
    mapping = ", ".join(f"{name} ({count} rows)" if several else name for name, count in mappings.most_common())
    return Loaded(problems=problems, bad_rows=bad_rows, mapping=mapping, excluded=excluded)


def check_row(row: object) -> dict:
    """The row. Raises DataError unless it is an object of at most MAX_ROW_BYTES that can be stored and displayed."""
    if not isinstance(row, dict):
        raise DataError(f"the row is {describe(row)}; {EXPECTED}")
    num_bytes = 0
    pending: list[object] = [row]  # a stack, because hostile rows nest deeper than Python recurses
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.keys()
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value
        elif isinstance(value, str):
            if "\0" in value:
                raise DataError("the text contains a NUL character")
            try:
                num_bytes += len(value.encode())
            except UnicodeEncodeError:
                raise DataError("the text contains a lone surrogate, which is no character") from None
        else:
            num_bytes += len(value) if isinstance(value, bytes) else 1
        if num_bytes > MAX_ROW_BYTES:
            raise DataError(f"the row is larger than {MAX_ROW_BYTES} bytes")
    return row


def row_id(row: dict, fallback: str) -> str:
    own = row.get("id")
    if isinstance(own, int) and not isinstance(own, bool):
        return str(own)
    if not isinstance(own, str) or not own:
        return fallback
    if not own.isprintable():  # ids go to logs and to the terminal
        raise DataError(f"the id {own!r:.100} has characters that cannot be displayed")
    return own


def convert_row(row: dict, id: str) -> tuple[Problem, str]:
    """-> the problem and the name of the mapping. The source columns of TRL, verl and MATH golds stay in `columns`,
    because reward functions written for those ask for them by name."""
    columns = {key: value for key, value in row.items() if key not in ("id", "answer")}
    if "prompt" in row:
        prompt = columns.pop("prompt")
        key = first_of(row, "answer", "solution", "ground_truth", "label", "target")
        reward_model = row.get("reward_model")
        if key == "answer":
            mapping, gold = "fastrl: prompt + answer", row[key]
        elif key == "solution" and isinstance(row[key], str) and "\\boxed" in row[key]:
            mapping, gold = "TRL: prompt + last \\boxed{} of solution", last_boxed(row[key])
        elif key:
            mapping, gold = f"TRL: prompt + {key}", row[key]
        elif isinstance(reward_model, dict) and "ground_truth" in reward_model:
            columns["ground_truth"] = reward_model["ground_truth"]
            mapping, gold = "verl: prompt + reward_model.ground_truth", only(reward_model["ground_truth"])
        else:
            raise DataError(f"there is a prompt but no answer among the columns {names(row)}; {EXPECTED}")
    elif "messages" in row and "ground_truth" in row:
        prompt, gold = columns.pop("messages"), only(row["ground_truth"])
        mapping = "open-instruct: messages + ground_truth"
        # these rows may carry the completion of the supervised stage
        if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
            prompt = prompt[:-1] if prompt[-1].get("role") == "assistant" else prompt
    elif "question" in row and "answer" in row:
        prompt, mapping, gold = columns.pop("question"), "question + answer", row["answer"]
        if isinstance(gold, str) and "####" in gold:
            mapping, gold = "GSM8K: question + answer after ####", gold.rpartition("####")[2].replace(",", "")
        elif isinstance(gold, str) and "\n" in gold.strip():
            raise DataError("answer has several lines and no `#### <result>` at its end")
    elif "problem" in row and "answer" in row:
        prompt, mapping, gold = columns.pop("problem"), "problem + answer", row["answer"]
    elif "problem" in row and "solution" in row:
        prompt, mapping = columns.pop("problem"), "MATH: problem + last \\boxed{} of solution"
        gold = last_boxed(row["solution"])
    else:
        raise DataError(f"the columns are {names(row)}; {EXPECTED}")
    return Problem(id=id, prompt=check_prompt(prompt), answer=answer_text(gold), columns=columns), mapping


def check_prompt(prompt: object) -> str | list[dict[str, str]]:
    """Text, or messages reduced to role and content. Raises DataError on anything else."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError("the prompt is empty")
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise DataError(f"the prompt is {describe(prompt)}, expected text or a list of messages")
    messages = []
    for i, message in enumerate(prompt):
        if not isinstance(message, dict):
            raise DataError(f"message {i} of the prompt is {describe(message)}, expected an object")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(f"message {i} of the prompt has the role {role!r:.50}, expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"message {i} of the prompt has content {describe(content)}, expected text")
        others = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
        if others:
            raise DataError(f"message {i} of the prompt also has {names(others)}, expected only role and content")
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] == "assistant":
        raise DataError("the prompt ends with an assistant message; the model could only continue after a user message")
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        raise DataError("the prompt has no user message with text")
    return messages


def answer_text(gold: object) -> str:
    """Text or a finite number -> the gold text; 72 -> "72", 72.0 -> "72", 1e-05 -> "0.00001". Else DataError."""
    if isinstance(gold, int) and not isinstance(gold, bool):
        return str(gold)
    if isinstance(gold, float | Decimal) and math.isfinite(gold):
        # never 1e-05: a grader for mathematics reads that as a product with Euler's number
        text = format(Decimal(repr(gold)) if isinstance(gold, float) else gold, "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    if not isinstance(gold, str):
        raise DataError(f"the answer is {describe(gold)}, expected text or a finite number")
    if not gold.strip():
        raise DataError("the answer is empty")
    return gold.strip()


def last_boxed(text: object) -> str:
    """The content of the last \\boxed{...} of a reference solution, braces balanced. Raises DataError without one."""
    if not isinstance(text, str):
        raise DataError(f"solution is {describe(text)}, expected text")
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        raise DataError("solution has no \\boxed{}")
    rest = text[start:].partition("box")[2].removeprefix("ed").lstrip()
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest, maxsplit=1)[0]  # TeX takes the next token, as in \boxed 5
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return rest[1 : brace.start()]
    raise DataError("the last \\boxed{ of solution is not closed")


def first_of(row: dict, *keys: str) -> str | None:
    """The first key the row has, whatever its value: where `answer` is null, a 0/1 `label` beside it is no gold."""
    return next((key for key in keys if key in row), None)


def only(gold: object) -> object:
    """verl and open-instruct also write a single gold as a list of one."""
    return gold[0] if isinstance(gold, list) and len(gold) == 1 else gold


def names(keys: Iterable) -> str:
    listed = ", ".join(key if isinstance(key, str) and key.isprintable() else repr(key) for key in keys)
    return (listed if len(listed) <= 200 else listed[:200] + "...") or "(none)"


def describe(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, str | list | dict) and not value:
        return f"an empty {type(value).__name__}"
    return f"of type {type(value).__name__}"
