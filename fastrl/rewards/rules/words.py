r"""Golds of letters are text, and no product of variables: `CADB` is not `ABCD`, `\text{left}` is not `\text{felt}`.

Text: what `\text{..}` marks, capitals (`ABCD`, `IV`, `BA3`), capitalised and common words (`Monday`, `even`), several
words, and small letters that no product has (`dog`). `ab` and `xyz` are products. Blanks between words count, accents
count; case does not, but for capitals without `\text` and for variables.
"""

import re

from fastrl.rewards.rules.spelling import TEXT_COMMAND
from fastrl.rewards.rules.units import TEXT

COMMON = frozenset(
    "yes no true false even odd none left right up down on in neither both always never sometimes undefined infinite "
    "prime composite positive negative zero one two three four five six seven eight nine ten increasing decreasing "
    "converges diverges convergent divergent rational irrational".split()
)
CHOICES = frozenset("ABCDEFGH")
CONSTANTS = frozenset("ei")  # bare, they are no choice letters but numbers

# text, and between texts only digits, capitals and punctuation
MARKED = re.compile(rf"(?=.*[A-Za-z])(?:{TEXT_COMMAND} ?\{{[^{{}}]*\}}|[0-9A-Z .,'\-()&]|\\ |_ ?(?:\d|\{{\d+\}}))+")
MARKED_LETTER = re.compile(TEXT_COMMAND + r" ?\{[^{}]*[A-Za-z]")
BARE = re.compile(r"(?=.*[^\W\d_])[^\W_]+(?:[ \-'][^\W_]+)*'{0,3}")
FORMULA = re.compile(r"(?=.*_)(?:[A-Z][a-z]?(?: ?_ ?(?:\d|\{\d+\}))?){2,}")  # H_2O, P_1P_2
CODE = re.compile(r"[A-Za-z]+\d+")  # A1, which is no product 1A
PRODUCT_WITH_A = frozenset("abcdkmnxyz")
# (B), \textbf{(B)}, B., B: with or without what stands for it
# no further choice may follow: (B) or (C)
VALUE = r"(?! ?(?:(?:and|or)\b|[,&=]))(?!.*\([A-H]\))(?!\W*[A-H]\W*$).*"
CHOICE = re.compile(
    r"(?:(?:option|choice|answer|ans)s?:? )?"
    r"(?:\( ?(?P<round>[A-Za-z]) ?\)|(?P<dotted>[A-Za-z])(?=[.):] |[.):]?$)[.):]?)"
    rf"[.:]? ?(?P<value>{VALUE})",
    re.IGNORECASE,
)
SHAPES = {
    "angle": "reversed", "overline": "reversed", "overleftrightarrow": "reversed", "widehat": "reversed",
    "overarc": "reversed", "triangle": "ordered", "vec": "ordered", "overrightarrow": "ordered",
    "square": "ordered", "odot": "ordered",
}  # fmt: skip
SAME_SHAPE = {"overrightarrow": "vec", "overarc": "widehat"}
A_POINT = r"[A-Z](?:'{1,3}|_\{?\w\}?)?"
SHAPE = re.compile(
    rf"(?:m ?)?\\(?P<shape>{'|'.join(SHAPES)})(?![A-Za-z]) ?\{{? ?(?P<points>(?:{A_POINT} ?){{1,6}})\}}?"
)
POINT = re.compile(A_POINT)


def same_words(gold: str, answer: str) -> bool | None:
    """Whether an answer is a gold that is text; None where neither is text. Both as `spell` leaves them."""
    if not is_text(gold):
        return False if CODE.fullmatch(answer) else None
    if choice := letter_of(gold):
        return choice_matches(choice, answer)
    return plain(gold, fold(gold, answer)) == plain(answer, fold(gold, answer))


def is_text(text: str) -> bool:
    if MARKED_LETTER.search(text):
        return MARKED.fullmatch(text) is not None
    return FORMULA.fullmatch(text) is not None or BARE.fullmatch(text) is not None and not is_product(text)


def is_product(text: str) -> bool:
    """Whether bare letters and digits are a product of variables: `ab`, `2xy`, `Bh`, `x`; not `AB`, `dog`, `BA3`."""
    if all(len(word) == 1 or word.isdigit() for word in text.split()):
        text = text.replace(" ", "")  # 5 x y
    letters = text.rstrip("'").lstrip("0123456789")
    if letters[-1:].isdigit() or not letters.isalpha() or not letters.isascii():
        return letters == ""
    if len(letters) == 1:
        return letters.islower() or len(text) > 1
    if letters.lower() in COMMON or letters.isupper():
        return False
    if len(letters) == 2:
        return True
    if letters[1:] != letters[1:].lower() and not letters.islower():  # xYz, pV
        return len(letters) <= 3
    if len(set(letters)) < len(letters) or len(letters) > 6 or not letters.islower() or set(letters) & set("eiou"):
        return False
    return "a" not in letters or set(letters) <= PRODUCT_WITH_A


def fold(gold: str, answer: str) -> bool:
    """Whether case does not matter: everywhere but between bare texts of which one is all capitals: ABCD, IV."""
    marked = any(MARKED_LETTER.search(text) for text in (gold, answer))
    return marked or not (gold.isupper() or answer.isupper()) or plain(gold, True) in COMMON


def plain(text: str, folded: bool) -> str:
    r"""`\text{May }5.` -> `may 5`: without commands, with single blanks."""
    text = re.sub(r"_ ?\{(\d)\}", r"_\1", TEXT.sub(r"\1", text))
    text = " ".join(text.replace("~", " ").split()).strip(' .,;:"`')
    return text.casefold() if folded else text


def letter_of(text: str) -> tuple[str, str] | None:
    r"""The choice and what follows it: `\textbf{(B)}\ 12` -> B, 12; `B` -> B, "". None if it is no choice."""
    match = CHOICE.fullmatch(" ".join(TEXT.sub(r" \1 ", text).split()))
    if match is None:
        return None
    letter, value = match["round"] or match["dotted"], match["value"].strip()
    labelled = bool(match["round"]) or bool(re.match(r"[A-Z][.):]", match[0]))
    return (letter, value) if not value or labelled else None


def choice_matches(gold: tuple[str, str], answer: str) -> bool:
    """The same letter; and the same value where both have one. Choices in any case, other letters as written."""
    read = letter_of(answer)
    if read is None:
        return bool(gold[1]) and plain(gold[1], True) == plain(answer, True)
    (letter, value), (other, other_value) = gold, read
    if other in CONSTANTS and answer == other != letter:
        return False
    same = other.upper() == letter.upper() if letter.upper() in CHOICES else other == letter
    return same and (not value or not other_value or plain(value, True) == plain(other_value, True))


def without_label(text: str) -> str:
    r"""What stands behind the letter of a choice: `\textbf{(B)}\ 12` -> `12`; every other text as it is."""
    labelled = re.match(r"(?:\\(?:text|textbf|textrm|mathrm|mathbf) ?\{ ?)?\( ?[A-H] ?\) ?\}? ?(?=\S)", text)
    return text[labelled.end() :] if labelled and labelled[0].count("{") == labelled[0].count("}") else text


def same_shape(gold: str, answer: str) -> bool | None:
    r"""`\angle CBA` is `\angle ABC`, `\angle BAC` is not; a triangle's points are in order. Else None."""
    one, other = SHAPE.fullmatch(gold), SHAPE.fullmatch(answer)
    if one is None:
        return None
    if other is None or SAME_SHAPE.get(one["shape"], one["shape"]) != SAME_SHAPE.get(other["shape"], other["shape"]):
        return False
    points, others = POINT.findall(one["points"]), POINT.findall(other["points"])
    return points == others or SHAPES[one["shape"]] == "reversed" and points == others[::-1]
