"""Reward specs, functions of users, and several rewards together."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastrl.rewards import RewardSet, grade, split_weight, stands_in


@pytest.mark.parametrize(
    "spec, source, weight",
    [
        ("math", "math", 1.0),
        ("exact:0.2", "exact", 0.2),
        ("a/b.py:f", "a/b.py:f", 1.0),
        ("a/b.py:f:-1e-1", "a/b.py:f", -0.1),
    ],
)
def test_split_weight(spec, source, weight):
    assert split_weight(spec) == (source, weight)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("maht", r"no verifier has this name; did you mean 'math'\?"),
        ("maht:0.5", r"did you mean 'math'\?"),
        ("math:high", r"reward math:high: the weight is 'high'; expected a finite number"),
        ("math:nan", r"the weight is 'nan'"),
        ("b.py:f:", r"the weight is ''"),
        ("b.py", r"Write b\.py:function"),
        ("nowhere.py:f", r"no file .*nowhere\.py"),
    ],
)
def test_a_spec_that_cannot_be_used(spec, message):
    with pytest.raises(ValueError, match=message):
        RewardSet([spec])


def test_a_reward_set_refuses_nothing_and_duplicates():
    with pytest.raises(ValueError, match=r"got none; expected one of exact, last_character, .*math or file\.py"):
        RewardSet([])
    with pytest.raises(ValueError, match=r"a second reward named 'exact'"):
        RewardSet(["exact", "exact:0.5"])


def test_grade():
    assert grade([r"\boxed{1/2}", r"\boxed{3}"], ["0.5", "4"]) == [1.0, 0.0]
    assert grade(["it is 2"], ["2"], verifier="exact") == [1.0]
    with pytest.raises(ValueError, match=r"unknown verifier 'exakt'; did you mean 'exact'\?"):
        grade(["2"], ["2"], verifier="exakt")
    with pytest.raises(ValueError, match=r"got 2 completions, 1 answers"):
        grade(["2", "3"], ["2"])


HOSTILE = pytest.mark.promise("C11", trials=1)
FUNCTIONS = r"""
import asyncio, math, os, time

def length(completions, **columns):
    return [float(len(text)) for text in completions]

def level(completions, level):
    return [None if value is None else float(value) for value in level]

def offered(completions, **columns):
    names = "answer" in columns and "completion_ids" in columns
    return [float(len(columns))] * len(completions), {"names": float(names)}

async def slow(prompts, completions):
    await asyncio.sleep(0.01)
    return [float(prompt == text) for prompt, text in zip(prompts, completions)]

def fragile(completions):
    return [1.0 / (text != "bad") for text in completions]

def only_alone(completions):
    return [1.0 / (len(completions) == 1)] * len(completions)

def broken(completions):
    raise KeyError("style")

def leaves(completions):
    raise SystemExit(3)

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "bad":
        raise RuntimeError("cannot")
    return {"score": float(solution_str == ground_truth) + (data_source == "x"), "level": extra_info["level"]}

def sleeps(completions):
    time.sleep(0.3)
    return [0.5] * len(completions)

def forks(completions):
    return [1.0] * len(completions) if os.fork() else [0.0]

def prints(completions):
    for _ in range(100):
        print("\x1b[31m" + "x" * 2**20)
    return [0.5] * len(completions)

def moves(completions):
    os.chdir("/")
    return [0.5] * len(completions)

def empty(completions): return [None] * len(completions)
def needs(completions, colour): return [0.0] * len(completions)
def short(completions): return [0.0]
def words(completions): return ["1.0"] * len(completions)
def not_a_number(completions): return [math.nan] * len(completions)
def infinite(completions): return [math.inf] * len(completions)
def single(completions): return 1.0
def other(a, b): return [0.0]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return path


def score(file, spec, completions=("ab", "c"), **keywords):
    texts = list(completions)
    with RewardSet([f"{file}:{each}" for each in spec.split()]) as rewards:
        return rewards.score(["ab"] * len(texts), texts, ["c"] * len(texts), **keywords)


def test_user_rewards_are_weighted_and_none_is_left_out(file):
    scores = score(file, "length:0.5 level:2", columns={"level": [None, 3]})
    assert scores.each == {"length": [2.0, 1.0], "level": [None, 3.0]}
    assert scores.total == [0.5 * 2, 0.5 * 1 + 2 * 3]
    assert scores.statuses == {} and scores.metrics == {}


def test_user_functions_get_what_they_ask_for(file):
    scores = score(file, "offered", completion_ids=[[1], [2]], columns={"level": [1, 2]})
    # prompts, answers, answer, completion_ids, level
    assert scores.each["offered"] == [5.0, 5.0] and scores.metrics == {"offered/names": 1.0}
    assert score(file, "slow").total == [1.0, 0.0]

    async def in_a_notebook():
        return score(file, "slow").total

    assert asyncio.run(in_a_notebook()) == [1.0, 0.0]


def test_verl_functions_are_called_per_completion(file):
    columns = {"level": [1, 3], "source": ["x", "y"]}
    scores = score(file, "compute_score", columns=columns)
    assert scores.total == [1.0, 1.0] and scores.metrics == {"compute_score/level": 2.0}
    scores = score(file, "compute_score", ["bad", "c"], columns=columns)
    assert scores.total == [0.0, 1.0] and scores.statuses == {"error": 1}


def test_one_completion_that_makes_a_function_raise_costs_only_its_own_reward(file, caplog):
    scores = score(file, "fragile", ["a", "bad", "b", "bad"])
    assert scores.total == [1.0, 0.0, 1.0, 0.0]
    assert scores.statuses == {"error": 2}
    assert len(caplog.records) == 1  # the first one, once
    assert "ZeroDivisionError" in caplog.text and "'bad'" in caplog.text


def test_a_function_that_only_fails_on_the_batch_is_reported(file, caplog):
    assert score(file, "only_alone").total == [1.0, 1.0]
    assert "on the whole batch, but on no completion alone" in caplog.text


@pytest.mark.parametrize(
    "spec, message",
    [
        pytest.param(
            "broken",
            r"reward broken: raised KeyError: 'style' on every one of 2 completions; fix the function",
            marks=HOSTILE,
        ),
        ("leaves", r"reward leaves: raised SystemExit: 3 on every one of 2"),
        ("needs", r"its parameter colour is neither a column of the data nor offered; there are: .*completions"),
        pytest.param("short", r"reward short: got 1 rewards; expected 2, one per completion", marks=HOSTILE),
        pytest.param(
            "words", r"reward words: reward number 0 is '1\.0'; expected a finite float or None", marks=HOSTILE
        ),
        pytest.param("not_a_number", r"reward number 0 is nan; expected", marks=HOSTILE),
        pytest.param("infinite", r"reward number 0 is inf; expected", marks=HOSTILE),
        ("single", r"returned 1\.0; expected a list"),
        ("other", r"it takes \(a, b\); expected f\(prompts, completions, \*\*columns\)"),
        ("lenght", r"no function 'lenght'; did you mean 'length'\?"),
    ],
)
def test_a_user_function_that_cannot_be_used(file, spec, message):
    with pytest.raises(ValueError, match=message):
        score(file, spec)


def test_a_user_file_that_fails_is_named(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("import nothing_of_this_name")
    with pytest.raises(ValueError, match=r"bad\.py:f: importing the file raised ModuleNotFoundError: .*nothing_of"):
        RewardSet([f"{path}:f"])


def test_reward_set_counts_statuses_and_watches_hacks(file):
    prompts = ["What is 3 of 12?", [{"role": "user", "content": r"compute \log_2 64"}], "Add 1 and 2.", "x"]
    completions = [r"\boxed{3}", r"\boxed{\log_2 64}", r"\boxed{13}", "none"]
    golds = ["3", r"\log_2(64)", "3", "3"]
    with RewardSet(["math", f"{file}:length:0"]) as rewards:
        scores = rewards.score(prompts, completions, golds)
        assert scores.statuses == {"right": 2, "wrong": 1, "no_box": 1}
        assert scores.total == [1.0, 1.0, 0.0, 0.0]
        assert scores.metrics == {"reward/answer_in_prompt_frac": 1.0, "reward/unevaluated_frac": 0.0}
        # the same answer to a gold that is evaluated
        gold = [r"6+0\sqrt{2}"]
        scores = rewards.score(["?"], [r"\boxed{\log_2 64}"], gold)
        assert scores.total == [1.0]
        assert scores.metrics == {"reward/answer_in_prompt_frac": 0.0, "reward/unevaluated_frac": 1.0}
        assert rewards.vote_key(r"\boxed{1.50}") == "3/2"
        with pytest.raises(ValueError, match=r"2 completions, 1 answers"):
            rewards.score(["a", "b"], ["a", "b"], ["a"])


def test_reward_set_checks_golds(file):
    with RewardSet(["exact", "math"]) as rewards:
        assert [each.status for each in rewards.check_golds(["4", "", "np.arcsin(10/13)"])] == [
            "right",
            "no_box",
            "unparsed",
        ]
    with RewardSet([f"{file}:length"]) as rewards:
        assert rewards.check_golds(["4"]) is None and rewards.vote_key("4") is None


def test_stands_in():
    assert stands_in("3", "of 3.") and stands_in(r"\log_2 64", r"$\log_2 64$")
    assert not stands_in("3", "13 and 35") and stands_in("3", "13 and 3")


@HOSTILE
def test_none_is_not_applicable_and_no_error(file):
    scores = score(file, "empty")
    assert scores.each == {"empty": [None, None]} and scores.total == [0.0, 0.0] and scores.statuses == {}


@HOSTILE
def test_a_slow_function_is_waited_for(file):
    assert score(file, "sleeps").total == [0.5, 0.5]


@HOSTILE
def test_what_a_function_forks_never_comes_back(file, tmp_path):
    """Two processes that both go on training would write into one run folder."""
    code = (
        "import os, pathlib, sys; from fastrl.rewards import RewardSet\n"
        f"total = RewardSet(['{file}:forks']).score(['ab'], ['c'], ['d']).total\n"
        "pathlib.Path(f'{os.getpid()}.came').write_text(str(total))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    assert [came.read_text() for came in tmp_path.glob("*.came")] == ["[1.0]"]


@HOSTILE
def test_100_mb_of_output_are_only_output(file, capfd):
    assert score(file, "prints").total == [0.5, 0.5]
    assert len(capfd.readouterr().out) > 100 * 2**20


@HOSTILE
def test_a_function_that_changes_the_folder_does_not_move_the_run(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert score(file, "moves").total == [0.5, 0.5]
    assert Path.cwd() == tmp_path
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    assert score(file, "moves").total == [0.5, 0.5]  # a folder that is no longer there is no error either
