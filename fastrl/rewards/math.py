r"""`math`: the answer in the last box, compared with the gold. Order of reading, first that decides:

 1  nothing in the box                                                   no_box
 2  the same text, in one spelling (`rules/spelling`)                    right
 3  longer than MAX_LENGTH or deeper than MAX_DEPTH                      too_long
 4  a number, with its unit (`rules/quantity`): then only a number is    right | wrong
 5  digits in a base; a time of day, a residue, a ratio                  right | wrong
 6  lists, tuples and sets of numbers and texts (`rules/lists`)          right | wrong
 7  a text; an angle, a segment, a triangle (`rules/words`)              right | wrong
 8  all else by math-verify, in processes that can be killed             its status

Before 8 units are converted (`rules/measured`), inequalities become intervals (`rules/intervals`) and vectors tuples
(`rules/columns`), and names that math-verify confuses become different ones (`rules/names`). It compares by `equality`.
Steps 1 to 7 decide most answers, in microseconds and exactly; text written by a model can make sympy run for hours.
"""

import re
import signal
from collections.abc import Sequence
from pathlib import Path

from fastrl.rewards.base import Grade, Verifier, require_equal_lengths
from fastrl.rewards.boxes import last_box
from fastrl.rewards.rules.bases import based, in_ten, same_digits
from fastrl.rewards.rules.columns import as_tuples
from fastrl.rewards.rules.intervals import as_intervals
from fastrl.rewards.rules.lists import THOUSANDS, same_list
from fastrl.rewards.rules.measured import in_one_unit, resolved, turns_into, without_percent
from fastrl.rewards.rules.names import told_apart
from fastrl.rewards.rules.quantity import SWAPPED, quantity, same_quantity
from fastrl.rewards.rules.ratios import same_ratio, same_residue, same_time
from fastrl.rewards.rules.spelling import clean, spell, unstyled
from fastrl.rewards.rules.words import same_shape, same_words, without_label
from fastrl.rewards.workers import Workers

MAX_LENGTH = 512  # characters of an answer that sympy reads
MAX_DEPTH = 24  # of brackets in it

UNEVALUATED = re.compile(r"\\(?:log|ln|sum|prod|int|lim|[dt]?binom|gcd|lcm|max|min|mod|bmod|pmod)(?![A-Za-z])|(?<!\\)!")
OUTER_BLANK = re.compile(r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) ")
NEGATED = re.compile(r"(?<![A-Za-z\\])(?:not|never|except|without)(?![A-Za-z])")
BRACKETS = frozenset("([{")
KINDS = (same_time, same_residue, same_ratio)


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
    model should have computed. See `rules/quantity` for what is a number.
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
        pairs = [(spell(gold), self.extract(text)) for text, gold in zip(completions, answers, strict=True)]
        return self.grade_pairs([(gold, None if found is None else spell(found)) for gold, found in pairs])

    def check_golds(self, answers: list[str]) -> list[Grade]:
        """Like grading each gold in a box, but equal text is not enough: a rule or math-verify must be able to read it.

        What ran out of time is asked once more: a long formula takes a process a second at first and then a
        millisecond, and which problems a run keeps should not depend on what else the machine does.
        """
        pairs = [(gold, gold) for gold in map(spell, answers)]
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
        read = None if too_complex(found) else quantity(found, lenient=True)
        return canonical(found) if read is None else str(read.number.value)

    def as_completion(self, answer: str) -> str:
        return f"\\boxed{{{answer}}}"

    def unevaluated(self, answer: str, gold: str) -> bool:
        return bool(UNEVALUATED.search(answer)) and not UNEVALUATED.search(gold)

    def close(self) -> None:
        self.workers.close()

    def grade_pairs(self, pairs: Sequence[tuple[str, str | None]], equal_text: bool = True) -> list[Grade]:
        """Pairs of a gold and an answer as `spell` leaves them."""
        decided = {pair: self.decide(*pair, equal_text) for pair in dict.fromkeys(pairs)}
        # each different pair once: a group often agrees on its answer
        hard = [read for read in dict.fromkeys(decided.values()) if isinstance(read, tuple)]
        replies = dict(zip(hard, self.workers.run(hard), strict=True))
        statuses = (decided[pair] for pair in pairs)
        return [Grade.of(replies[read] if isinstance(read, tuple) else read) for read in statuses]

    def decide(self, gold: str, found: str | None, equal_text: bool) -> str | tuple[str, str]:
        """Status of an answer, or the pair that math-verify is to compare; in the order above."""
        if not found or not gold:
            return "no_box"
        plain_gold, plain = unstyled(gold), unstyled(found)
        if equal_text and canonical(plain) == canonical(plain_gold):
            return "right"
        if too_complex(gold) or too_complex(found):
            return "too_long"
        status = self.decide_exactly(plain_gold, plain)
        if status is None:
            status = status_of(kind_of_text(gold, found))
        return status or for_math_verify(plain_gold, plain)

    def decide_exactly(self, gold: str, found: str) -> str | None:
        digits = based(gold)
        if digits is not None and digits.base != 10:
            return status_of(same_digits(digits, found))
        other_base = based(found)
        gold, found = in_ten(gold), in_ten(found)
        gold_quantity = quantity(gold)
        if gold_quantity is not None:
            answer = quantity(without_label(found), lenient=True, in_unit=gold_quantity.unit)
            if answer is not None:
                return status_of(same_name(gold_quantity.name, answer.name) and same_quantity(gold_quantity, answer))
            if other_base is not None or self.numeric_only and not turns_into(gold_quantity.unit, found):
                return "wrong"
            return None
        for same in KINDS:
            if (decided := same(gold, found)) is not None:
                return status_of(decided)
        return same_list(gold, found, same_words)


def status_of(same: bool | None) -> str | None:
    return None if same is None else "right" if same else "wrong"


def kind_of_text(gold: str, found: str) -> bool | None:
    same = same_shape(gold, found)
    return same_words(gold, found) if same is None else same


def same_name(gold: str | None, answer: str | None) -> bool:
    """`x = 5` is 5 and `5` is `x = 5`; `y = 5` is not `x = 5`."""
    return gold is None or answer is None or gold.replace(" ", "") == answer.replace(" ", "")


def for_math_verify(gold: str, found: str) -> str | tuple[str, str]:
    """The pair that math-verify is to compare, or "wrong" where units differ or one side says `not`."""
    if bool(NEGATED.search(gold)) != bool(NEGATED.search(found)):
        return "wrong"  # math-verify reads no words
    gold, found = without_label(gold), without_label(found)
    if "=" not in gold and (swapped := SWAPPED.fullmatch(found)):
        found = swapped["value"]
    pair = in_one_unit(resolved(without_percent(gold, found)), resolved(found))
    return "wrong" if pair is None else told_apart(*as_intervals(*as_tuples(*pair)))


def canonical(text: str) -> str:
    r"""A spelled text without blanks and commas that do not matter, for comparison as text.

    Blanks stay between letters and digits: neither `4 2` and `42` nor `\sin x` and `\sinx` are the same. `1,234` is one
    number, `1, 234` are two.
    """
    if BRACKETS.isdisjoint(text):
        text = THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    return OUTER_BLANK.sub("", text)
