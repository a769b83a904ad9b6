r"""Numbers as people write them in LaTeX, read exactly and in bounded time: no sympy, no float.

18   -3.50   1,000   10{,}000   \$18   18\%   \frac{1}{3}   -\frac12   3\frac{1}{2}   7/8
4.5 \times 10^{33}   10^{-5}   2e9   x = 18   42\text{ cm}^2   90^\circ   5 apples
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from fastrl.rewards.exact import DECIMAL, decimal, number

MAX_EXPONENT = 1000  # of ten; beyond it a short text would become a number of many kilobytes
ROUNDED_DECIMALS = 6  # a decimal stands for a fraction if it has this many decimals, all of them correct

# words that follow a number and change its value
SCALES = frozenset("hundred thousand million billion trillion dozen percent pi e i or and".split())

# words that are a unit, and no product of variables, even where a gold does not mark them as text
UNITS = frozenset(
    "km cm mm kg mg ml ft lb oz hr min sec mph dollar dollars cent cents degree degrees meter meters foot feet inch "
    "inches mile miles hour hours minute minutes second seconds day days week weeks month months year years".split()
)

BLANKS = re.compile(r"(?:\s|~|\\[,;:! ]|\\quad)+")
GROUPING = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,|\\!)(?=\d{3}(?!\d))", re.ASCII)
STYLED = re.compile(r"\\(?:text|textbf|textrm|textit|mathbf|mathrm|mbox|bf|rm)\s*\{([^{}]*)\}")
STYLE_ONLY = re.compile(r"\\left(?![A-Za-z])|\\right(?![A-Za-z])|\\displaystyle")

# one variable, with a subscript or an argument: x, \theta, x_1, a_{10}, f(2)
ASSIGNED = re.compile(r"\\?[A-Za-z]+(?:_(?:\w|\{\w+\}))?(?:\([\w, ]*\))? ?= ?", re.ASCII)
BRACED = rf"\{{ ?[+-]?{DECIMAL} ?\}}"
POWER = r"10 ?\^ ?(?:\{ ?[+-]?\d{1,4} ?\}|\d)"
# several units may follow each other: \text{ m}/\text{s}^2
UNIT = (
    r"(?:(?:/| |\\cdot ?)*\\(?:text|textrm|textit|mathrm|mbox|rm) ?"
    r"\{ ?[A-Za-z][A-Za-z .\-/]*(?:\^ ?\{?-?\d\}?)? ?\}(?: ?\^ ?(?:\{ ?-?\d ?\}|\d))?)+"
)
LITERAL = re.compile(
    r"(?P<sign>[+-]?) ?(?:\\?\$|\\pounds|\\euro)? ?"
    rf"(?:(?P<mantissa>{DECIMAL})(?:[eE](?P<e>[+-]?\d{{1,4}})| ?(?:\\times|\\cdot|\*) ?(?P<power>{POWER}))"
    rf"|(?P<ten>{POWER})"
    rf"|(?P<whole>\d+)? ?\\[dtc]?frac ?(?P<top>{BRACED}|\d) ?(?P<bottom>{BRACED}|\d)"
    rf"|(?P<plain>{DECIMAL}(?:/{DECIMAL})?))"
    r" ?(?P<percent>\\?%|\\text ?\{ ?percent ?\}|percent)?(?:\^ ?(?:\{ ?\\circ ?\}|\\circ)|\\degree)? ?"
    rf"(?P<unit>{UNIT}|(?P<bare>(?<= )[A-Za-z]{{2}}[A-Za-z .\-]*(?:\^ ?\{{?-?\d\}}?)?))? ?\.?",
    re.ASCII,
)
UNIT_POWER = re.compile(r"\^ ?\{? ?(-?\d)")
WORD = re.compile(r"[a-z]+")


@dataclass(slots=True, frozen=True)
class Literal:
    value: Fraction
    decimals: int | None  # digits after the point; None for a fraction or a power of ten
    percent: bool
    unit_powers: tuple[str, ...] | None  # ("2",) for cm^2, () for cm; None without a unit


def clean(text: str) -> str:
    r"""An answer without what does not change it: outer `$`, `\left`, `\text{..}` around all of it, a final stop.

    A blank is never removed between two characters: `4 2` is not 42.
    """
    text = GROUPING.sub(",", text.replace("\u2212", "-"))
    text = BLANKS.sub(" ", STYLE_ONLY.sub("", text)).strip().rstrip(" .,;")
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text.strip("$").strip().rstrip(" .,;")
    if styled := STYLED.fullmatch(text):
        text = styled[1].strip()
    return text


def literal(text: str, *, lenient: bool = False) -> Literal | None:
    """A cleaned text -> the number it writes, or None if it is anything more than one number.

    lenient: also read `x = 18` and `18 apples` as 18. Not for a gold: there the x or the letters may matter, and only
    well-known units are read.
    """
    if lenient and (match := ASSIGNED.match(text)):
        text = text[match.end() :]
    match = LITERAL.fullmatch(text)
    if match is None:
        return None
    part = match.groupdict()
    unit = part["unit"]
    if unit and not is_unit(WORD.findall(unit.lower()), marked=lenient or not part["bare"]):
        return None
    value = value_of(part)
    if value is None:
        return None
    plain = part["plain"]
    return Literal(
        value=-value if part["sign"] == "-" else value,
        decimals=None if plain is None or "/" in plain else len(plain.partition(".")[2]),
        percent=bool(part["percent"]),
        unit_powers=tuple(UNIT_POWER.findall(unit)) if unit else None,
    )


def is_unit(words: list[str], marked: bool) -> bool:
    return SCALES.isdisjoint(words) if marked else UNITS.issuperset(words)


def value_of(part: dict[str, str | Any]) -> Fraction | None:
    if part["plain"]:
        return number(part["plain"])
    if part["top"]:
        bottom = decimal(part["bottom"].strip("{} "))
        return decimal(part["whole"] or "0") + decimal(part["top"].strip("{} ")) / bottom if bottom else None
    exponent = part["e"] or (part["power"] or part["ten"]).partition("^")[2].strip("{} ")
    if abs(int(exponent)) > MAX_EXPONENT:
        return None
    return decimal(part["mantissa"] or "1") * Fraction(10) ** int(exponent)


def same_number(gold: Literal, answer: Literal) -> bool:
    """Exactly equal; or a percent read as either 18 or 0.18; or a fraction against its rounded decimal.

    Units are compared in their powers only (cm^2 is not cm^3), because golds often leave the unit out.
    """
    if None not in (gold.unit_powers, answer.unit_powers) and gold.unit_powers != answer.unit_powers:
        return False
    if gold.percent and not answer.percent:
        return answer.value in (gold.value, gold.value / 100)
    if answer.percent and not gold.percent:
        return gold.value in (answer.value, answer.value / 100)
    return gold.value == answer.value or rounds_to(gold, answer) or rounds_to(answer, gold)


def rounds_to(fraction: Literal, rounded: Literal) -> bool:
    if fraction.decimals is not None or rounded.decimals is None or rounded.decimals < ROUNDED_DECIMALS:
        return False
    return round(fraction.value, rounded.decimals) == rounded.value
