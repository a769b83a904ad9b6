"""`math`: which answers earn a reward, and that nothing an answer does reaches another one."""

import asyncio
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastrl.rewards import Exact, Math

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
        (r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{3}", "wrong"),
        (r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}", r"\frac{E_1+2E_2}{3}", "right"),
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
        statuses = [each.status for each in verifier.grade([box("6*7"), box("6*8"), box("101010_2")], ["42"] * 3)]
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


@pytest.mark.promise("C3", trials=0)  # a small one
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


@pytest.mark.promise("C2", trials=0)  # a small one
def test_code_that_python_cannot_interrupt_is_killed():
    with Math(workers=1, cpu_s=30, kill_cpu_s=0.3) as verifier:
        start = time.monotonic()
        (got, right) = verifier.grade([box(POISON[3][1] + "x"), box("x+x")], ["2x", "2x"])
        assert time.monotonic() - start < 20  # before the wall limit
    assert (got.status, right.status) == ("hard_timeout", "right")


def test_a_worker_that_does_not_run_is_killed_after_the_wall_limit():
    with Math(workers=1, wall_s=3.0) as verifier:
        assert rewards_of(verifier, HARD[:1]) == [1.0]
        os.kill(verifier.workers.pids[0], signal.SIGSTOP)
        statuses = [each.status for each in verifier.grade([box("x+x"), box("3x-x")], ["2x", "2x"])]
    assert statuses == ["hard_timeout", "right"]


@pytest.mark.promise("C4", trials=0)  # a small one
def test_an_answer_under_which_every_worker_is_lost_dies_alone():
    graded = []
    with Math(workers=1, cpu_s=30, kill_cpu_s=30) as verifier:
        batch = [box("9!!!!"), box("x+x")]
        thread = threading.Thread(target=lambda: graded.extend(verifier.grade(batch, ["2x", "2x"])))
        thread.start()
        killed = set()
        while len(killed) < 3:
            for pid in set(verifier.workers.pids) - killed:
                if cpu_s(pid) > 2.0:  # past its start, in the endless answer
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


@pytest.mark.promise("C4", trials=0)  # a small one
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
