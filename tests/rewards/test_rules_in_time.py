"""The rules that read answers: whatever a model writes, they decide at once, without a process."""

import itertools
import random

import pytest

from fastrl.rewards.math import Math
from fastrl.rewards.rules.spelling import spell

TOKENS = r"""1 1, a A \text{a} \text{a { } ( ) \ $ \frac \frac{1}{2} {1\over \over _ ^ ^\circ ' " : 1: \pmod < x<1, \cup
(1,2) , ; = x= x=1, and or . ... \ldots % \% - + / m/ per square \vec{a} \bar{x}' \mathrm{e} \left \color{red} \mathbf{
\textcolor{red}{ \boxed{ 5' \$ \angle A_1 1_2 (A) A. \begin{pmatrix} 1\\ & \begin{cases} \{ \} | \mid \in \ne E I +c
\frac{dx}{dt} \dot{1} 0.\overline{3} ~ \, million dozen USD \mathrm{cm} \cdot""".split()
TOKENS += ["1 ", "a ", "1 000 ", "1 hour ", " or ", " and ", " to ", "\u00bd", "\u221a", "\u00b2", "\u00b0", "\u20ac"]
GOLDS = ["5", r"5\text{ km}", "x^2", "(1,2)", "ABC", "1:2:3", r"(0,2)\cup(3,4)", r"30^\circ", "1,2,3", "B", "f'(x)"]
STATUSES = {"right", "wrong", "no_box", "too_long"}

# a rule that backtracks takes hours
pytestmark = pytest.mark.timeout(60)


def check(verifier: Math, gold: str, answer: str) -> None:
    """A status, or the two texts that are left to math-verify; both ways round."""
    for pair in ((gold, answer), (answer, gold)):
        read = verifier.decide(*map(spell, pair), True)
        assert read in STATUSES if isinstance(read, str) else all(isinstance(text, str) for text in read), pair


@pytest.mark.parametrize("length", [500, 1000])
def test_a_token_that_repeats(length):
    verifier, golds = Math(), itertools.cycle(GOLDS)
    for token in TOKENS:
        base = (token * length)[: length - 8]
        for before, after in (("", ""), ("1", ""), ("", "x!"), (r"\text{", "}"), ("(", ")"), ("5 ", ""), ("1_", "")):
            check(verifier, next(golds), before + base + after)


def test_tokens_in_any_order():
    rng, verifier = random.Random(0), Math()
    for _ in range(2000):
        text = "".join(rng.choice(TOKENS) for _ in range(rng.randint(1, 100)))[: rng.choice([30, 100, 512, 1024])]
        check(verifier, rng.choice(GOLDS), text)
