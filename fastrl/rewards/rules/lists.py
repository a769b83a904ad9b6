r"""Lists, tuples, sets: their elements one by one. A bare list is unordered and keeps repetitions; a tuple is in order.

`1; 2 \text{ and } 3` is `1,2,3`, and `\{3,1,2\}` is a set of the same. `16,3,1,1` is not `16,3,1`.
"""

import re
from collections import Counter
from collections.abc import Callable

from fastrl.rewards.rules.quantity import Quantity, quantity, same_quantity
from fastrl.rewards.rules.spelling import unstyled

LISTED = re.compile(r"[(\[][^()\[\]]*[)\]]|\\\{.*\\\}")
WORD = re.compile(r",? ?(?:\\text ?\{ ?(?:and|or) ?\}|(?<![A-Za-z])(?:and|or)(?![A-Za-z])) ?")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
MAX_ELEMENTS = 100


def elements(text: str) -> tuple[str, list[str]]:
    r"""`(1,2]` -> "(]", ["1", "2"]; `1, 2` and `1 \text{ or } 2` -> "", ["1", "2"]; `\{1\}` -> "{}", ["1"].

    With a blank after the commas between elements, one without a blank belongs to a number: `1,234, 5` has two.
    """
    brackets = ""
    if LISTED.fullmatch(text):
        brackets, text = ("{}", text[2:-2]) if text[0] == "\\" else (text[0] + text[-1], text[1:-1])
    if not brackets:
        text = WORD.sub(", ", text)
    if ", " in text:
        text = THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    return brackets, [element.strip() for element in split(text)]


def split(text: str) -> list[str]:
    """At commas and semicolons outside of all brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char in ",;" and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def same_list(gold: str, answer: str, same: Callable[[str, str], bool | None]) -> str | None:
    """Status of a list of numbers or texts against another one; None if it takes more than exact comparison.

    same: whether two texts are equal as words; None if the gold is none.
    """
    (brackets, golds), (other_brackets, answers) = elements(gold), elements(answer)
    repeated = not brackets and len(set(golds)) < len(golds)
    unordered = {"", "{}"}
    if brackets != other_brackets and not {brackets, other_brackets} <= unordered or len(golds) > MAX_ELEMENTS:
        return "wrong" if repeated else None
    if len(golds) < 2 and brackets != "{}":
        return None
    if len(golds) > 1 and not other_brackets and len(answers) > 1 and quantity(answer) is not None:
        return "wrong"  # 1,234 is one number, and no list of two
    if any(same(text, text) is not None for text in golds):
        return (
            words_in_any_order(golds, answers, same) if brackets in unordered else words_in_order(golds, answers, same)
        )
    if len(golds) < 2:
        return None
    quantities = [read for text in golds if (read := quantity(unstyled(text)))]
    others = [read for text in answers if (read := quantity(unstyled(text), lenient=True))]
    if len(quantities) < len(golds) or len(others) < len(answers):
        return ("right" if Counter(golds) == Counter(answers) else "wrong") if repeated else None
    if brackets in unordered:
        order = by_name if named(quantities) and named(others) else by_value
        quantities.sort(key=order)
        others.sort(key=order)
        if order is by_name and [read.name for read in quantities] != [read.name for read in others]:
            return "wrong"
    if len(golds) == len(answers) and all(same_quantity(a, b) for a, b in zip(quantities, others, strict=True)):
        return "right"
    # a set may be given with repetitions, and (1,2) with other brackets: math-verify knows more
    return (
        "wrong" if brackets in ("()", "[]", "(]", "[)") or repeated or not brackets == other_brackets == "{}" else None
    )


def by_value(read: Quantity):
    return read.number.value


def by_name(read: Quantity):
    return read.name, read.number.value


def named(reads: list[Quantity]) -> bool:
    """Whether they are of several variables, `x=1, y=2`; not the roots `x_1=1, x_2=5` of one, which have no order."""
    letters = {read.name and read.name.partition("_")[0] for read in reads}
    return None not in letters and len(letters) > 1


def words_in_order(golds: list[str], answers: list[str], same) -> str:
    if len(golds) != len(answers):
        return "wrong"
    return "right" if all(equal(a, b, same) for a, b in zip(golds, answers, strict=True)) else "wrong"


def words_in_any_order(golds: list[str], answers: list[str], same) -> str:
    if len(golds) != len(answers):
        return "wrong"
    left = list(answers)
    for text in golds:
        found = next((i for i, other in enumerate(left) if equal(text, other, same)), None)
        if found is None:
            return "wrong"
        del left[found]
    return "right"


def equal(gold: str, answer: str, same) -> bool:
    words = same(gold, answer)
    if words is not None:
        return words
    one, other = quantity(unstyled(gold)), quantity(unstyled(answer), lenient=True)
    return unstyled(gold) == unstyled(answer) if one is None or other is None else same_quantity(one, other)
