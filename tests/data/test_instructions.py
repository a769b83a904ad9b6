"""A prompt asks for the answer where the reward looks for it."""

import pytest

from fastrl.data import find_dataset
from fastrl.data.task import TaskConfig, asked_for, load_task
from fastrl.models.loading import load_tokenizer
from fastrl.rewards import VERIFIERS, RewardSet, Verifier

BOX, HASHES = "in \\boxed{}", "a last line of #### and the final answer"


@pytest.fixture
def file(tmp_path):
    (tmp_path / "f.py").write_text("def f(completions, **columns):\n    return [0.0] * len(completions)\n")
    return f"{tmp_path / 'f.py'}:f"


@pytest.fixture
def problems(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "3+4=", "answer": "7"}\n')
    return str(tmp_path / "p.jsonl")


def asked(data, *specs):
    with RewardSet(list(specs)) as rewards:
        return asked_for(find_dataset(data), rewards)


def test_it_fits_the_verifier_that_reads_the_answers(problems, file):
    assert BOX in asked(problems, "math") and BOX in asked("gsm8k", "math", file)
    for specs in (("exact",), ("exact:0.5", file), ("exact", "math")):  # the first one is the one that counts
        assert HASHES in asked(problems, *specs) and "boxed" not in asked(problems, *specs)
    assert asked(problems, file) == "" == asked(problems, "last_character")
    for spec in ("exact", "math", "last_character", file):  # a task of symbols, whose tokenizer knows no words
        assert asked("arithmetic", spec) == ""


def test_an_instruction_of_ones_own_wins(problems):
    tokenizer = load_tokenizer("embedded")
    with RewardSet(["exact"]) as rewards:
        for instruction, expected in (("", "3+4="), ("=", "3+4=\n=")):
            task = load_task(problems, "train", TaskConfig(instruction=instruction), tokenizer, rewards)
            text = tokenizer.decode(task.problems[0].prompt_ids)
            assert text.replace("\n", "").startswith(expected.replace("\n", ""))


@pytest.mark.parametrize("name", ["exact", "math"])
def test_what_is_asked_for_is_what_is_read(name):
    """An answer in the asked form, after a text that mentions others, is right; another form of it is not."""
    forms = {"math": "so 12 and 13.\n\\boxed{7}", "exact": "so 12 and 13.\n#### 7"}
    with VERIFIERS[name]() as verifier:
        assert [grade.status for grade in verifier.grade([forms[name], "7 or 8"], ["7", "7"])][0] == "right"
    assert (BOX if name == "math" else HASHES) in VERIFIERS[name].instruction and Verifier.instruction == ""
