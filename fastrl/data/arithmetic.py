"""The embedded task: chains of one-digit operations, evaluated from left to right modulo 10.

    3+5*2-7=  ->  869        3+5 = 8, 8*2 = 16 -> 6, 6-7 = -1 -> 9; the answer is the last digit

A completion writes one digit per operation, so a chain of n operations needs n right digits in a row and success falls
with n. Problems and demonstrations are functions of (seed, split, index) alone.
"""

import random
from dataclasses import dataclass

from fastrl.base.types import DataError, Problem

OPERATORS = {"+": lambda a, b: (a + b) % 10, "-": lambda a, b: (a - b) % 10, "*": lambda a, b: (a * b) % 10}


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Generated problems; the train and test splits share no prompt."""

    name: str = "arithmetic"
    num_train: int = 8192
    num_test: int = 512
    min_operations: int = 2
    max_operations: int = 8

    def load(self, split: str) -> list[Problem]:
        """split "train" | "test" -> its problems, always the same ones."""
        if split not in ("train", "test"):
            raise DataError(f"arithmetic has the splits train and test, got {split!r}")
        problems: dict[str, Problem] = {}
        for part, size in (("test", self.num_test), ("train", self.num_train)):
            rng = random.Random(f"arithmetic/{part}")  # noqa: S311 (problems, not secrets)
            start = len(problems)
            while len(problems) < start + size:
                prompt = self.prompt(rng)
                if prompt not in problems:
                    identity = f"arithmetic/{part}/{len(problems) - start}"
                    problems[prompt] = Problem(id=identity, prompt=prompt, answer=str(steps(prompt)[-1]))
            if part == split:
                return list(problems.values())[start:]
        raise AssertionError(split)

    def prompt(self, rng: random.Random) -> str:
        count = rng.randint(self.min_operations, self.max_operations)
        return str(rng.randrange(10)) + "".join(rng.choice("+-*") + str(rng.randrange(10)) for _ in range(count)) + "="


def steps(prompt: str) -> list[int]:
    """`3+5*2-7=` -> [8, 6, 9], the right intermediate results."""
    value, results = int(prompt[0]), []
    for operator, digit in zip(prompt[1:-1:2], prompt[2::2], strict=True):
        value = OPERATORS[operator](value, int(digit))
        results.append(value)
    return results


def demonstration(prompt: str, error_rate: float, rng: random.Random) -> str:
    """A worked completion; each operation is wrong with probability `error_rate`, and the rest follows from it."""
    value, digits = int(prompt[0]), []
    for operator, digit in zip(prompt[1:-1:2], prompt[2::2], strict=True):
        value = OPERATORS[operator](value, int(digit))
        if rng.random() < error_rate:
            value = (value + rng.randrange(1, 10)) % 10
        digits.append(str(value))
    return "".join(digits)
