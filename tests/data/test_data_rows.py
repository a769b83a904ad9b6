"""Rows of every known shape become Problems; rows that cannot are listed, and too many of them end the run."""

import json
import re
import subprocess
import sys

import pytest

from fastrl.base.types import DataError
from fastrl.data import DATASETS, find_dataset, load_problems
from fastrl.data.base import (
    MAX_ROW_BYTES,
    BadRow,
    answer_text,
    check_row,
    convert_row,
    last_boxed,
    problems_from_rows,
    row_id,
)

GOOD = {"prompt": "What is 1+1?", "answer": "2"}
USER = [{"role": "user", "content": "What is 1+1?"}]


def load(rows, **options):
    return problems_from_rows([("rows.jsonl", i, row) for i, row in enumerate(rows, start=1)], "rows.jsonl", **options)


def problem_from_row(row, id):
    check_row(row)
    return convert_row(row, row_id(row, id))[0]


SHAPES = {
    # name: (row, mapping, prompt, answer, columns)
    "fastrl": (GOOD | {"level": 3}, "fastrl: prompt + answer", "What is 1+1?", "2", {"level": 3}),
    "fastrl messages": ({"prompt": USER, "answer": 2}, "fastrl: prompt + answer", USER, "2", {}),
    "answer before the other golds": (
        GOOD | {"solution": "3"},
        "fastrl: prompt + answer",
        GOOD["prompt"],
        "2",
        {"solution": "3"},
    ),
    "TRL solution": ({"prompt": USER, "solution": "2"}, "TRL: prompt + solution", USER, "2", {"solution": "2"}),
    "TRL solution with a box": (
        {"prompt": USER, "solution": "so \\boxed{2}"},
        "TRL: prompt + last \\boxed{} of solution",
        USER,
        "2",
        {"solution": "so \\boxed{2}"},
    ),
    "TRL ground_truth": (
        {"prompt": "a", "ground_truth": "2"},
        "TRL: prompt + ground_truth",
        "a",
        "2",
        {"ground_truth": "2"},
    ),
    "TRL label": ({"prompt": "a", "label": 2}, "TRL: prompt + label", "a", "2", {"label": 2}),
    "TRL target": (
        {"prompt": "a", "target": 2, "nums": [1]},
        "TRL: prompt + target",
        "a",
        "2",
        {"target": 2, "nums": [1]},
    ),
    "verl": (
        {
            "data_source": "openai/gsm8k",
            "prompt": USER,
            "reward_model": {"style": "rule", "ground_truth": ["2"]},
            "extra_info": {"index": 7},
        },
        "verl: prompt + reward_model.ground_truth",
        USER,
        "2",
        {
            "data_source": "openai/gsm8k",
            "reward_model": {"style": "rule", "ground_truth": ["2"]},
            "extra_info": {"index": 7},
            "ground_truth": ["2"],
        },
    ),
    "open-instruct": (
        {"messages": USER, "ground_truth": "2", "dataset": "gsm8k"},
        "open-instruct: messages + ground_truth",
        USER,
        "2",
        {"ground_truth": "2", "dataset": "gsm8k"},
    ),
    "open-instruct with a completion": (
        {"messages": [*USER, {"role": "assistant", "content": "2"}], "ground_truth": ["2"]},
        "open-instruct: messages + ground_truth",
        USER,
        "2",
        {"ground_truth": ["2"]},
    ),
    "GSM8K": (
        {"question": "How many?", "answer": "2 * 600 = 1200 #### no\nSo 1200.\n#### 1,200"},
        "GSM8K: question + answer after ####",
        "How many?",
        "1200",
        {},
    ),
    "question": ({"question": "How many?", "answer": " 5 "}, "question + answer", "How many?", "5", {}),
    "MATH": (
        {"problem": "p", "solution": "\\boxed{1}, then \\boxed{\\frac{1}{2}}.", "level": "Level 1"},
        "MATH: problem + last \\boxed{} of solution",
        "p",
        "\\frac{1}{2}",
        {"solution": "\\boxed{1}, then \\boxed{\\frac{1}{2}}.", "level": "Level 1"},
    ),
    "problem": (
        {"problem": "p", "solution": "long", "answer": "7"},
        "problem + answer",
        "p",
        "7",
        {"solution": "long"},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_gives_prompt_answer_columns_and_the_name_of_its_mapping(name):
    row, mapping, prompt, answer, columns = SHAPES[name]
    before = json.dumps(row)
    problem, got = convert_row(row, "x/0")
    assert (got, problem.prompt, problem.answer, problem.columns) == (mapping, prompt, answer, columns)
    assert problem.id == "x/0" and problem.prompt_ids == []
    assert json.dumps(row) == before


def test_the_rows_own_id_wins():
    assert problem_from_row(GOOD | {"id": "gsm8k/7"}, "x").id == "gsm8k/7"
    assert problem_from_row(GOOD | {"id": 7}, "x").id == "7"
    assert problem_from_row(GOOD | {"id": None}, "x").id == "x"
    assert "id" not in problem_from_row(GOOD | {"id": 7}, "x").columns


@pytest.mark.parametrize(
    "gold, text",
    [(72, "72"), (0.5, "0.5"), (72.0, "72"), (100.0, "100"), (1e-05, "0.00001"), (1e22, "1" + "0" * 22), (" 7\n", "7")],
)
def test_numbers_become_plain_text(gold, text):
    assert answer_text(gold) == text


@pytest.mark.parametrize(
    "text, content",
    [
        ("\\boxed{a} and \\boxed{b}", "b"),
        ("\\boxed{\\left\\{1, 2\\right.}", "\\left\\{1, 2\\right."),
        ("\\boxed {x^{2}} end}", "x^{2}"),
        ("\\fbox{3}", "3"),
        ("thus $\\boxed 5$", "5"),
    ],
)
def test_last_boxed_is_balanced(text, content):
    assert last_boxed(text) == content


SURROGATE, NUL = "\ud800", "\0"
HOSTILE = {
    # name: (row, the reason it is listed with)
    "no answer": ({"prompt": "a"}, "no answer among the columns prompt"),
    "no prompt": ({"answer": "2"}, "the columns are answer"),
    "null prompt": ({"prompt": None, "answer": "2"}, "the prompt is null"),
    "null answer": ({"prompt": "a", "answer": None}, "the answer is null"),
    "null answer beside a label": ({"prompt": "a", "answer": None, "label": 1}, "the answer is null"),
    "bool answer": ({"prompt": "a", "answer": True}, "the answer is of type bool"),
    "list answer": ({"prompt": "a", "answer": ["2"]}, "the answer is of type list"),
    "nan answer": ({"prompt": "a", "answer": float("nan")}, "of type float, expected text or a finite number"),
    "empty answer": ({"prompt": "a", "answer": " "}, "the answer is empty"),
    "blank prompt": ({"prompt": " \n", "answer": "2"}, "the prompt is empty"),
    "number as prompt": ({"prompt": 5, "answer": "2"}, "the prompt is of type int"),
    "no messages": ({"prompt": [], "answer": "2"}, "the prompt is an empty list"),
    "text among messages": ({"prompt": ["a"], "answer": "2"}, "message 0 of the prompt is of type str"),
    "unknown role": ({"prompt": [{"role": "root", "content": "a"}], "answer": "2"}, "has the role 'root'"),
    "image parts": (
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "2"},
        "content of type list",
    ),
    "tool call": (
        {"prompt": [{"role": "user", "content": "a", "tool_calls": [1]}], "answer": "2"},
        "also has tool_calls",
    ),
    "assistant last": (
        {"prompt": [*USER, {"role": "assistant", "content": "2"}], "answer": "2"},
        "ends with an assistant",
    ),
    "only a system message": ({"prompt": [{"role": "system", "content": "a"}], "answer": "2"}, "no user message"),
    "several golds": ({"prompt": "a", "reward_model": {"ground_truth": ["1", "2"]}}, "the answer is of type list"),
    "GSM8K without its mark": ({"question": "a", "answer": "1 + 1\n2"}, "several lines and no `####"),
    "no box": ({"problem": "a", "solution": "2"}, "solution has no"),
    "open box": ({"problem": "a", "solution": "\\boxed{2"}, "is not closed"),
    "null solution": ({"problem": "a", "solution": None}, "solution is null"),
    "a list": ([1], "the row is of type list"),
    "a number": (3, "the row is of type int"),
    "null": (None, "the row is null"),
    "too large": ({"prompt": "a", "answer": "2", "image": "x" * MAX_ROW_BYTES}, "larger than 1000000 bytes"),
    "too many numbers": ({"prompt": "a", "answer": "2", "n": [1] * (MAX_ROW_BYTES + 1)}, "larger than 1000000 bytes"),
    "NUL": ({"prompt": "a" + NUL, "answer": "2"}, "NUL"),
    "NUL deep in a column": ({"prompt": "a", "answer": "2", "x": {"y": [NUL]}}, "NUL"),
    "surrogate": ({"prompt": "a", "answer": "2" + SURROGATE}, "lone surrogate"),
    "surrogate as key": ({"prompt": "a", "answer": "2", SURROGATE: 1}, "lone surrogate"),
    "escape sequence as id": ({"prompt": "a", "answer": "2", "id": "\x1b[2J"}, "id '\\x1b[2J' has characters"),
    "escape sequence as key": ({"\x1b[2J": "a"}, "the columns are '\\x1b[2J'"),
    "unreadable": (DataError("not UTF-8 at byte 3"), "not UTF-8 at byte 3"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_row_is_listed_with_line_and_reason(name):
    row, reason = HOSTILE[name]
    loaded = load([dict(GOOD)] * 19 + [row])
    assert len(loaded.problems) == 19
    [bad] = loaded.bad_rows
    assert (bad.file, bad.line) == ("rows.jsonl", 20) and reason in bad.reason
    assert str(bad).startswith("rows.jsonl:20: ")


@pytest.mark.promise("D4", trials=1)
def test_text_is_never_a_template():
    text = "{0.__class__} {{ 7*7 }} {% raw %} %s <|im_end|>"
    problem = problem_from_row({"prompt": text, "answer": text}, "x")
    assert (problem.prompt, problem.answer) == (text, text)


def test_nesting_deeper_than_python_recurses_is_data():
    value = "x"
    for _ in range(100_000):
        value = [value]
    assert problem_from_row(GOOD | {"nested": value}, "x").answer == "2"


def hostile_lines(good: int, bad: int) -> tuple[list[bytes], list[int]]:
    """JSON lines with `bad` unusable ones spread among them, and their line numbers."""
    evil = [
        b'{"prompt": "a"}',
        b'{"answer": "2"}',
        b'{"prompt": null, "answer": "2"}',
        b'{"prompt": "a", "answer": null}',
        b"7",
        b"[]",
        b"null",
        b'{"prompt": "' + b"x" * 10_000_000 + b'", "answer": "2"}',
        b'{"prompt": "a\\u0000", "answer": "2"}',
        b'{"prompt": "\\ud83d", "answer": "2"}',
        b'{"prompt": "a", "ans',
        b'{"prompt": "\xff", "answer": "2"}',
        b"[" * 100_000,
        b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}",
        b'{"prompt": "  ", "answer": "2"}',
    ]
    total = good + bad
    numbers = [1 + i * total // bad for i in range(bad)]
    lines = [b'{"prompt": "What is %d+1?", "answer": %d}' % (i, i + 1) for i in range(total)]
    for i, number in enumerate(numbers):
        lines[number - 1] = evil[i % len(evil)]
    return lines, numbers


@pytest.mark.promise("D4", trials=15)
def test_985_of_1000_rows_are_kept_and_15_listed(tmp_path):
    lines, numbers = hostile_lines(985, 15)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    loaded = load_problems(str(path), split="train")
    assert len(loaded.problems) == 985
    assert [row.line for row in loaded.bad_rows] == numbers
    reasons = [row.reason for row in loaded.bad_rows]
    for reason, pattern in zip(
        reasons,
        [
            "no answer",
            "columns are answer",
            "null",
            "null",
            "type int",
            "an empty list",
            "null",
            "longer than 1000000",
            "NUL",
            "surrogate",
            "invalid JSON at character",
            "UTF-8",
            "recursion",
            "digits",
            "empty",
        ],
        strict=True,
    ):
        assert re.search(pattern, reason), (pattern, reason)
    by_line = {problem.id: problem for problem in loaded.problems}
    assert by_line["rows.jsonl:1000"].answer == "1000" and "rows.jsonl:1" not in by_line


@pytest.mark.promise("D4", trials=1)
def test_5_percent_bad_rows_are_borne_and_more_are_not():
    bad = {"prompt": "a"}
    assert len(load([GOOD] * 95 + [bad] * 5).bad_rows) == 5
    with pytest.raises(DataError, match=r"(?s)rows.jsonl: 6 of 100 rows.*expected an object with \"prompt\"") as caught:
        load([GOOD] * 94 + [bad] * 6)
    assert caught.value.exit_code == 3
    listed = re.findall(r"\n  rows.jsonl:(\d+): there is a prompt but no answer", str(caught.value))
    assert listed == ["95", "96", "97", "98", "99"] and "and 1 more" in str(caught.value)


def test_no_row_at_all_is_an_error():
    with pytest.raises(DataError, match="0 of 0 rows cannot be used .* at least one must be good"):
        load([])


def test_an_id_is_used_once():
    rows = [GOOD | {"id": f"p{i}"} for i in range(19)]
    loaded = load([*rows, GOOD | {"id": "p3"}])
    assert loaded.bad_rows == [BadRow(file="rows.jsonl", line=20, reason="id 'p3' is already used by rows.jsonl:4")]


def test_excluded_rows_are_neither_problems_nor_bad():
    rows = [GOOD | {"id": "a"}, {"id": "b", "prompt": "x", "answer": ""}]
    loaded = load(rows, exclude={"b": ["empty_answer"], "elsewhere": ["spurious"]})
    assert [problem.id for problem in loaded.problems] == ["a"]
    assert (loaded.bad_rows, loaded.excluded) == ([], {"b": ["empty_answer"]})


def test_several_mappings_are_reported_with_counts():
    loaded = load([{"prompt": "a", "label": 1}, GOOD, GOOD])
    assert loaded.mapping == "fastrl: prompt + answer (2 rows), TRL: prompt + label (1 rows)"


def test_every_named_data_set_offers_the_same_fields():
    for name, dataset in DATASETS.items():
        assert dataset.name == name and find_dataset(name) is dataset
        assert ("\\boxed{}" in dataset.default_instruction) == (dataset.default_reward == "math")
    assert DATASETS["arithmetic"].default_reward == "last_character" and DATASETS["gsm8k"].default_reward == "math"


def test_the_embedded_task_loads_without_files():
    loaded = load_problems("arithmetic", split="test", data_dir="/nowhere")
    assert loaded.problems and loaded.problems[0].id == "arithmetic/test/0"
    assert (loaded.bad_rows, loaded.excluded, loaded.mapping) == ([], {}, "generated")


def test_importing_the_package_loads_no_heavy_library():
    code = (
        "import sys, fastrl.data as d; d.load_problems('arithmetic', split='test'); "
        "print([m for m in ('transformers', 'tokenizers', 'pyarrow', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
