r"""Numbers as people write them in LaTeX, read exactly and in bounded time: no sympy, no float.

18   -3.50   1,000   \frac{1}{3}   -\frac12   \frac{1}{-2}   3\frac{1}{2}   3 1/2   7/8
4.5 \times 10^{33}   10^{-5}   2e9   0.1\overline{6}   0.\dot{1}4285\dot{7}   0.333\ldots
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from fastrl.rewards.exact import DECIMAL, decimal, number

MAX_EXPONENT = 1000  # of ten; beyond it a short text would become a number of many kilobytes
ROUNDED_DECIMALS = 6  # a decimal stands for a fraction if it has this many decimals and digits, all of them correct

BRACED = rf"\{{ ?[+-]?{DECIMAL} ?\}}"
POWER = r"10 ?\^ ?(?:\{ ?[+-]?\d{1,4} ?\}|\d)"
RECURRING = (
    r"(?P<start>\d{1,40})?\.(?P<once>\d{0,40})"
    r"(?:\\(?:overline|bar) ?\{? ?(?P<bar>(?<=\{)\d{1,40}|(?<=\{ )\d{1,40}|\d) ?\}?"
    r"|\\dot ?\{? ?(?P<dot>\d) ?\}?(?:(?P<between>\d{0,40})\\dot ?\{? ?(?P<last>\d) ?\}?)?"
    r"|\((?P<round>\d{1,40})\)|(?P<going>\\ldots))"
)
NUMBER = re.compile(
    r"(?P<sign>[+-]?) ?(?:"
    rf"(?P<recurring>{RECURRING})"
    rf"|(?P<mantissa>{DECIMAL})(?:[eE](?P<e>[+-]?\d{{1,4}})| ?(?:\\times|\\cdot|\*) ?(?P<power>{POWER}))(?![\w^])"
    rf"|(?P<ten>{POWER})(?![\w^])"
    rf"|(?:(?P<whole>\d+) ?)?\\frac ?(?P<top>{BRACED}|\d) ?(?P<bottom>{BRACED}|\d)"
    r"|(?P<part>\d+) (?P<over>\d+)/(?P<under>\d+)(?![\d.,/])"
    rf"|(?P<plain>{DECIMAL}(?:/{DECIMAL})?))",
    re.ASCII,
)
GOING_ON = re.compile(r"(\d)\1{2,}|(\d{2,20})\2+")  # at the end of the digits before dots: what plainly goes on


@dataclass(slots=True, frozen=True)
class Number:
    value: Fraction
    decimals: int | None  # digits after the point; None for a fraction, a power of ten, a recurring decimal


def leading(text: str) -> tuple[Number, str] | None:
    r"""The number a text begins with, and the rest of it: `5\text{ km}` -> 5, `\text{ km}`. None if there is none."""
    match = NUMBER.match(text)
    if match is None:
        return None
    rest = text[match.end() :]
    value = value_of(match)
    # a number that would go on, `4.5.6`, `1,00`, `7/2/3`, is none
    if value is None or re.match(r"[\d,./]|\.\d", rest):
        return None
    plain = match["plain"]
    decimals = None if plain is None or "/" in plain else len(plain.partition(".")[2])
    return Number(-value if match["sign"] == "-" else value, decimals), rest


def value_of(part: re.Match) -> Fraction | None:
    if part["plain"]:
        return number(part["plain"])
    if part["recurring"]:
        return recurring(part)
    if part["top"]:
        bottom = decimal(part["bottom"].strip("{} "))
        return decimal(part["whole"] or "0") + decimal(part["top"].strip("{} ")) / bottom if bottom else None
    if part["part"]:
        top, bottom = int(part["over"]), int(part["under"])
        return int(part["part"]) + Fraction(top, bottom) if 0 < top < bottom else None
    exponent = part["e"] or (part["power"] or part["ten"]).partition("^")[2].strip("{} ")
    if abs(int(exponent)) > MAX_EXPONENT:
        return None
    return decimal(part["mantissa"] or "1") * Fraction(10) ** int(exponent)


def recurring(part: re.Match) -> Fraction | None:
    r"""`0.1\overline{6}` -> 1/6, `0.\dot{1}4285\dot{7}` -> 1/7, `0.333\ldots` -> 1/3, `3.14\ldots`: None."""
    whole, once = part["start"] or "0", part["once"]
    again = part["bar"] or part["round"]
    if part["dot"]:
        again = part["dot"] + (part["between"] or "") + (part["last"] or "")
    if part["going"]:
        ends = [found for found in (re.search(f"(?:{GOING_ON.pattern})$", once),) if found]
        if not ends:
            return None
        again = ends[0][1] or ends[0][2]
    shift = 10 ** len(once)
    return int(whole) + Fraction(int(once or "0"), shift) + Fraction(int(again), (10 ** len(again) - 1) * shift)


def same_number(gold: Number, answer: Number) -> bool:
    """Exactly equal; or a fraction against its rounded decimal."""
    return gold.value == answer.value or rounds_to(gold, answer) or rounds_to(answer, gold)


def rounds_to(fraction: Number, rounded: Number) -> bool:
    """1/3 and 0.333333, not 0.333; 1/30000000 and 0.000000 have no digit in common."""
    if fraction.decimals is not None or rounded.decimals is None or rounded.decimals < ROUNDED_DECIMALS:
        return False
    shown = abs(rounded.value) * 10**rounded.decimals
    return shown >= 10 ** (ROUNDED_DECIMALS - 1) and round(fraction.value, rounded.decimals) == rounded.value
