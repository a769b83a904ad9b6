r"""A number with what stands around it: its name, its currency, a scale word, a percent sign, a unit.

`x = 18`   `\$2.5 million`   `\frac{1}{2}\%`   `42\text{ cm}^2`   `1\text{ hour }30\text{ minutes}`   `30^\circ15'`

Both sides with a unit: converted, and otherwise different. One side without: its number counts in the other's unit.
"""

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from fastrl.rewards.rules import units
from fastrl.rewards.rules.literal import Number, leading, same_number
from fastrl.rewards.rules.spelling import TEXT_COMMAND
from fastrl.rewards.rules.units import Unit

# a variable with a subscript, a prime or an argument: x, \theta, x_1, a_{10}, f'(2); or what geometry and words name:
# \angle A, |AB|, \overline{AB}, \text{Area}
NAMED = (
    r"\\?[A-Za-z]+(?:_(?:\w|\{\w+\}))?'{0,3}(?:\([\w, ]*\))?"
    r"|m? ?\\angle ?[A-Z]{1,3}|\|[A-Z]{2}\||\\overline ?\{[A-Z]{2}\}|\\(?:text|mathrm) ?\{[A-Za-z ]+\}"
)
ASSIGNED = re.compile(rf"(?P<name>{NAMED}) ?= ?", re.ASCII)
SWAPPED = re.compile(r"(?P<value>[^=]*[^=<>!\\ ]) ?= ?(?:[A-Za-z]|\\[a-z]+)(?:_(?:\w|\{\w+\}))?", re.ASCII)

SCALES = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12, "pair": 2,
    "lakh": 10**5, "crore": 10**7, "hundredth": Fraction(1, 100), "thousandth": Fraction(1, 1000),
    "millionth": Fraction(1, 10**6),
}  # fmt: skip
TEXT = TEXT_COMMAND + r" ?\{"
SCALE_WORDS = "|".join(sorted(SCALES, key=len, reverse=True))
SCALE = re.compile(rf" ?(?:{TEXT} ?)?(?P<word>{SCALE_WORDS})s?(?![A-Za-z])(?: ?(?P<close>\}}))?", re.IGNORECASE)
PERCENT = re.compile(rf" ?(?:\\?%|(?:{TEXT} ?)?per ?cent ?(?:\}})?)")
CODE = rf"\\?\$|[\u20ac\u00a3\u00a5\u20b9]|(?:{TEXT} ?)?(?:USD|EUR|GBP|JPY|CNY|INR|Rs\.?)(?: ?\}})?"
CURRENCY = re.compile(rf"(?P<sign>[+-]?) ?(?:(?:US|U\.S\.) ?)?(?P<code>{CODE}) ?(?=[\d.+\-\\])")
# a unit without \text, of two letters or more: `5 m` may be a product
BARE = re.compile(r" ?[A-Za-z]{2}[A-Za-z .\-/]*(?:\^ ?\{?-?\d\}?)?[A-Za-z/ .]*(?:\^ ?\{?-?\d\}?)?")
MARKED = re.compile(
    rf"[ /]*(?:{TEXT}|\\mu|\\\$|\^\\circ|[$\u20ac\u00a3\u00a5\u20b9\u00a2]|(?:\\cdot ?|\\frac ?\{{ ?){TEXT})"
)
SINGLE = re.compile(r"(?P<number>[^A-Za-z]*\d) ?(?P<unit>[A-Za-z](?: ?\^ ?\{? ?\d ?\}?)?)")
PLAIN_WORD = re.compile(r"[a-z]*[aeiouy][a-z]*")

# several numbers with a unit each: hours and minutes; degrees, minutes, seconds; feet and inches
PIECE = re.compile(r"(?P<number>\d+(?:\.\d+)?) ?(?P<unit>\^\\circ|''|'|\"|\\?\$|[A-Za-z]+\.?) ?,? ?(?:and )?")
MARKS = {"^\\circ": "degree", "'": "arcminute", "''": "arcsecond", '"': "arcsecond"}
FEET = {"'": "ft", "''": "in", '"': "in"}


@dataclass(slots=True, frozen=True)
class Quantity:
    number: Number
    percent: bool = False
    unit: Unit | None = None
    name: str | None = None  # x of `x = 18`


def quantity(text: str, *, lenient: bool = False, in_unit: Unit | None = None) -> Quantity | None:
    r"""A cleaned text -> the one quantity it writes, or None if it is anything else.

    lenient: also read `18 apples`, where letters may be any word. Not for a gold: there they may matter, and only
    well-known units are read bare. in_unit: the gold's, with which a single letter is one, too: `5 m` for `5\text{ m}`.
    """
    name = None
    if match := ASSIGNED.match(text):
        name, text = match["name"], text[match.end() :]
    elif match := SWAPPED.fullmatch(text):
        text = match["value"]
    found = measured(text, lenient) or compound(text)
    if found is None and in_unit is not None and (single := SINGLE.fullmatch(text)):
        found = measured(f"{single['number']}\\text{{ {single['unit']}}}", lenient)
    return found and replace(found, name=name)


def measured(text: str, lenient: bool) -> Quantity | None:
    unit = None
    if money := CURRENCY.match(text):
        unit = units.parse(money["code"])
        text = money["sign"] + text[money.end() :]
    read = leading(text)
    if read is None:
        return None
    number, rest = read
    number, rest = scaled(number, rest)
    percent = PERCENT.match(rest)
    if percent:
        rest = rest[percent.end() :]
    rest = rest.strip(" .,;")
    if not rest:
        return Quantity(number, bool(percent), unit)
    trailing = trailing_unit(" " + rest if text.endswith(" " + rest) else rest, lenient)
    if trailing is None or unit is not None and units.ratio(unit, trailing) is None:
        return None
    return Quantity(number, bool(percent), trailing)


def scaled(number: Number, rest: str) -> tuple[Number, str]:
    r"""`2.5`, `\text{ million dollars}` -> 2500000, `\text{ dollars}`."""
    for _ in range(3):
        found = SCALE.match(rest)
        if found is None:
            break
        opened = "{" in found[0] and not found["close"]
        factor = SCALES[found["word"].lower()]
        number = Number(number.value * factor, None if number.decimals is None else 0)
        rest = ("\\text{" if opened else "") + rest[found.end() :]
    return number, "" if re.fullmatch(r"\\text\{ *\}?", rest) else rest


def trailing_unit(rest: str, lenient: bool) -> Unit | None:
    """The unit of a number before `rest`. Bare words are units if they are known, or cannot be variables."""
    if MARKED.match(rest):
        return units.parse(rest)
    if not BARE.fullmatch(rest):
        return None
    unit = units.parse(rest)
    if unit is None or not rest.startswith(" "):
        return unit if unit and lenient and not unit.words else None
    plain = all(len(word) > 3 and PLAIN_WORD.fullmatch(word) for word in unit.words)
    return unit if lenient or plain else None


def compound(text: str) -> Quantity | None:
    r"""`1 hour 30 minutes` -> 1.5 hours, `30^\circ 15'` -> 30.25 degrees, `5' 6''` -> 66 inches; else None."""
    text = units.TEXT.sub(r" \1 ", text)
    text = " ".join(text.replace("\\$", "$").split())
    if text.startswith("$"):  # $3 and 50 cents
        text = re.sub(r"^\$ ?(\d+)", r"\1 dollars", text)
    text = re.sub(r"(?<=\d) ?\^\\circ ?", r"^\\circ ", text)
    pieces, at = [], 0
    while at < len(text) and len(pieces) < 5:
        piece = PIECE.match(text, at)
        if piece is None:
            return None
        pieces.append(piece)
        at = piece.end()
    if len(pieces) < 2 or at < len(text) or text[-1] in ", ":
        return None
    return added(pieces)


def added(pieces: list[re.Match]) -> Quantity | None:
    marks = MARKS if pieces[0]["unit"] == "^\\circ" else FEET
    first = units.parse(marks.get(pieces[0]["unit"], pieces[0]["unit"].strip(".")))
    if first is None or first.words or first.generic is not None:
        return None
    total, size = Fraction(pieces[0]["number"]), Fraction(1)
    for piece in pieces[1:]:
        unit = units.parse(marks.get(piece["unit"], piece["unit"].strip(".")))
        smaller = units.ratio(first, unit) if unit and not unit.words else None
        if smaller is None or smaller[1] or Fraction(piece["number"]) * smaller[0] >= size:
            return None
        size = smaller[0]
        total += Fraction(piece["number"]) * size
    return Quantity(Number(total, None), unit=first)


def same_quantity(gold: Quantity, answer: Quantity) -> bool:
    """Whether two quantities are equal; percent and units as in the head of this file.

    A percent against a plain number: the sign may be missing in the answer (`12.5` for `12.5%`) or be resolved
    (`0.125`). An answer `18%` for a gold of 18 repeats a sign that the problem asks for; for a gold of at most 1, as
    `0.5`, it is another number.
    """
    if gold.percent and answer.unit or answer.percent and gold.unit:
        return False
    if gold.unit is not None and answer.unit is not None:
        factor = units.ratio(gold.unit, answer.unit)
        if factor is None or factor[1] and answer.number.value:
            return False
        if factor[0] != 1:
            return gold.percent == answer.percent and gold.number.value == answer.number.value * factor[0]
    if gold.percent == answer.percent:
        return same_number(gold.number, answer.number)
    if gold.percent:
        return same_number(gold.number, answer.number) or hundredth(gold.number) == answer.number.value
    if gold.number.value == hundredth(answer.number):
        return True
    return abs(gold.number.value) > 1 and same_number(gold.number, answer.number)


def hundredth(number: Number) -> Fraction:
    return number.value / 100
