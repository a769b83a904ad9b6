r"""`exact`: the last word of the text, compared as a string and then as an exact number. No processes, no sympy.

The answer is the rest of the line after the last `####`; without one, the whole text or its last word.
Example: the completion "8 6 9" has the answer "9".

Text is compared in canonical unicode (NFC), with U+2212 as the minus sign and every kind of blank as a blank. A narrow
or no-break blank before three digits groups them: `12\u202f345` is one word, the number 12345.
"""

import re
import unicodedata
from fractions import Fraction

from fastrl.rewards.base import Grade, Verifier, require_equal_lengths

MAX_DIGITS = 512  # int() of a longer text is slow, and refused from 4300 digits on

# ASCII: \d and Fraction also take Arabic and full-width digits
DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
NUMBER = re.compile(rf"([+-]?{DECIMAL})(?:/({DECIMAL}))?", re.ASCII)


def number(text: str) -> Fraction | None:
    """An integer, decimal or simple fraction in ASCII digits, thousands commas allowed -> its exact value.

    None for everything else: blanks inside, exponents, a zero denominator, more than MAX_DIGITS characters.
    """
    match = NUMBER.fullmatch(text) if len(text) <= MAX_DIGITS else None
    if match is None:
        return None
    numerator, denominator = match.groups()
    value = decimal(numerator)
    if denominator is None:
        return value
    divisor = decimal(denominator)
    return value / divisor if divisor else None


def decimal(text: str) -> Fraction:
    """`[+-]1,234.50` -> its exact value; the text must match DECIMAL with an optional sign."""
    whole, _, decimals = text.replace(",", "").partition(".")
    return Fraction(int(whole + decimals), 10 ** len(decimals)) if decimals else Fraction(int(whole))


GROUPED = re.compile(r"(?<=[0-9])[\u00a0\u2007\u2009\u202f](?=[0-9]{3}(?![0-9]))")
BLANK = re.compile(r"[^\S\n\r]")


def canonical(text: str) -> str:
    """`\u22125` -> `-5`, `12\u202f345` -> `12,345`, `e\u0301` -> `\u00e9`; every blank but line ends -> a plain one."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFC", text).replace("\u2212", "-")
    return BLANK.sub(" ", GROUPED.sub(",", text))


class Exact(Verifier):
    name = "exact"
    instruction = "Work it out step by step and end with a last line of #### and the final answer, and nothing else."

    def grade(self, completions: list[str], answers: list[str]) -> list[Grade]:
        require_equal_lengths("exact.grade", completions=completions, answers=answers)
        return [
            GRADES[self.status_of(canonical(text), canonical(answer).strip())]
            for text, answer in zip(completions, answers, strict=True)
        ]

    def status_of(self, text: str, gold: str) -> str:
        found = self.extract(text)
        if found is None:
            return "no_box"
        if found == gold or ("####" not in text and text.strip() == gold):
            return "right"
        value = number(found)
        return "right" if value is not None and value == number(gold) else "wrong"

    def extract(self, completion: str) -> str | None:
        completion = canonical(completion)
        _, mark, after = completion.rpartition("####")
        if mark:
            lines = after.strip().splitlines()
            return lines[0].strip() if lines else None
        words = completion.rsplit(None, 1)
        return words[-1] if words else None

    def vote_key(self, completion: str) -> str | None:
        found = self.extract(completion)
        value = None if found is None else number(found)
        return found if value is None else str(value)

    def as_completion(self, answer: str) -> str:
        return f"#### {answer}"


class LastCharacter(Exact):
    """The answer is the last character of the text: for tasks whose results are single characters, such as `869`."""

    name = "last_character"
    instruction = ""

    def extract(self, completion: str) -> str | None:
        return canonical(completion).rstrip()[-1:] or None

    def as_completion(self, answer: str) -> str:
        return answer


GRADES = {status: Grade.of(status) for status in ("right", "wrong", "no_box")}
