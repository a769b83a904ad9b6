r"""What counts as the same answer, kind by kind: of `kinds_of_answers.txt`, where `gold  ===  answer` is right and
`gold  =/=  answer` is not. `\u202f` in it is that character. A box is put around an answer that has none.
"""

import re
from pathlib import Path

import pytest

from fastrl.rewards import Math

TABLE = Path(__file__).with_name("kinds_of_answers.txt").read_text(encoding="utf-8")
CHARACTER = re.compile(r"\\u([0-9a-f]{4})")


def kinds() -> dict[str, list[tuple[str, str, bool]]]:
    """-> by kind: gold, completion, whether it is right."""
    found = {}
    for section in TABLE.split("\n\n"):
        title, *lines = CHARACTER.sub(lambda code: chr(int(code[1], 16)), section).strip("\n").split("\n")
        found[title.removeprefix("# ")] = [case(line) for line in lines]
    return found


def case(line: str) -> tuple[str, str, bool]:
    gold, sign, answer = re.fullmatch(r"(.*)  (===|=/=)  (.*)", line).groups()
    return gold, answer if "\\boxed" in answer else f"so \\boxed{{{answer}}}", sign == "==="


KINDS = kinds()


@pytest.fixture(scope="module")
def verifier():
    with Math(workers=2) as verifier:
        yield verifier


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_answer_is_right_and_every_other_one_is_not(verifier, kind):
    cases = KINDS[kind]
    grades = verifier.grade([text for _, text, _ in cases], [gold for gold, _, _ in cases])
    differ = [(*case, grade.status) for case, grade in zip(cases, grades, strict=True) if bool(grade.reward) != case[2]]
    assert differ == []
    assert {right for _, _, right in cases} == {True, False}  # both are tried in each kind


@pytest.mark.parametrize("kind", KINDS)
def test_golds_of_every_kind_accept_themselves(verifier, kind):
    golds = list(dict.fromkeys(gold for gold, _, _ in KINDS[kind]))
    checked = zip(golds, verifier.check_golds(golds), strict=True)
    assert [(gold, grade.status) for gold, grade in checked if not grade.reward] == []
