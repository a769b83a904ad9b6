r"""Answers that look like a gold and are wrong, made by the ways in which answers usually go wrong."""

import re
from decimal import Decimal

NUMBER = re.compile(r"\d*\.?\d+")
FRACTION = re.compile(r"\\d?frac\{([^{}]*)\}\{([^{}]*)\}")
PAIR = re.compile(r"\(([^(),]*),([^(),]*)\)")
VARIABLE = re.compile(r"(?<![A-Za-z\\{])[xyznkabt](?![A-Za-z])")


def perturbed(gold: str, other: str) -> list[str]:
    r"""Wrong answers to a gold; other: another row's gold.

    Nothing that is right after all: no change of a zero, no sign before it (`-0`), no other bracket at infinity, no
    swap of equal parts, nothing that is the gold again.
    """
    wrong = [*numbers(gold), *parts(gold), *expressions(gold)]
    if other != gold:
        wrong.append(other)
    if not re.match(r"-?0(?![.\d])", gold):
        wrong.append(gold[1:] if gold.startswith("-") else f"-{gold}")
    return [text for text in wrong if text and text != gold]


def numbers(gold: str) -> list[str]:
    """The last number + 1, x 10, x 1.001, with two neighbouring digits swapped."""
    found = list(NUMBER.finditer(gold))
    if not found:
        return []
    last, (start, end) = found[-1][0], found[-1].span()
    value = Decimal(last)
    changed = [f"{value + 1:f}"] + ([f"{value * 10:f}", f"{value * Decimal('1.001'):f}"] if value else [])
    for i in range(len(last) - 1):
        if last[i : i + 2].isdigit() and last[i] != last[i + 1]:
            changed.append(last[:i] + last[i + 1] + last[i] + last[i + 2 :])
            break
    return [gold[:start] + text + gold[end:] for text in changed]


def parts(gold: str) -> list[str]:
    """A fraction inverted, an element dropped or added, a pair swapped, a bracket changed."""
    wrong = []
    if (fraction := FRACTION.search(gold)) and fraction[1] != fraction[2]:
        wrong.append(gold.replace(fraction[0], rf"\frac{{{fraction[2]}}}{{{fraction[1]}}}", 1))
    if "," in gold and not re.search(r"\d,\d{3}", gold):
        *kept, last = gold.split(",")
        wrong.append(",".join(kept) + (last[-1] if last[-1:] in list(")]}") else ""))
        wrong.append(f"{gold[:-1]}, 987654{gold[-1]}" if gold[-1] in ")]" else f"{gold}, 987654")
        if gold[0] in "([" and gold[-1] in ")]" and "infty" not in gold:
            wrong.append({"(": "[", "[": "("}[gold[0]] + gold[1:])
    if (pair := PAIR.fullmatch(gold)) and pair[1].strip() != pair[2].strip():
        wrong.append(f"({pair[2]},{pair[1]})")
    return wrong


def expressions(gold: str) -> list[str]:
    """A variable renamed, a pi or a root left out."""
    wrong = [gold.replace(r"\pi", "")] if re.search(r"\\pi(?![A-Za-z])", gold) else []
    if r"\sqrt" in gold:
        wrong.append(gold.replace(r"\sqrt", "", 1))
    if variable := VARIABLE.search(gold):
        wrong.append(re.sub(rf"(?<![A-Za-z\\]){variable[0]}(?![A-Za-z])", "w", gold))
    return wrong
