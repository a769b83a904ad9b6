r"""Columns as what they list: a matrix of one column or row as a tuple, a system of `cases` as its equations."""

import re

MATRIX = re.compile(r"\\begin ?\{(?P<kind>[pb]?matrix)\} ?(?P<rows>.*?) ?(?:\\\\)? ?\\end ?\{(?P=kind)\}")
CASES = re.compile(r"\\begin ?\{cases\} ?(?P<rows>[^&]*?) ?(?:\\\\)? ?\\end ?\{cases\}")
TUPLE = re.compile(r"\(.*,.*\)")


def as_tuples(gold: str, answer: str) -> tuple[str, str]:
    r"""A vector as a tuple where the other side is one: `\begin{pmatrix}1\\2\end{pmatrix}` -> `(1,2)`."""
    gold, answer = equations(gold), equations(answer)
    if TUPLE.fullmatch(answer):
        return vector(gold), answer
    return (gold, vector(answer)) if TUPLE.fullmatch(gold) else (gold, answer)


def vector(text: str) -> str:
    matrix = MATRIX.fullmatch(text)
    if matrix is None:
        return text
    rows, columns = matrix["rows"].split(r"\\"), matrix["rows"].split("&")
    if len(rows) > 1 and len(columns) > 1 or "\\begin" in matrix["rows"]:
        return text
    return f"({','.join(each.strip() for each in (rows if len(rows) > 1 else columns))})"


def equations(text: str) -> str:
    r"""`\begin{cases}x=1\\y=2\end{cases}` -> `x=1, y=2`."""
    cases = CASES.fullmatch(text)
    return ", ".join(row.strip(" ,") for row in cases["rows"].split(r"\\")) if cases else text
