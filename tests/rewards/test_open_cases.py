"""Graded answers that were tried on the grader: every one whose grade is beyond debate has it."""

import json

import pytest

from fastrl.rewards import VERIFIERS

pytestmark = pytest.mark.realdata


@pytest.fixture(scope="module")
def triples(data_dir):
    path = data_dir.parent / "cases" / "open_2026-11.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there: the tried answers are not part of the repository")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [row for row in rows if isinstance(row["input"], dict) and "completion" in row["input"]]
    return [row for row in found if not row["debatable"]]


def test_every_triple_beyond_debate_is_graded_as_expected(triples):
    assert len(triples) > 200
    differ = []
    for name in sorted({row["input"]["verifier"] for row in triples}):
        asked = [row for row in triples if row["input"]["verifier"] == name]
        with VERIFIERS[name]() as verifier:
            texts, golds = ([row["input"][key] for row in asked] for key in ("completion", "answer"))
            grades = verifier.grade(texts, golds)
        differ += [
            (row["id"], grade.status)
            for row, grade in zip(asked, grades, strict=True)
            if grade.reward != row["expected"]
        ]
    assert differ == []
