r"""Digits in a base: `1011_2`, `(1011)_{2}`, `2\text{A}_{16}`, `1011_{\text{two}}`. In base ten, the number."""

import re
from dataclasses import dataclass

from fastrl.rewards.rules.spelling import TEXT_COMMAND

NAMES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
         "twelve": 12, "sixteen": 16}  # fmt: skip
TEXT = re.compile(TEXT_COMMAND + r" ?\{ ?([0-9A-Za-z ]*?) ?\}")
BASE = r"\d{1,2}|[a-z]{3,7}"
BASED = re.compile(
    r"\(? ?(?P<digits>[0-9A-Za-z]+) ?\)? ?"
    rf"(?:_ ?(?:\{{ ?\(?(?:base )?(?P<braced>{BASE})\)? ?\}}|(?P<base>[2-9])|\((?P<round>\d{{1,2}})\))"
    rf"| base (?P<named>{BASE}))",
    re.ASCII,
)
DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(slots=True, frozen=True)
class Based:
    digits: str  # capital letters above nine, no leading zeros
    base: int


def based(text: str) -> Based | None:
    r"""`(1011)_2` -> 1011, 2; None where a subscript is no base: `A_1`, `x_2`, `52_8 + 1`."""
    match = BASED.fullmatch(TEXT.sub(r"\1", text)) if "_" in text or "base" in text else None
    if match is None:
        return None
    name = match["braced"] or match["base"] or match["round"] or match["named"]
    base = NAMES.get(name) or (int(name) if name.isdigit() else 0)
    digits = match["digits"].upper()
    if not 2 <= base <= 36 or not set(digits) <= set(DIGITS[:base]):
        return None
    # letters alone are digits only if there are several, all capital: `BEEF_{16}`, not `a_{16}`
    if not any(map(str.isdigit, digits)) and (len(digits) < 2 or not match["digits"].isupper()):
        return None
    return Based(digits.lstrip("0") or "0", base)


def in_ten(text: str) -> str:
    """`45_{10}` -> 45; every other text as it is."""
    read = based(text)
    return read.digits if read is not None and read.base == 10 else text


def same_digits(gold: Based, answer: str) -> bool:
    """Whether an answer to `52_8` is `52_8`, or the same digits without a base, which the problem has named.

    42 is not: the problem asks for the digits, and 42 in base 8 is another number.
    """
    read = based(answer)
    if read is not None:
        return read == gold
    plain = TEXT.sub(r"\1", answer).replace(" ", "").replace(",", "").upper()
    return plain.isascii() and plain.isalnum() and (plain.lstrip("0") or "0") == gold.digits
