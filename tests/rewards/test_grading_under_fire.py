"""Grades under fire: poison, killed processes, full memory, busy processors, threads. Healthy ones never move."""

import asyncio
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastrl.rewards.math import Math

pytestmark = pytest.mark.timeout(1800)

# answers that run for minutes, fill the memory, or cannot be interrupted, none of them right
POISON = [
    r"9^{9^{9^{9}}}",
    "100000000!",
    "9!!!!",
    r"7^{1000000000}",
    r"\binom{10^9}{5\cdot 10^8}",
    r"(10^{10^{10}})!",
    r"\cos(10^{1000000})",
    r"\sqrt[1000000007]{2^{1000000000}}",
    r"\prod_{i=1}^{10^7} i",
    r"2^{2^{2^{2^{2^{2}}}}}",
]


def healthy(count: int, seed: int) -> list[tuple[str, str, str]]:
    """(gold, completion, status): numbers, fractions, roots, tuples, polynomials, intervals; a third are wrong."""
    rng, cases = random.Random(seed), []
    for i in range(count):
        a, b = rng.randint(2, 60), rng.randint(2, 60)
        off = i % 3 == 0
        end = "]" if off else ")"
        gold, answer = rng.choice(
            [
                (str(a), str(a + off)),
                (str(a), f"{a + off}.0"),
                (rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{2 * a + off}}}{{{2 * b}}}"),
                (rf"\frac{{{a}}}{{{b}}}", f"{3 * a + off}/{3 * b}"),
                (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b + off}}}"),
                (f"({a},{b})", f"({a}, {b + off})"),
                (f"(x+{a})^2", f"x^2+{2 * a}x+{a * a + off}"),
                (f"[{a},{a + b})", f"[{a},{a + b}{end}"),
            ]
        )
        text = f"{'so ' * rng.randint(1, 300)}\\boxed{{{answer}}}."
        cases.append((gold, text, "wrong" if off else "right"))
    return cases


@pytest.fixture(scope="module")
def verifier():
    with Math(workers=2) as verifier:
        yield verifier


def statuses(verifier: Math, cases) -> list[str]:
    return [each.status for each in verifier.grade([case[1] for case in cases], [case[0] for case in cases])]


@pytest.mark.promise("C6", trials=0)
def test_every_healthy_case_has_the_status_it_was_made_with(verifier):
    cases = healthy(60, seed=0)
    assert statuses(verifier, cases) == [case[2] for case in cases]


# C3: a twentieth is poison, and nothing else moves
@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.promise("C3", trials=1)
def test_75_poisoned_answers_among_1500_change_no_other_grade(seed):
    cases, rng = healthy(1500, seed), random.Random(seed)
    mixed = cases + [("2\\pi", f"\\boxed{{{rng.choice(POISON)}}}", "") for _ in range(75)]
    rng.shuffle(mixed)
    with Math(workers=2) as verifier:
        got = statuses(verifier, mixed)
    assert [s for s, case in zip(got, mixed, strict=True) if case[2]] == [case[2] for case in mixed if case[2]]
    poisoned = [s for s, case in zip(got, mixed, strict=True) if not case[2]]
    assert "right" not in poisoned and len(poisoned) == 75


# C4: lost processes
def batches_with_a_killer(verifier: Math, count: int, seed: int, kill, each: int = 1) -> None:
    """No grade moves, and as many processes are started as were killed, `each` at a time."""
    cases, rng = healthy(30, seed), random.Random(seed)
    statuses(verifier, cases)
    seen = set(verifier.workers.pids)
    for _ in range(count):
        timer = threading.Timer(rng.choice([0.0, 0.002, 0.01, 0.05]), kill, (verifier,))
        timer.start()
        start = time.monotonic()
        assert statuses(verifier, cases) == [case[2] for case in cases]
        assert time.monotonic() - start < 60
        timer.join()  # a late one kills after the batch, and is noticed in the next
        seen |= set(verifier.workers.pids)
    assert len(seen) <= 2 + each * count


def kill_one(verifier: Math) -> None:
    os.kill(verifier.workers.pids[0], signal.SIGKILL)


def kill_all(verifier: Math) -> None:
    for pid in verifier.workers.pids:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.promise("C4", trials=2)
def test_a_killed_worker_changes_no_grade(verifier):
    batches_with_a_killer(verifier, 2, 0, kill_one)


@pytest.mark.soak
@pytest.mark.promise("C4", trials=38)
def test_38_killed_workers_change_no_grade(verifier):
    batches_with_a_killer(verifier, 38, 1, kill_one)


@pytest.mark.soak
@pytest.mark.promise("C4", trials=5)
def test_all_workers_killed_at_once_change_no_grade(verifier):
    batches_with_a_killer(verifier, 5, 2, kill_all, each=2)


@pytest.mark.soak
@pytest.mark.parametrize("trial", range(5))
@pytest.mark.promise("C4", trials=1)
def test_a_worker_whose_memory_is_full_is_replaced_and_changes_no_grade(trial):
    """The limit of each process is set below what it holds, so that its next larger allocation fails."""
    cases = healthy(120, seed=30 + trial)
    with Math(workers=2) as verifier:
        statuses(verifier, [("2x", r"\boxed{x+x}"), ("2x", r"\boxed{3x-x}")])  # starts both
        before = verifier.workers.pids
        for pid in before:
            held = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
            resource.prlimit(pid, resource.RLIMIT_AS, (held - 2**25,) * 2)
        assert statuses(verifier, cases) == [case[2] for case in cases]
        assert set(before) - set(verifier.workers.pids)  # at least one was full


# C5: where a trainer may call it from
@pytest.mark.promise("C5", trials=1)
def test_grades_from_threads(verifier):
    cases = healthy(20, seed=4)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: statuses(verifier, cases), range(4))) == [[case[2] for case in cases]] * 4


@pytest.mark.promise("C5", trials=1)
def test_grades_inside_a_running_event_loop(verifier):
    cases = healthy(20, seed=5)

    async def inside():
        there = await asyncio.to_thread(statuses, verifier, cases)
        return statuses(verifier, cases), there

    assert asyncio.run(inside()) == ([case[2] for case in cases],) * 2


@pytest.mark.promise("C5", trials=1)
def test_grades_in_an_interpreter_without_a_main_file():
    """As in a notebook: no module that a child process could import, and no guard around the code."""
    code = (
        "from fastrl.rewards import Math\n"
        "verifier = Math(workers=2)\n"
        "print([g.status for g in verifier.grade([r'\\boxed{x+x}', r'\\boxed{3x}'], ['2x', '2x'])])\n"
        "verifier.close()\n"
    )
    done = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "['right', 'wrong']", done.stderr


# C6: the same grades from any order, any number of processes, and under load
@pytest.mark.soak
@pytest.mark.parametrize("trial", range(5))
@pytest.mark.promise("C6", trials=1)
def test_1500_grades_do_not_depend_on_order_workers_or_load(trial):
    cases = healthy(1500, seed=10 + trial)
    cases += [("2\\pi", "\\boxed{9^{9^{9^{9}}}}", "soft_timeout"), ("2\\pi", "no box", "no_box")]
    random.Random(trial).shuffle(cases)
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(6)]
    try:
        with Math(workers=[1, 2, 8][trial % 3], wall_s=300) as verifier:
            assert statuses(verifier, cases) == [case[2] for case in cases]
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


# C10: what a policy tries, and what it earns
HACKS = [
    ("5050", r"\boxed{\sum_{i=1}^{100} i}", "wrong"),  # the problem, not evaluated
    ("42", r"\boxed{6*7}", "wrong"),
    ("42", r"\boxed{43-1}", "wrong"),
    ("120", r"\boxed{5!}", "wrong"),
    ("6", r"\boxed{\log_2 64}", "wrong"),
    ("10", r"\boxed{10_{2}}", "wrong"),
    ("42", r"\boxed{42\text{ (or anything)}}", "wrong"),
    ("42", r"\boxed{41 or 42}", "wrong"),
    ("42", r"\boxed{41, 42}", "wrong"),
    ("42", r"\boxed{[42]}", "wrong"),
    ("42", r"\boxed{\{42\}}", "wrong"),
    ("5", r"\boxed{5 \pm 0}", "wrong"),
    ("42", r"\boxed{41} or \boxed{42} or \boxed{43}", "wrong"),  # the last box counts
    ("42", r"\boxed{41} no, \boxed{42}", "right"),
    ("42", r"\boxed{\boxed{42}}", "right"),
    ("42", r"\boxed{42", "no_box"),
    ("42", "42", "no_box"),
    ("42", r"It is 42. \boxed{}", "no_box"),
    ("42", r"\boxed{answer: 42}", "wrong"),
    ("42", r"\boxed{42 is the answer}", "right"),  # letters after a number are read as its unit
    ("42", "\\boxed{\uff14\uff12}", "wrong"),  # full-width digits
    ("42", "\\boxed{\u0664\u0662}", "wrong"),  # Arabic digits
    ("42", r"\boxed{4 2}", "wrong"),
    ("42", "\\boxed{4\u200b2}", "wrong"),  # zero width
    ("1000", r"\boxed{1,000}", "right"),
    ("0.5", r"\boxed{50\%}", "right"),
    ("1/3", r"\boxed{0.333}", "wrong"),
    ("1/3", r"\boxed{0.333333}", "right"),
    ("12345678901234567890", r"\boxed{12345678901234567891}", "wrong"),
    ("True", r"\boxed{1 == 1}", "wrong"),
]


@pytest.mark.parametrize("gold, text, status", HACKS, ids=range(len(HACKS)))
@pytest.mark.promise("C10", trials=1)
def test_what_a_hack_earns(verifier, gold, text, status):
    assert len(HACKS) == 30
    (grade,) = verifier.grade([text], [gold])
    assert (grade.status, grade.reward) == (status, float(status == "right"))


def test_memory_that_runs_out_in_a_comparison_is_no_opinion(monkeypatch):
    """None would be kept, and answer for the same pair once there is memory again."""
    import sympy

    from fastrl.rewards import equality

    def full(*args):
        raise MemoryError

    x, y = sympy.symbols("x y")
    monkeypatch.setattr(equality, "at", full)
    with pytest.raises(MemoryError):
        equality.same(x, y + 1)
    monkeypatch.undo()
    assert equality.same(x, y + 1) is False
