"""Grades on real problems and on real completions with a label."""

import gzip
import json
from pathlib import Path

import pytest

from fastrl.rewards.math import Math
from support.cases import mostly_later
from support.perturbed import perturbed

pytestmark = pytest.mark.realdata

SETS = ["gsm8k", "math500", "aime24", "minerva", "olympiadbench"]
UNREAD = {
    "minerva": [r"np.arcsin(10/13)", r"\frac{dM}{dt}=\frac{10^{5} L_{\odot}}{0.007 c^{2} M_{\odot}^{6}} M^{6}"],
    "olympiadbench": [r"m_{\max }=n^{2}-n-1", "t(0,4]"],
}


@pytest.fixture(scope="module")
def verifier():
    with Math(workers=2) as verifier:
        yield verifier


def rows(path: Path) -> list[dict]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", SETS)
def test_the_right_answer_is_accepted(verifier, data_dir, name):
    golds = [str(row["answer"]) for row in rows(data_dir / name / "test.jsonl")]
    grades = verifier.grade([verifier.as_completion(gold) for gold in golds], golds)
    assert sum(grade.reward for grade in grades) >= 0.995 * len(golds)
    # by more than equal text: all golds but these can be read, so that another way of writing them is accepted too
    unread = [gold for gold, grade in zip(golds, verifier.check_golds(golds), strict=True) if not grade.reward]
    assert unread == UNREAD.get(name, [])


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly_later(SETS, "gsm8k", "aime24"))
def test_perturbed_answers_are_rejected(verifier, data_dir, name):
    golds = [str(row["answer"]) for row in rows(data_dir / name / "test.jsonl")]
    golds = [gold for gold in golds if gold.strip("0.")]
    pairs = [
        (gold, wrong) for i, gold in enumerate(golds) for wrong in perturbed(gold, golds[(7 * i + 1) % len(golds)])
    ]
    grades = verifier.grade([f"\\boxed{{{wrong}}}" for _, wrong in pairs], [gold for gold, _ in pairs])
    accepted = [pair for pair, grade in zip(pairs, grades, strict=True) if grade.reward]
    assert len(accepted) <= 0.002 * len(pairs), accepted


def disagreements(verifier, texts, golds, labels) -> list[tuple[str, str]]:
    grades = verifier.grade(texts, golds)
    return [
        (gold, grade.status) for gold, grade, label in zip(golds, grades, labels, strict=True) if grade.reward != label
    ]


def test_agreement_with_the_labels_of_unboxed_gsm8k_completions(verifier, data_dir):
    gold_of = {row["id"]: row["answer"] for row in rows(data_dir / "gsm8k/test.jsonl")}
    completions = rows(data_dir / "completions/gsm8k_openai_gpt3.jsonl.gz")
    assert len(completions) == 5276
    # these models end with "A: 18" and were not asked for a box
    texts = [f"{row['completion']}\n\\boxed{{{row['completion'].rpartition('A:')[2].strip()}}}" for row in completions]
    golds = [gold_of[row["prompt_id"]] for row in completions]
    assert disagreements(verifier, texts, golds, [row["label"] for row in completions]) == []


def test_agreement_with_the_labels_of_boxed_math_completions(verifier, data_dir):
    completions = rows(data_dir / "completions/math100x8_qwen.jsonl.gz")
    differ = disagreements(verifier, *([row[key] for row in completions] for key in ("completion", "answer", "label")))
    # the label calls 10000 wrong
    assert differ == [("10{,}000", "right")]


def test_agreement_with_the_labels_of_long_chains_of_thought(verifier, data_dir):
    completions = [
        row for row in rows(data_dir / "completions/areal_aime24_olympiad.jsonl.gz") if row["answer"] is not None
    ]
    assert len(completions) == 252
    differ = disagreements(verifier, *([row[key] for row in completions] for key in ("completion", "answer", "label")))
    # cut off before its box; the source read the whole text
    assert differ == [("236", "no_box")]
