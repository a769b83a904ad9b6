"""Faults on purpose, so that tests break the real program: FASTRL_FAULT=kill@save.manifest:3,nan@grad:rank1:12

ACTION@POINT[:rankR][:N | :N+ | :N-M]    at the Nth visit of POINT in this process (default 1), from it on, or N to M

    kill, term, int       that signal, to this process
    sleep=SECONDS, hang   stand still; hang has no end
    full, eio, denied     OSError: no space left, input/output error, permission denied
    fail                  RuntimeError
    nan, inf, -inf, none  a value at that point becomes that; of a list its first element, of a tensor the first one
                          that is not zero
    x=F                   it becomes F times what it was

A switch for tests: without the variable every call returns at once. `train` says aloud that it is set.
"""

import errno
import functools
import math
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from fastrl.base.names import did_you_mean

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
ERRORS = {"full": errno.ENOSPC, "eio": errno.EIO, "denied": errno.EACCES}
VALUES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "none": None}
# the points, which are the calls of `at` and `through`
POINTS = """
dataset generate rollout_logprobs grade reward credit old_logprobs current_logprobs ref_logprobs values forward logits
loss grad optimizer allgather eval
save.begin save.free save.optim save.rng save.model save.state save.manifest save.sync save.synced save.replace
save.rename save.renamed save.committed save.tidy save.prune save.pruned
""".split()
FORM = re.compile(
    r"(?P<action>-?[a-z]+)(=(?P<number>-?[0-9.e+]+))?@(?P<point>[a-z._]+)(:rank(?P<rank>\d+))?"
    r"(:(?P<first>\d+)(?P<on>\+|-(?P<last>\d+))?)?",
    re.ASCII,
)
Value = TypeVar("Value", float, list, Tensor)


@dataclass(frozen=True)
class Fault:
    """One part of FASTRL_FAULT."""

    text: str
    action: str
    point: str
    number: float  # of seconds, or a factor
    rank: int | None  # None: every rank
    first: int
    last: float  # visit, inclusive; may be infinite

    @classmethod
    def parse(cls, text: str) -> "Fault":
        found = FORM.fullmatch(text.strip())
        actions = {*SIGNALS, *ERRORS, *VALUES, "sleep", "hang", "fail", "x"}
        if not found or found["action"] not in actions:
            raise ValueError(
                f"FASTRL_FAULT: {text!r} is not ACTION@POINT[:rankR][:N]; actions: {', '.join(sorted(actions))}"
            )
        if found["point"] not in POINTS:
            hint = did_you_mean(found["point"], POINTS, "")
            raise ValueError(
                f"FASTRL_FAULT: {text!r}: there is no point {found['point']!r}{hint}; there are: {', '.join(POINTS)}"
            )
        first = int(found["first"] or 1)
        last = int(found["last"]) if found["last"] else math.inf if found["on"] else first
        rank = int(found["rank"]) if found["rank"] else None
        return cls(text.strip(), found["action"], found["point"], float(found["number"] or 1), rank, first, last)

    def __str__(self) -> str:
        return self.text

    def happen(self) -> None:
        if self.action in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.action])
        elif self.action in ERRORS:
            number = ERRORS[self.action]
            raise OSError(number, f"{os.strerror(number)} (FASTRL_FAULT at {self.point})")
        elif self.action == "fail":
            raise RuntimeError(f"FASTRL_FAULT at {self.point}")
        elif self.action in ("sleep", "hang"):
            time.sleep(self.number if self.action == "sleep" else 1e9)

    def change(self, value: Value) -> Value:
        if isinstance(value, list):
            return [self.change(x) for x in value[:1]] + value[1:]
        if not isinstance(value, Tensor):
            return value * self.number if self.action == "x" else VALUES.get(self.action, value)
        if self.action == "x":
            return value.mul_(self.number)
        if self.action in VALUES:
            first = int(value.detach().reshape(-1).ne(0).byte().argmax())
            value.view(-1)[first : first + 1] = VALUES[self.action]
        return value


class Faults:
    """What is planned, and how often each point was visited."""

    def __init__(self, planned: Iterable[Fault], rank: int):
        self.planned = [fault for fault in planned if fault.rank in (None, rank)]
        self.visits: Counter[str] = Counter()

    def now(self, point: str) -> list[Fault]:
        self.visits[point] += 1
        return [f for f in self.planned if f.point == point and f.first <= self.visits[point] <= f.last]


@functools.cache
def from_environment() -> Faults:
    """Raises ValueError where FASTRL_FAULT cannot be read."""
    text = os.environ.get("FASTRL_FAULT", "")
    return Faults(map(Fault.parse, filter(None, text.split(","))), rank=int(os.environ.get("RANK", "0")))


def at(point: str) -> None:
    """A place where a fault may happen."""
    faults = from_environment()
    if faults.planned:
        for fault in faults.now(point):
            fault.happen()


def through(point: str, value: Value) -> Value:
    """A value on its way; a tensor is changed in place."""
    faults = from_environment()
    if faults.planned:
        for fault in faults.now(point):
            value = fault.change(value)
    return value
