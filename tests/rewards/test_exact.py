"""`exact`, `last_character`, and what stands in a box: numbers, boxes and their limits. No processes."""

import os
import subprocess
import sys
from fractions import Fraction

import pytest

import fastrl.rewards
from fastrl.rewards import Exact, LastCharacter, grade
from fastrl.rewards.boxes import last_box
from fastrl.rewards.exact import number
from fastrl.rewards.rules.quantity import quantity
from fastrl.rewards.rules.spelling import clean


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
        ("it is \u22125", "-5", "right"),
        ("-5", "\u22125", "right"),
        ("12\u202f345", "12345", "right"),  # a narrow blank groups digits
        ("it is 12\u00a0345.5", "12345.5", "right"),
        ("12\u202f34", "1234", "wrong"),
        ("12 345", "12345", "wrong"),  # two words
        ("e\u0301te\u0301", "\u00e9t\u00e9", "right"),
        ("cafe", "caf\u00e9", "wrong"),
        ("left\u2009turn", "left turn", "right"),
        ("\uff19", "9", "wrong"),  # full width
    ],
)
def test_exact_grade(text, gold, status):
    with Exact() as exact:
        (got,) = exact.grade([text], [gold])
    assert (got.status, got.reward) == (status, float(status == "right"))


def test_importing_rewards_and_grading_exactly_loads_no_heavy_library():
    code = (
        "import sys, fastrl.rewards as r; r.grade(['1 2'], ['2'], verifier='exact'); r.grade(['\\\\boxed{2}'], ['2']); "
        "print([m for m in ('torch', 'sympy', 'math_verify', 'multiprocessing', 'numpy') if m in sys.modules])"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(fastrl.rewards.__file__)))
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_last_character_reads_the_result_of_single_character_steps():
    texts = ["869", "869 \n", "9", "896", "", "  "]
    assert grade(texts, ["9"] * 6, verifier="last_character") == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    with LastCharacter() as verifier:
        assert [verifier.vote_key(text) for text in ("869", "8 ", "")] == ["9", "8", None]
        assert verifier.check_golds(["9"])[0].status == "right"


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
        (r"\boxed{3} or \boxed 6$", "3, 6"),
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
        (r"$x=\boxed{1}$ or $x=\boxed{2}$", "1, 2"),  # two answers
        (r"\boxed{1}, \boxed{2}, and \boxed{3}", "1, 2, 3"),
        (r"\[\boxed{1} \quad\text{or}\quad \boxed{2}\]", "1, 2"),
        (r"\boxed{2}, \boxed{2}", "2"),
        (r"\boxed{1} no, \boxed{2}", "2"),  # another try
        (r"\boxed{1} or rather \boxed{2}", "2"),
        ("\\boxed{1}\n\nand \\boxed{2}", "2"),
        (r"\boxed{1} and \boxed{}", ""),
    ],
)
def test_last_box(text, content):
    assert last_box(text) == content


@pytest.mark.timeout(20)  # a quadratic search takes minutes
def test_last_box_takes_linear_time():
    assert last_box(r"\boxed{1} or " * 5000) == "1" and last_box(r"\boxed{1}" + "or " * 20000 + r"\boxed{2}") == "2"
    found = {last_box(text) for text in (r"\boxed{" * 9000, "\\boxed" + "{" * 65000, r"\boxed " * 9000)}
    assert found == {None} and last_box(r"\boxed{1}" * 7000) == "1"


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
        ("5 million", 5_000_000),
        (r"5\text{ thousand}", 5000),
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
def test_quantity(text, value):
    found = quantity(clean(text), lenient=True)
    assert (found and found.number.value) == value


@pytest.mark.timeout(20)  # backtracking takes longer than anyone waits
def test_quantity_takes_bounded_time():
    assert quantity(clean("1" * 512), lenient=True).number.value == int("1" * 512)
    for text in ("1," * 256, "1 " * 256, r"\text{a}" * 73, "1" + r"\text{a" * 73):
        assert quantity(clean(text), lenient=True) is None
