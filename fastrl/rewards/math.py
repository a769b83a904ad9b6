r"""`math`: the last balanced \boxed{...} of the text, compared with the gold as text, as a number, then by math-verify.

Most answers are decided here, in microseconds and exactly. The rest goes to processes that can be killed (`workers`),
because text written by a model can make sympy run for hours.
"""

import re
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fastrl.rewards.base import Grade, Verifier, require_equal_lengths
from fastrl.rewards.literal import clean, literal, same_number
from fastrl.rewards.workers import Workers

TAIL = 65536  # characters of the text that are searched for a box, from the end
MAX_LENGTH = 512  # characters of an answer that sympy reads
MAX_DEPTH = 24  # of brackets in it

# `\\` and `\{` are one token each, so that neither opens or closes anything; `\\boxed` is a box all the same
BOX_TOKEN = re.compile(r"\\boxed(?![A-Za-z])\s*\{|\\boxed\s+(?P<bare>[^\s{}$\\]+)|\\(?!\\boxed)[\\{}]|[{}]")
BASED = re.compile(r"(?P<digits>\d[0-9A-Z]*)_(?:\{(?P<braced>[2-9]|[1-3]\d)\}|(?P<base>[2-9]))", re.ASCII)
LISTED = re.compile(r"[(\[][^()\[\]]*[)\]]")
UNEVALUATED = re.compile(r"\\(?:log|ln|sum|prod|int|lim|[dt]?binom|gcd|lcm|max|min|mod|bmod|pmod)(?![A-Za-z])|(?<!\\)!")
OUTER_BLANK = re.compile(r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) ")
FRACTION_STYLE = re.compile(r"\\[dtc]frac(?![A-Za-z])")


def last_box(text: str) -> str | None:
    r"""Content of the last balanced \boxed{...} or `\boxed 6`, else None; one pass over the last TAIL characters."""
    text = text[-TAIL:]
    if "\\boxed" not in text:
        return None
    start, found = -1, None
    open_braces: list[tuple[int, int] | None] = []  # of a box: where it and its content start
    for token in BOX_TOKEN.finditer(text, text.index("\\boxed")):
        if token["bare"]:
            if token.start() > start:
                start, found = token.start(), token["bare"].rstrip(".,;:")
        elif token[0] == "}":
            box = open_braces.pop() if open_braces else None
            if box is not None and box[0] > start:
                start, found = box[0], text[box[1] : token.start()]
        elif token[0][-1] == "{" and token[0] != "\\{":
            open_braces.append((token.start(), token.end()) if token[0] != "{" else None)
    return None if found is None else found.strip()


def too_complex(text: str) -> bool:
    """Longer than MAX_LENGTH or with brackets deeper than MAX_DEPTH: out of reach of sympy's parser in useful time."""
    depth = 0
    for char in text[: MAX_LENGTH + 1]:
        depth += (char in "([{") - (char in ")]}")
        if depth > MAX_DEPTH:
            return True
    return len(text) > MAX_LENGTH


class Math(Verifier):
    r"""math-verify 0.9.0 behind a box, an exact comparison and limits.

    numeric_only: with a number as the gold, only a number counts: neither `6*7` nor `\sum_{i=1}^{100} i` earns what the
    model should have computed. See `literal` for what is a number.
    """

    name = "math"
    instruction = "Work it out step by step and end with the final answer, and nothing else, in \\boxed{}."

    def __init__(
        self,
        *,
        workers: int = 2,  # processes at most; they start with the first answer that needs sympy
        numeric_only: bool = True,
        cpu_s: float = 1.0,  # CPU time to read the gold, and again to read the answer and compare them
        kill_cpu_s: float = 2.0,  # CPU time of either after which the process is killed
        wall_s: float = 30.0,  # wall time per answer; only for a process that does not run at all
        memory_mib: int = 1024,  # address space of a process
    ):
        self.numeric_only = numeric_only
        self.workers = Workers(
            str(Path(__file__).with_name("math_worker.py")),
            [memory_mib, cpu_s, kill_cpu_s],
            count=workers,
            wall_s=wall_s,
            kill_signal=signal.SIGVTALRM,
        )

    def grade(self, completions: list[str], answers: list[str]) -> list[Grade]:
        require_equal_lengths("math.grade", completions=completions, answers=answers)
        pairs = [(clean(gold), self.extract(text)) for text, gold in zip(completions, answers, strict=True)]
        return self.grade_pairs([(gold, None if found is None else clean(found)) for gold, found in pairs])

    def check_golds(self, answers: list[str]) -> list[Grade]:
        """Like grading each gold in a box, but equal text is not enough: math-verify must be able to read it.

        What ran out of time is asked once more: a long formula takes a process a second at first and then a
        millisecond, and which problems a run keeps should not depend on what else the machine does.
        """
        pairs = [(gold, gold) for gold in map(clean, answers)]
        grades = self.grade_pairs(pairs, equal_text=False)
        late = [i for i, grade in enumerate(grades) if grade.status == "soft_timeout"]
        for i, grade in zip(late, self.grade_pairs([pairs[i] for i in late], equal_text=False), strict=True):
            grades[i] = grade
        return grades

    def extract(self, completion: str) -> str | None:
        return last_box(completion)

    def vote_key(self, completion: str) -> str | None:
        found = clean(last_box(completion) or "")
        if not found:
            return None
        value = None if too_complex(found) else literal(found, lenient=True)
        return canonical(found) if value is None else str(value.value)

    def as_completion(self, answer: str) -> str:
        return f"\\boxed{{{answer}}}"

    def unevaluated(self, answer: str, gold: str) -> bool:
        return bool(UNEVALUATED.search(answer)) and not UNEVALUATED.search(gold)

    def close(self) -> None:
        self.workers.close()

    def grade_pairs(self, pairs: Sequence[tuple[str, str | None]], equal_text: bool = True) -> list[Grade]:
        statuses = [self.decide(gold, found, equal_text) for gold, found in pairs]
        # each different pair once: a group often agrees on its answer
        hard = list(dict.fromkeys(pair for pair, status in zip(pairs, statuses, strict=True) if status is None))
        replies = dict(zip(hard, self.workers.run(hard), strict=True))
        return [Grade.of(status or replies[pair]) for pair, status in zip(pairs, statuses, strict=True)]

    def decide(self, gold: str, found: str | None, equal_text: bool) -> str | None:
        """Status of a cleaned answer, or None if it needs math-verify."""
        if not found or not gold:
            return "no_box"
        if equal_text and canonical(found) == canonical(gold):
            return "right"
        if too_complex(gold) or too_complex(found):
            return "too_long"
        gold_number = literal(gold)
        if gold_number is not None:
            answer_number = literal(found, lenient=True)
            if answer_number is not None:
                return "right" if same_number(gold_number, answer_number) else "wrong"
            if self.numeric_only or BASED.fullmatch(found):
                return "wrong"
        if base := BASED.fullmatch(gold):
            return "right" if same_digits(base, found) else "wrong"
        return same_list(gold, found)


def canonical(text: str) -> str:
    r"""A cleaned text with one spelling of what has several, for comparison as text.

    Blanks stay between letters and digits: neither `4 2` and `42` nor `\sin x` and `\sinx` are the same.
    """
    return OUTER_BLANK.sub("", FRACTION_STYLE.sub(r"\\frac", text))


def same_digits(gold: re.Match, found: str) -> bool:
    """Whether an answer to `52_8` is `52_8`, or the same digits without a base, which the problem has named."""
    answer = BASED.fullmatch(found)
    if answer is None:
        return found == gold["digits"]
    base = gold["braced"] or gold["base"]
    return answer["digits"] == gold["digits"] and base == (answer["braced"] or answer["base"])


def same_list(gold: str, found: str) -> str | None:
    """Status of a list, tuple or interval of numbers against another one; None if it takes more than exact numbers.

    A bare list is unordered and keeps its repetitions, which math-verify would read as a set.
    """
    (brackets, golds), (answer_brackets, answers) = elements(gold), elements(found)
    repeated = not brackets and len(set(golds)) < len(golds)
    if len(golds) < 2 or brackets != answer_brackets:
        return "wrong" if repeated else None
    gold_numbers = [number for text in golds if (number := literal(text)) is not None]
    numbers = [number for text in answers if (number := literal(text, lenient=True)) is not None]
    if len(gold_numbers) < len(golds) or len(numbers) < len(answers):
        return ("right" if Counter(golds) == Counter(answers) else "wrong") if repeated else None
    if not brackets:
        gold_numbers.sort(key=lambda number: number.value)
        numbers.sort(key=lambda number: number.value)
    if len(golds) == len(answers) and all(map(same_number, gold_numbers, numbers)):
        return "right"
    return "wrong" if brackets or repeated else None


def elements(text: str) -> tuple[str, list[str]]:
    """`(1,2]` -> "(]", ["1", "2"], and `1,2` -> "", ["1", "2"]."""
    brackets = ""
    if LISTED.fullmatch(text):
        brackets, text = text[0] + text[-1], text[1:-1]
    return brackets, [element.strip() for element in text.split(",")]
