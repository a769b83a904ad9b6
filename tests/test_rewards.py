import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest

import fastrl.rewards
from fastrl.rewards import Exact, LastCharacter, Math, RewardSet, grade, split_weight, stands_in
from fastrl.rewards.exact import number
from fastrl.rewards.literal import clean, literal
from fastrl.rewards.math import last_box

# (gold, box): expressions on which math-verify itself must decide, and their grade
HARD = [
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", 1.0),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{3}}", 0.0),
    ("(x+1)^2", "x^2+2x+1", 1.0),
    ("(x+1)^2", "x^2+x+1", 0.0),
    ("(1,2)", "[1,2]", 0.0),
    ("1,2", r"\{2,1\}", 1.0),
    ("y=2x+3", "2x-y+3=0", 1.0),
    ("x<5", "5>x", 1.0),
    ("x<5", r"x\le 5", 0.0),
    (r"2\pi", r"\pi+\pi", 1.0),
]
# answers that would run for minutes or fill the memory, none of them right
POISON = [(r"2\pi", text) for text in (r"9^{9^{9^{9}}}", "100000000!", "9!!!!", r"7^{1000000000}")]


def box(text: str) -> str:
    return f"so it is \\boxed{{{text}}}."


def rewards_of(verifier, cases) -> list[float]:
    return [each.reward for each in verifier.grade([box(case[1]) for case in cases], [case[0] for case in cases])]


@pytest.fixture(scope="module")
def verifier():
    with Math(workers=2) as verifier:
        yield verifier


# exact


@pytest.mark.parametrize(
    "text, value",
    [
        ("007", 7),
        ("-3.50", Fraction(-7, 2)),
        ("1,000", 1000),
        (".5", Fraction(1, 2)),
        ("12.", 12),
        ("6/4", Fraction(3, 2)),
        ("0.1", Fraction(1, 10)),
        ("9" * 500, 10**500 - 1),
        ("1,00", None),  # no thousands
        ("4 2", None),
        ("1/0", None),
        ("1e3", None),
        ("٤٢", None),  # Arabic digits
        ("４２", None),  # full-width digits
        ("9" * 513, None),
        ("", None),
    ],
)
def test_number(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text, gold, status",
    [
        ("8 6 9", "9", "right"),
        ("8 6 9", "6", "wrong"),
        ("9 8", "9", "wrong"),
        ("it is 8", "18", "wrong"),
        ("the answer is 1,000", "1000", "right"),
        ("it is 0.50", "1/2", "right"),
        ("025", "25", "right"),
        ("18446744073709551617", "18446744073709551616", "wrong"),  # equal as floats
        ("left turn", "left turn", "right"),  # the whole text
        ("so\n#### 18\nnothing more", "18", "right"),
        ("#### 18 #### 19", "18", "wrong"),  # the last mark counts
        ("#### 5 18", "18", "wrong"),  # after a mark the whole line is the answer
        ("Yes", "no", "wrong"),
        ("", "9", "no_box"),
        (" \n", "9", "no_box"),
        ("9 ####", "9", "no_box"),
        ("", "", "no_box"),  # an empty gold is never earned
        ("9", "", "wrong"),
    ],
)
def test_exact_grade(text, gold, status):
    with Exact() as exact:
        (got,) = exact.grade([text], [gold])
    assert (got.status, got.reward) == (status, float(status == "right"))


def test_exact_is_fast_enough_for_every_step():
    texts, answers = [f"{i % 7} {i % 11} {i % 13}" for i in range(256)], [str(i % 5) for i in range(256)]
    durations = []
    for _ in range(20):
        start = time.perf_counter()
        Exact().grade(texts, answers)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 2e-3


def test_importing_rewards_and_grading_exactly_loads_no_heavy_library():
    code = (
        "import sys, fastrl.rewards as r; r.grade(['1 2'], ['2'], verifier='exact'); r.grade(['\\\\boxed{2}'], ['2']); "
        "print([m for m in ('torch', 'sympy', 'math_verify', 'multiprocessing', 'numpy') if m in sys.modules])"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(fastrl.rewards.__file__)))
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# boxes and numbers


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{a \\ b}", r"a \\ b"),
        (r"\boxed{x=\boxed{5}}", "5"),
        (r"\boxed {7}", "7"),
        (r"\boxed 6. Done", "6"),
        (r"\boxed{3} or \boxed 6$", "6"),
        (r"{ { \boxed{4}", "4"),
        (r"} \boxed{4}", "4"),
        (r"\\boxed{8}", "8"),  # escaped once too often
        (r"\boxed{42} and \boxed{4", "42"),  # the last balanced one
        (r"\boxed{42", None),
        (r"\boxed", None),
        (r"\boxedtext{4}", None),
        ("42", None),
        ("", None),
        (r"\boxed{1}" + " " * 70_000, None),  # outside of the tail
    ],
)
def test_last_box(text, content):
    assert last_box(text) == content


def test_last_box_takes_linear_time():
    for text in (r"\boxed{" * 9000, r"\boxed{1}" * 7000, "\\boxed" + "{" * 65000, r"\boxed " * 9000):
        start = time.perf_counter()
        last_box(text)
        assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    "text, value",
    [
        (r"\$18", 18),
        (r"1{,}000", 1000),
        (r"10,\!000", 10000),
        (r"\dfrac{-1}{2}", Fraction(-1, 2)),
        (r"-\frac12", Fraction(-1, 2)),
        (r"3\frac{1}{2}", Fraction(7, 2)),
        (r"4.5 \times 10^{3}", 4500),
        (r"10^{-2}", Fraction(1, 100)),
        ("2e3", 2000),
        ("x = 18", 18),
        (r"f(2) = -3", -3),
        (r"\text{42}", 42),
        (r"42\text{ cm}^2", 42),
        (r"42\,\mathrm{m}/\mathrm{s}^2", 42),
        (r"90^\circ", 90),
        ("5 apples", 5),
        ("\u22125", -5),
        ("4 2", None),
        ("5x", None),
        ("5 x", None),
        (r"2\pi", None),
        ("2 pi", None),
        ("5 million", None),
        (r"5\text{ thousand}", None),
        (r"42\text{ (or anything)}", None),
        (r"42\text{ or 43}", None),
        ("42 or 43", None),
        ("41, 42", None),
        ("[42]", None),
        ("6*7", None),
        ("43-1", None),
        ("10_{2}", None),
        (r"5 \pm 0", None),
        ("10^{100000000}", None),
        ("1e9999", None),
        (r"\frac{1}{0}", None),
        ("1+1=2", None),
        ("42=x=7", None),
        ("4\u200b2", None),
    ],
)
def test_literal(text, value):
    found = literal(clean(text), lenient=True)
    assert (found and found.value) == value


def test_literal_takes_bounded_time():
    for text in ("1" * 512, "1," * 256, "1 " * 256, r"\text{a}" * 73, "1" + r"\text{a" * 73, "1 " + "a " * 255):
        start = time.perf_counter()
        literal(clean(text), lenient=True)
        assert time.perf_counter() - start < 0.05


# math


@pytest.mark.parametrize(
    "gold, answer, status",
    [
        ("18", "18", "right"),
        ("18", "x=18", "right"),
        ("18", r"\$18", "right"),
        ("18", r"18\%", "right"),
        ("18", "18.0", "right"),
        ("18", r"\frac{36}{2}", "right"),
        (r"18\%", "0.18", "right"),
        (r"18\%", r"1800\%", "wrong"),
        (r"18\%", r"0.18\%", "wrong"),
        ("0.5", r"50\%", "right"),
        ("1000", "1,000", "right"),
        ("025", "25", "right"),
        ("1/3", r"\frac{1}{3}", "right"),
        ("1/3", "0.333333", "right"),
        ("1/3", "0.333", "wrong"),
        ("1/3", "0.333334", "wrong"),
        ("5", "5.0000001", "wrong"),
        ("5 km", r"5\text{ km}", "right"),
        ("5 km", "5", "right"),
        ("5 xy", "5", "wrong"),
        ("1", "1.0000000000000001", "wrong"),
        ("123456789012345678901", "123456789012345678902", "wrong"),
        ("$42$", "42", "right"),
        (r"\text{B}", "B", "right"),
        ("5050", r"\sum_{i=1}^{100} i", "wrong"),
        ("42", "6*7", "wrong"),
        ("42", r"\{42\}", "wrong"),
        ("10", "10_{2}", "wrong"),
        ("52_8", "52_{8}", "right"),
        ("52_8", "52", "right"),  # the problem names the base
        ("52_8", "52_9", "wrong"),
        ("52_8", "42", "wrong"),
        ("A_1", "A_{1}", "right"),  # a subscript and no base
        ("16,3,1,1", "1,16,3,1", "right"),
        ("16,3,1,1", "16,3,1", "wrong"),
        ("16,3,1,1", "16,16,3,1", "wrong"),
        ("x,x,2y", "2y, x, x", "right"),
        ("x,x,2y", "x,2y,2y", "wrong"),
        (r"5\text{ in}^2", r"5\text{ in}^2", "right"),
        (r"5\text{ in}^2", "5", "right"),
        (r"5\text{ in}^2", r"5\text{ in}^3", "wrong"),
        ("(1,2)", r"\left( 1, 2 \right)", "right"),
        ("(1,2)", "(2,1)", "wrong"),
        ("(1,2)", "(1,2,3)", "wrong"),
        (r"(-1,\frac{1}{2}]", "(-1,0.5]", "right"),
        (r"(-1,\frac{1}{2}]", "(-1,0.5)", "wrong"),
        ("1,2", "2, 1", "right"),
        ("1,2", "2,3", "wrong"),
        ("a + b + c", "c+b+a", "right"),
        ("a + b + c", "a + b + d", "wrong"),
        (r"\sin^2 t", r"1-\cos^2 t", "right"),
        (r"\sin^2 t", r"\sin^2 x", "wrong"),
        (r"\sqrt{3}\text{ cm}", r"\sqrt 3", "right"),
        (r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{3}", "unparsed"),
        ("2x", "2" * 513, "too_long"),
        ("2x", "(" * 25 + "x" + ")" * 25, "too_long"),
        ("2x", "", "no_box"),
        ("", "", "no_box"),
    ],
)
def test_math_grade(verifier, gold, answer, status):
    (got,) = verifier.grade([box(answer)], [gold])
    assert (got.status, got.reward) == (status, float(status == "right"))


def test_without_numeric_only_math_verify_evaluates_the_answer():
    with Math(workers=1, numeric_only=False) as verifier:
        statuses = [each.status for each in verifier.grade([box("6*7"), box("6*8"), box("42_{10}")], ["42"] * 3)]
    assert statuses == ["right", "wrong", "wrong"]


def test_a_completion_without_a_box_earns_nothing(verifier):
    (got,) = verifier.grade(["The answer is 42."], ["42"])
    assert (got.reward, got.status) == (0.0, "no_box")


def test_math_verify_decides_the_rest(verifier):
    assert rewards_of(verifier, HARD) == [case[2] for case in HARD]


def test_golds_are_checked_by_more_than_their_text(verifier):
    golds = ["42", r"\frac{\sqrt{3}}{2}", r"\text{Evelyn}", "np.arcsin(10/13)", "", "x" * 600]
    statuses = [each.status for each in verifier.check_golds(golds)]
    assert statuses == ["right", "right", "right", "unparsed", "no_box", "too_long"]


def test_vote_key(verifier):
    keys = [verifier.vote_key(box(text)) for text in ("0.5", r"\frac12", r"\dfrac{1}{2}", "x = 1/2")]
    assert keys == ["1/2"] * 4
    assert verifier.vote_key(box(r"\dfrac{\sqrt2}{2}")) == verifier.vote_key(box(r" \frac{\sqrt2}{2}"))
    assert verifier.vote_key("no box") is None and verifier.vote_key(box("")) is None
    assert Exact().vote_key("1 2 06") == "6" and Exact().vote_key(" ") is None


def test_grades_do_not_depend_on_the_other_answers():
    """A twentieth of the batch is poison; the rest is graded as without it, in any order, by one worker or two."""
    healthy = HARD * 8
    batch = [*healthy[:20], POISON[0], *healthy[20:50], POISON[1], *healthy[50:], POISON[2], POISON[3]]
    expected = [case[2] if len(case) == 3 else 0.0 for case in batch]
    for workers, order in ((2, 1), (1, -1)):
        with Math(workers=workers, cpu_s=0.5) as verifier:
            assert rewards_of(verifier, batch[::order]) == expected[::order]


def test_a_soft_timeout_is_no_wrong_answer_and_takes_the_cpu_limit():
    with Math(workers=1, cpu_s=0.3) as verifier:
        verifier.grade([box("x")], ["2x"])  # starts the process
        start = time.monotonic()
        (got,) = verifier.grade([box(POISON[0][1])], ["2x"])
        assert got.status == "soft_timeout"
        assert 0.25 < time.monotonic() - start < 3


def test_code_that_python_cannot_interrupt_is_killed():
    with Math(workers=1, cpu_s=30, kill_cpu_s=0.3) as verifier:
        start = time.monotonic()
        (got, right) = verifier.grade([box(POISON[3][1]), box("x+x")], ["2x", "2x"])
        assert time.monotonic() - start < 20  # before the wall limit
    assert (got.status, right.status) == ("hard_timeout", "right")


def test_a_worker_that_does_not_run_is_killed_after_the_wall_limit():
    with Math(workers=1, wall_s=0.5) as verifier:
        assert rewards_of(verifier, HARD[:1]) == [1.0]
        os.kill(verifier.workers.pids[0], signal.SIGSTOP)
        statuses = [each.status for each in verifier.grade([box("x+x"), box("3x-x")], ["2x", "2x"])]
    assert statuses == ["hard_timeout", "right"]


def test_an_answer_under_which_every_worker_is_lost_dies_alone():
    graded = []
    with Math(workers=1, cpu_s=30, kill_cpu_s=30) as verifier:
        batch = [box("9!!!!"), box("x+x")]
        thread = threading.Thread(target=lambda: graded.extend(verifier.grade(batch, ["2x", "2x"])))
        thread.start()
        killed = set()
        while len(killed) < 3:
            for pid in set(verifier.workers.pids) - killed:
                if cpu_s(pid) > 0.7:  # past its start, in the endless answer
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
            time.sleep(0.01)
        thread.join()
    assert [each.status for each in graded] == ["died", "right"]


def cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/schedstat") as nanoseconds:
        return int(nanoseconds.read().split()[0]) / 1e9


def test_a_worker_is_limited_and_is_replaced_before_its_memory_is_full():
    with Math(workers=1) as verifier:
        rewards_of(verifier, HARD[:1])
        (pid,) = verifier.workers.pids
        with open(f"/proc/{pid}/limits") as lines:
            limits = {line[:26].strip(): line[26:].split()[:2] for line in lines}
        assert limits["Max address space"] == [str(2**30)] * 2
        assert limits["Max file size"] == limits["Max core file size"] == ["0", "0"]
        rewards_of(verifier, HARD)
        assert verifier.workers.pids == [pid]
    # sympy alone fills more than a half of this
    with Math(workers=1, memory_mib=110) as verifier:
        rewards_of(verifier, HARD[:1])
        (pid,) = verifier.workers.pids
        assert rewards_of(verifier, HARD) == [case[2] for case in HARD]
        assert pid not in verifier.workers.pids


@pytest.mark.parametrize("moment", ["idle", "busy"])
def test_killing_workers_changes_no_grade(verifier, moment):
    expected = [case[2] for case in HARD]
    for delay_s in (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1):
        rewards_of(verifier, HARD[:2])
        pid = verifier.workers.pids[0]
        if moment == "idle":
            os.kill(pid, signal.SIGKILL)
            time.sleep(delay_s)  # its end is seen by the next write, or only by the read after it
            killer = None
        else:
            killer = threading.Timer(delay_s, os.kill, (pid, signal.SIGKILL))
            killer.start()
        start = time.monotonic()
        assert rewards_of(verifier, HARD) == expected
        assert time.monotonic() - start < 10
        if killer:
            killer.join()


def test_workers_that_cannot_start_are_an_error_and_no_reward(monkeypatch):
    verifier = Math(workers=1)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    broken = Math(workers=1)
    with pytest.raises(RuntimeError, match=r"3 processes in a row ended before they were ready"):
        broken.grade([box("x+x")], ["2x"])
    assert rewards_of(verifier, HARD[:1]) == [1.0]
    verifier.close()


def test_grading_works_in_threads_and_inside_an_event_loop(verifier):
    expected = [case[2] for case in HARD]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: rewards_of(verifier, HARD), range(8))) == [expected] * 8

    async def inside():
        return rewards_of(verifier, HARD)

    assert asyncio.run(inside()) == expected


def test_workers_see_no_secret_and_end_with_close(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-token")
    verifier = Math(workers=2)
    rewards_of(verifier, HARD)
    pids = verifier.workers.pids
    assert len(pids) == 2
    for pid in pids:
        with open(f"/proc/{pid}/environ", "rb") as environment:
            assert b"canary-token" not in environment.read()
    verifier.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert rewards_of(verifier, HARD[:2]) == [1.0, 0.0]  # a closed verifier starts again
    verifier.close()


# specs


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


def test_last_character_reads_the_result_of_single_character_steps():
    texts = ["869", "869 \n", "9", "896", "", "  "]
    assert grade(texts, ["9"] * 6, verifier="last_character") == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    with LastCharacter() as verifier:
        assert [verifier.vote_key(text) for text in ("869", "8 ", "")] == ["9", "8", None]
        assert verifier.check_golds(["9"])[0].status == "right"


def test_a_reward_set_refuses_nothing_and_duplicates():
    with pytest.raises(ValueError, match=r"got none; expected one of exact, last_character, math or file\.py:function"):
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


# functions of users

FUNCTIONS = r"""
import asyncio, math

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
        ("broken", r"reward broken: raised KeyError: 'style' on every one of 2 completions; fix the function"),
        ("leaves", r"reward leaves: raised SystemExit: 3 on every one of 2"),
        ("needs", r"its parameter colour is neither a column of the data nor offered; there are: .*completions"),
        ("short", r"reward short: got 1 rewards; expected 2, one per completion"),
        ("words", r"reward words: reward number 0 is '1\.0'; expected a finite float or None"),
        ("not_a_number", r"reward number 0 is nan; expected"),
        ("infinite", r"reward number 0 is inf; expected"),
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


# reward sets


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
