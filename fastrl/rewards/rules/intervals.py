r"""Intervals and inequalities in one notation: `x<-2 \text{ or } x>2` -> `(-\infty,-2)\cup(2,\infty)`.

French brackets, too: `]0,1]` -> `(0,1]`. The ends may be any expressions; nothing is evaluated here.
"""

import re

from fastrl.rewards.rules.units import TEXT

VARIABLE = re.compile(r"[A-Za-z]|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|rho|sigma|tau)")
MEMBER = re.compile(rf"(?:{VARIABLE.pattern}) ?\\in(?![A-Za-z]) ?")
BUILDER = re.compile(
    rf"\\\{{ ?(?P<of>{VARIABLE.pattern})(?: ?\\in ?\\mathbb ?\{{?R\}}?)? ?(?:\\mid|\\vert|:|\|) ?(?P<condition>.*)\\\}}"
)
OR = re.compile(r" ?(?:\\lor|(?<![A-Za-z])or(?![A-Za-z])|\\cup) ?")
AND = re.compile(r" ?(?:\\land|(?<![A-Za-z])and(?![A-Za-z])|,) ?")
RELATION = re.compile(r" ?(<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z])) ?")
PIECE = re.compile(r"(?P<left>[\[\](]) ?(?P<low>[^\[\],;]+?) ?[,;] ?(?P<high>[^\[\],;]+?) ?(?P<right>[\[\])])")
FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
MAX_PIECES = 8


def as_intervals(gold: str, answer: str) -> tuple[str, str]:
    """A pair of cleaned texts, with inequalities as intervals where the other side is one, and one kind of brackets.

    Two inequalities become intervals only if they are about the same variable: `x<5` is not `y<5`.
    """
    members = [MEMBER.match(text) for text in (gold, answer)]
    if members[0] and members[1] and members[0][0].split() != members[1][0].split():
        return gold, answer
    gold, answer = french(gold), french(answer)
    solved, solved_answer = solution(gold), solution(answer)
    if solved and solved_answer:
        return (solved[1], solved_answer[1]) if solved[0] == solved_answer[0] else (gold, answer)
    if solved and is_interval(answer):
        return solved[1], answer
    if solved_answer and is_interval(gold):
        return gold, solved_answer[1]
    return gold, answer


def is_interval(text: str) -> bool:
    return all(PIECE.fullmatch(piece) for piece in text.split(r"\cup"))


def french(text: str) -> str:
    r"""`x\in]0,1[` -> `(0,1)`: brackets that are turned outwards exclude the end, and `x\in` names no value."""
    bare = MEMBER.sub("", text, count=1) if MEMBER.match(text) else text
    pieces = [PIECE.fullmatch(piece.strip()) for piece in bare.split(r"\cup")[:MAX_PIECES]]
    if not all(pieces) or bare.count(r"\cup") >= MAX_PIECES:
        return text
    turned = any(piece["left"] == "]" or piece["right"] == "[" for piece in pieces if piece)
    if not turned and ";" not in bare:
        return bare
    return r"\cup".join(
        f"{'[' if piece['left'] == '[' else '('}{piece['low']},{piece['high']}{']' if piece['right'] == ']' else ')'}"
        for piece in pieces
        if piece
    )


def solution(text: str) -> tuple[str, str] | None:
    r"""An inequality in one variable -> the variable and its values: `-1\le x<2` -> `x`, `[-1,2)`; else None."""
    if builder := BUILDER.fullmatch(text):
        text = builder["condition"]
    text = " ".join(TEXT.sub(r" \1 ", text).split())
    parts = OR.split(text)
    if len(parts) > MAX_PIECES or not RELATION.search(text):
        return None
    pieces = [bounds(part.strip()) for part in parts]
    variables = {piece[0] for piece in pieces if piece}
    if None in pieces or len(variables) != 1:
        return None
    return variables.pop(), r"\cup".join(piece[1] for piece in pieces if piece)


def bounds(text: str) -> tuple[str, str] | None:
    r"""`x>2` -> `x`, `(2,\infty)`; `x>2 and x<3`, `2<x<3` -> `x`, `(2,3)`; `x\ne 1` -> everything but 1."""
    sides: dict[str, tuple[str, str]] = {}
    variables = set()
    for condition in AND.split(text):
        parts = RELATION.split(condition)
        terms, signs = [part.strip() for part in parts[::2]], parts[1::2]
        if len(terms) == 3 and VARIABLE.fullmatch(terms[1]):
            variable, pairs = terms[1], [(FLIPPED[signs[0]], terms[0]), (signs[1], terms[2])]
        elif len(terms) == 2 and VARIABLE.fullmatch(terms[0]):
            variable, pairs = terms[0], [(signs[0], terms[1])]
        elif len(terms) == 2 and VARIABLE.fullmatch(terms[1]):
            variable, pairs = terms[1], [(FLIPPED[signs[0]], terms[0])]
        else:
            return None
        variables.add(variable)
        for sign, end in pairs:
            side = "low" if sign in (">", r"\ge") else "high" if sign in ("<", r"\le") else "not"
            if side in sides or not end or variable in end or "=" in end:
                return None
            sides[side] = (end, sign)
    if len(variables) != 1 or "not" in sides and len(sides) > 1:
        return None
    (variable,) = variables
    if "not" in sides:
        end = sides["not"][0]
        return variable, rf"(-\infty,{end})\cup({end},\infty)"
    low, high = sides.get("low", (r"-\infty", ">")), sides.get("high", (r"\infty", "<"))
    left, right = "[" if low[1] == r"\ge" else "(", "]" if high[1] == r"\le" else ")"
    return variable, f"{left}{low[0]},{high[0]}{right}"
