r"""Expressions that end in a unit, a percent sign or a scale word: `2\pi\text{ cm}^2`, `\$3\sqrt{2}`, `\sqrt{2}\%`.

math-verify drops such an end unread. Here both sides lose it together, or become one and the same unit.
"""

import re

from fastrl.rewards.rules import units
from fastrl.rewards.rules.quantity import CURRENCY, SCALE, SCALES
from fastrl.rewards.rules.spelling import TEXT_COMMAND
from fastrl.rewards.rules.units import Unit

MARKED = TEXT_COMMAND + r" ?\{[^{}]*\}(?: ?\^ ?(?:\{ ?-?\d ?\}|\d))?"
END = re.compile(rf"(?P<expression>[^ ].*?)(?P<end>(?:[ /]*(?:\\cdot ?)?(?:{MARKED}|\^\\circ(?: ?[CF])?))+)")
PERCENT = re.compile(r"(?P<expression>.*?) ?\\?%")


def in_one_unit(gold: str, answer: str) -> tuple[str, str] | None:
    r"""The pair without units, the answer in the gold's unit; None if they cannot be equal.

    `20\pi`, `20\pi\text{ cm}^2` -> `20\pi`, `20\pi`. `\pi\text{ m}`, `100\pi\text{ cm}` -> `\pi`,
    `\frac{1}{100}\cdot\pi^{0}\cdot(100\pi)`.
    """
    expression, unit, end = parts(gold)
    other, other_unit, other_end = parts(answer)
    if unit is not None and other_unit is not None:
        factor = units.ratio(unit, other_unit)
        if factor is None:
            return None
        (by, turns) = factor
        if by != 1 or turns:
            other = rf"\frac{{{by.numerator}}}{{{by.denominator}}}\cdot\pi^{{{turns}}}\cdot({other})"
        return expression, other
    if end and other_end and unit is None and other_unit is None and end.casefold() != other_end.casefold():
        return None
    return (expression if unit else gold, other if other_unit else answer) if unit or other_unit else (gold, answer)


def turns_into(gold: Unit | None, answer: str) -> bool:
    r"""Whether an answer is an expression in radians where the gold is in degrees: `\frac{\pi}{3}\text{ radians}`."""
    _, unit, _ = parts(answer)
    return (
        gold is not None and unit is not None and unit.radians != gold.radians and units.ratio(gold, unit) is not None
    )


def without_percent(gold: str, answer: str) -> str:
    r"""A gold without its percent sign where the answer has none: the problem asks for percent: `12.5\%`, `12.5`."""
    percent = PERCENT.fullmatch(gold)
    return percent["expression"] if percent and not PERCENT.fullmatch(answer) else gold


def parts(text: str) -> tuple[str, Unit | None, str]:
    """Expression, unit, and what stands at the end as text."""
    if money := CURRENCY.match(text):
        return money["sign"] + text[money.end() :], units.parse(money["code"]), money["code"]
    match = END.fullmatch(text)
    if match is None:
        return text, None, ""
    return match["expression"], units.parse(match["end"]), " ".join(units.TEXT.sub(r" \1 ", match["end"]).split())


def resolved(text: str) -> str:
    r"""Percent signs and scale words of an expression, multiplied: `\sqrt{2}\%` -> `\frac{1}{100}\cdot(\sqrt{2})`."""
    if percent := PERCENT.fullmatch(text):
        return rf"\frac{{1}}{{100}}\cdot({percent['expression']})"
    match = END.fullmatch(text)
    scale = SCALE.fullmatch(match["end"]) if match else None
    if match is None or scale is None:
        return text
    factor = SCALES[scale["word"].lower()]
    return rf"{factor.numerator}\cdot({match['expression']})" if factor.denominator == 1 else text
