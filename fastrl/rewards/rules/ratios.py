r"""Numbers with a sign between them that is no operation: ratios `1:2:3`, times `4:40 a.m.`, residues `3 \pmod 7`."""

import re
from dataclasses import dataclass
from fractions import Fraction

from fastrl.rewards.exact import DECIMAL
from fastrl.rewards.rules.literal import leading
from fastrl.rewards.rules.units import TEXT

PART = rf"(?:{DECIMAL}|\\frac ?(?:\{{ ?\d+ ?\}}|\d) ?(?:\{{ ?\d+ ?\}}|\d))"
RATIO = re.compile(rf"{PART}(?: ?(?::| to ) ?{PART}){{1,7}}", re.ASCII)
SEPARATOR = re.compile(r" ?(?::| to ) ?")
CLOCK = re.compile(r"(?P<hour>\d{1,2}):(?P<minute>[0-5]\d) ?(?P<half>[ap]\.? ?m)?\.?", re.ASCII | re.IGNORECASE)
RESIDUE = re.compile(
    r"(?:(?:[A-Za-z]|\\[a-z]+) ?\\equiv ?)?(?P<residue>-?\d{1,20}) ?"
    r"(?:\\pmod ?(?:\{ ?(?P<braced>\d{1,20}) ?\}|(?P<bare>\d))"
    r"|\(? ?(?:\\b?mod|mod) ?\{? ?(?P<plain>\d{1,20}) ?\}? ?\)?)",
    re.ASCII,
)


@dataclass(slots=True, frozen=True)
class Ratio:
    parts: tuple[Fraction, ...]


def plain(text: str) -> str:
    return " ".join(TEXT.sub(r" \1 ", text).split())


def ratio(text: str) -> Ratio | None:
    r"""`1:2:3`, `3 to 4`, `\frac12:3` -> its parts."""
    text = plain(text)
    if RATIO.fullmatch(text) is None:
        return None
    parts = [leading(part) for part in SEPARATOR.split(text)]
    return Ratio(tuple(part[0].value for part in parts if part is not None))


def same_ratio(gold: str, answer: str) -> bool | None:
    """`2:4:6` is 1:2:3, `6:8` and 3/4 are 3:4; None unless the gold is a ratio.

    Two digits of minutes make it a time of day, which is not scaled: `2:24` is not 1:12.
    """
    golds = ratio(gold)
    if golds is None:
        return None
    parts = ratio(answer)
    if parts is None:
        read = leading(answer)
        return (
            len(golds.parts) == 2
            and read is not None
            and not read[1]
            and read[0].value * golds.parts[1] == golds.parts[0]
        )
    if len(parts.parts) != len(golds.parts):
        return False
    if CLOCK.fullmatch(plain(gold)) and CLOCK.fullmatch(plain(answer)):
        return golds == parts
    (first, *_), (other, *_) = golds.parts, parts.parts
    return all(a * other == b * first for a, b in zip(golds.parts, parts.parts, strict=True)) and bool(first) == bool(
        other
    )


def same_time(gold: str, answer: str) -> bool | None:
    """`4:40 a.m.` is `4:40 AM`, and `4:40`; None unless the gold is a time of day and one of both has its half."""
    time, other = CLOCK.fullmatch(plain(gold)), CLOCK.fullmatch(plain(answer))
    if time is None or not (time["half"] or other and other["half"]):
        return None
    if other is None or (int(time["hour"]), time["minute"]) != (int(other["hour"]), other["minute"]):
        return False
    return not (other["half"] and time["half"]) or time["half"][0].lower() == other["half"][0].lower()


def same_residue(gold: str, answer: str) -> bool | None:
    r"""`x\equiv 10\pmod{7}` is `3 \pmod 7`; the residue alone, as the gold writes it, will do.

    None unless the gold is one.
    """
    residue = RESIDUE.fullmatch(plain(gold))
    if residue is None:
        return None
    if answer == residue["residue"]:
        return True
    other = RESIDUE.fullmatch(plain(answer))
    if other is None:
        return False
    modulus, modulus_of_other = (int(each["braced"] or each["bare"] or each["plain"]) for each in (residue, other))
    if modulus != modulus_of_other or not modulus:
        return False
    return (int(residue["residue"]) - int(other["residue"])) % modulus == 0
