"""Answers that do not accept themselves are left out and listed; too many of them, and timeouts, are said aloud."""

import subprocess
import sys

import pytest

from fastrl.base.types import DataError, Problem
from fastrl.data import DATASETS, load_problems
from fastrl.data.task import gradable
from fastrl.rewards import Math, RewardSet
from fastrl.step.metrics import lost_grades

UNREADABLE = [r"np.arcsin(10/13)", r"A\cap B", r"q\Rightarrow p", r"\mathbb{R}^+", r"m_{\max }=n^{2}-n-1"]


@pytest.fixture(scope="module")
def rewards():
    with RewardSet(["math"], workers=2) as rewards:
        yield rewards


def problems(good: int, bad: int) -> list[Problem]:
    """Bad ones spread among good ones."""
    total = good + bad
    places = {1 + i * total // bad for i in range(bad)} if bad else set()
    return [
        Problem(id=f"p{i}", prompt="?", answer=UNREADABLE[i % len(UNREADABLE)] if i in places else str(i))
        for i in range(1, total + 1)
    ]


@pytest.mark.promise("C8", trials=1)
def test_15_of_1000_refused_golds_end_the_run(rewards):
    with pytest.raises(DataError) as caught:
        gradable("rows.jsonl", problems(985, 15), rewards)
    assert caught.value.exit_code == 3
    said = str(caught.value)
    assert said.startswith(
        "rows.jsonl: 15 of 1000 answers earn nothing when given as their own solution, and 1% may be so"
    )
    assert "p1: " in said and "(unparsed)" in said and "and 10 more" in said


def test_10_of_1000_refused_golds_are_left_out_and_listed(rewards):
    kept, refused = gradable("rows.jsonl", problems(990, 10), rewards)
    assert len(kept) == 990 and len(refused) == 10 and refused[0] == "p1 (unparsed)"
    assert not {p.id for p in kept} & {line.split()[0] for line in refused}


@pytest.mark.parametrize(
    "good, bad, borne",
    [(95, 5, True), (94, 6, False), (267, 5, True), (266, 6, False), (19, 1, True), (18, 2, False), (1, 1, False)],
)
def test_a_small_set_may_have_a_few_refused_golds(rewards, good, bad, borne):
    if borne:
        assert len(gradable("x", problems(good, bad), rewards)[0]) == good
    else:
        with pytest.raises(DataError, match=f"x: {bad} of {good + bad} answers"):
            gradable("x", problems(good, bad), rewards)


def test_user_functions_refuse_no_gold(tmp_path):
    (tmp_path / "f.py").write_text("def zero(completions): return [0.0] * len(completions)")
    with RewardSet([f"{tmp_path / 'f.py'}:zero"]) as rewards:
        assert gradable("x", problems(1, 1), rewards)[1] == []


SETS = [
    (name, split)
    for name in DATASETS
    for split in ("train", "test")
    if name not in ("arithmetic", "math")
    and (name, split)
    in {
        ("gsm8k", "train"),
        ("gsm8k", "test"),
        ("math500", "test"),
        ("aime24", "test"),
        ("amc23", "test"),
        ("minerva", "test"),
        ("olympiadbench", "test"),
        ("hmmt", "test"),
    }
]


@pytest.mark.soak
@pytest.mark.realdata
@pytest.mark.parametrize("name, split", [*SETS, ("math", "train")])
@pytest.mark.promise("C8", trials=1)
def test_no_named_data_set_ends_a_run(rewards, data_dir, name, split):
    loaded = load_problems(name, split=split, data_dir=str(data_dir))
    kept, refused = gradable(name, loaded.problems, rewards)
    assert len(kept) + len(refused) == len(loaded.problems) and kept


@pytest.mark.promise("C9", trials=1)
def test_every_way_to_fail_is_counted_apart_and_timeouts_ring():
    texts = ["\\boxed{x+x}"] * 95 + ["\\boxed{3x}", "none", "\\boxed{" + "x" * 600 + "}", "\\boxed{A\\cap B}"]
    # none of these takes memory, so a fast machine too interrupts them; (10^8!)! is out of memory after a second
    endless = ["\\boxed{9^{9^{9^{9}}}}", "\\boxed{8^{9^{9^{9}}}}", "\\boxed{9!!!!}"]
    with RewardSet(["math"]) as rewards:
        rewards.verifiers = [Math(workers=2, cpu_s=1.0)]
        quiet = rewards.score([""] * 101, texts + endless[:2], ["2x"] * 101).statuses
        loud = rewards.score([""] * 102, texts + endless, ["2x"] * 102).statuses
    assert quiet == {"right": 95, "wrong": 1, "no_box": 1, "too_long": 1, "unparsed": 1, "soft_timeout": 2}
    assert lost_grades(quiet | {"truncated": 50}) == []  # 2 of 101
    [line] = lost_grades(loud | {"truncated": 50})
    assert line.startswith("ALARM: 3 of 102 answers got no grade in time and earn 0: 3 soft_timeout.")
    [line] = lost_grades({"right": 90.0, "hard_timeout": 1.0, "died": 2.0})
    assert "3 of 93 answers got no grade in time and earn 0: 1 hard_timeout, 2 died" in line
    assert lost_grades({}) == [] and lost_grades({"truncated": 9.0}) == []


SLOW_AT_FIRST = (
    r"\omega_{n}^{2} e^{-\zeta \omega_{n} t} \cos \left(\omega_{n} \sqrt{1-\zeta^{2}} t\right)"
    r"-\frac{\zeta \omega_{n}^{2}}{\sqrt{1-\zeta^{2}}} e^{-\zeta \omega_{n} t} \sin \left(\omega_{n} t\right)"
)
CPU_SECONDS = """
import sys, time
import math_verify
from fastrl.rewards.math_worker import parse_gold
begin = time.process_time()
assert parse_gold(sys.argv[1]) is not None
print(time.process_time() - begin)
"""


def test_a_gold_that_is_late_in_a_cold_process_is_asked_once_more():
    """What its first reading takes is measured, and three fourths of that are allowed, or somewhat more or less."""
    command = [sys.executable, "-c", CPU_SECONDS, SLOW_AT_FIRST]
    cold_s = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    found = []
    for share in (0.75, 0.65, 0.85):
        with Math(workers=1, cpu_s=share * cold_s) as once, Math(workers=1, cpu_s=share * cold_s) as twice:
            [grade] = once.grade([once.as_completion(SLOW_AT_FIRST)], [SLOW_AT_FIRST + " + 0"])
            [gold] = twice.check_golds([SLOW_AT_FIRST])
        found.append((grade.status, gold.status))
        if found[-1] == ("soft_timeout", "right"):
            return
    raise AssertionError(f"(graded once, checked) {found}, with a first reading of {cold_s:.2f} s")
