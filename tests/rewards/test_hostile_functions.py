"""Reward functions that change what they get, never end, leave things behind, and return or raise anything at all."""

import os
import signal
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

from fastrl.rewards import RewardSet
from fastrl.rewards.user import UserReward
from support.programs import run

HOSTILE = pytest.mark.promise("C11", trials=1)
FUNCTIONS = r"""
import asyncio, concurrent.futures, os, re, signal, sys, time, warnings
from decimal import Decimal
from fractions import Fraction
from os import _exit

import numpy as np
import torch

def changes(prompts, completions, answers, completion_ids, level, messages, **columns):
    for ids in completion_ids: ids.sort(); ids.append(3)
    for prompt in prompts: prompt[0]["content"] = "x"
    for each in messages: each["deep"][0]["list"].clear()
    result = [float(len(text)) for text in completions]
    for values in (prompts, completions, answers, completion_ids, level): values.clear()
    return result

def sleeps(completions): time.sleep(1e6)
def spins(completions):
    while True: pass
def matches(completions): re.match(r"(a|aa)+$", "a" * 60 + "b")
async def awaits(completions): await other()
async def other(): await asyncio.sleep(1e6)
def swallows(completions):
    for _ in range(3):
        try: time.sleep(1e6)
        except: pass
    return [0.0] * len(completions)
def compute_score(data_source, solution_str, ground_truth, extra_info=None): time.sleep(1e6)
class Slow:
    def __float__(self): time.sleep(1e6)
def slow_value(completions): return [Slow()] * len(completions)

def in_time(completions): time.sleep(0.01); return [0.5] * len(completions)
def own_alarm(completions):
    rang = []
    signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    while not rang: time.sleep(0.001)
    return [1.0] * len(completions)
def gets_sigterm(completions):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
    return [1.0] * len(completions)

def leaves_things(completions):
    sys.stdout = sys.stderr = open(os.devnull, "w")
    warnings.simplefilter("error")
    torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False); torch.set_num_threads(3)
    signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.alarm(1)
    return [1.0] * len(completions)

def leaves(completions): os._exit(0)
def leaves_by_name(completions): _exit(0)
def cancels(completions): raise asyncio.CancelledError
async def cancelled(completions): raise asyncio.CancelledError("stop")
async def stops(completions): raise StopIteration
def interrupts(completions): raise KeyboardInterrupt
def ends(completions): raise GeneratorExit
def recurses(completions): return recurses(completions)
def runs_out(completions): raise MemoryError
def warns(completions): warnings.simplefilter("error"); warnings.warn("old"); return []
class Dumb(Exception):
    def __str__(self): raise RuntimeError
    __repr__ = __str__
def dumb(completions): raise Dumb
def surrogate(completions): raise ValueError("\ud800 \x1b[31m")

class Odd:
    def __repr__(self): raise RuntimeError("repr")
    def __float__(self): raise SystemExit("float")
class OddList(list):
    def __iter__(self): raise RuntimeError("iter")
VALUES = {
    "huge": 10**400, "huger": 10**5000, "fraction": Fraction(10**400), "decimal": Decimal("1e400"),
    "snan": Decimal("sNaN"), "nan": np.float32("nan"), "inf": np.float32("inf"), "too large": 1e30,
    "text": "1", "bytes": b"1", "list": [1.0],
    "dict": {"a": 1.0}, "complex": 1 + 0j, "numpy complex": np.complex64(1), "torch complex": torch.tensor(1 + 0j),
    "date": np.datetime64("2020"), "span": np.timedelta64(3), "masked": np.ma.masked, "pair": torch.ones(2),
    "meta": torch.empty((), device="meta"), "odd": Odd(), "object": object(), "function": len,
}
GOOD = {
    "bool": True, "numpy bool": np.bool_(1), "int": 1, "numpy int": np.int8(1), "float32": np.float32(1),
    "one": Fraction(1), "decimal": Decimal(1), "tensor": torch.tensor(1.0), "vector": torch.tensor([1.0]),
    "bfloat16": torch.tensor(1.0, dtype=torch.bfloat16),
}
RETURNED = {
    "generator": lambda n: (1.0 for _ in range(n)), "iterator": lambda n: iter([1.0] * n),
    "dict": lambda n: {"score": 1.0}, "none": lambda n: None, "text": lambda n: "11", "number": lambda n: 1.0,
    "longer": lambda n: [1.0] * (n + 1),
    "nested": lambda n: [[1.0]] * n, "matrix": lambda n: np.ones((n, 2)),
    "meta": lambda n: torch.empty(n, device="meta"), "odd list": lambda n: OddList([1.0] * n),
    "metrics list": lambda n: ([1.0] * n, [1.0]), "set": lambda n: {1.0},
    "odd metric": lambda n: ([1.0] * n, {"a": Odd()}), "odd name": lambda n: ([1.0] * n, {Odd(): 1j}),
}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("functions") / "hostile.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture(scope="module")
def functions(file):
    from fastrl.rewards.user import load_module

    return load_module(file, "hostile")


def score(file, name, completions=("ab", "c"), timeout_s=60.0, **keywords):
    texts = list(completions)
    with RewardSet([f"{file}:{name}"], timeout_s=timeout_s) as rewards:
        return rewards.score(["?"] * len(texts), texts, ["c"] * len(texts), **keywords)


@HOSTILE
def test_a_function_gets_copies(file):
    prompts = [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]]
    completions, answers, ids = ["ab", "c"], ["1", "2"], [[3, 1, 2], [9, 7]]
    columns = {"level": [1, None], "messages": [{"deep": [{"list": [1]}]}, {"deep": [{"list": [2, [3]]}]}]}
    with RewardSet(["exact", f"{file}:changes"]) as rewards:
        scores = rewards.score(prompts, completions, answers, completion_ids=ids, columns=columns)
    assert scores.each["changes"] == [2.0, 1.0]
    assert prompts == [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]]
    assert (completions, answers, ids) == (["ab", "c"], ["1", "2"], [[3, 1, 2], [9, 7]])
    assert columns == {"level": [1, None], "messages": [{"deep": [{"list": [1]}]}, {"deep": [{"list": [2, [3]]}]}]}


@HOSTILE
@pytest.mark.parametrize(
    "name, line", [("sleeps", "in sleeps"), ("spins", "in spins"), ("matches", "in matches"), ("awaits", "in other"),
                   ("compute_score", "in compute_score"), ("slow_value", "in __float__")]
)  # fmt: skip
def test_a_call_that_does_not_end_is_an_error_that_says_where(file, name, line, caplog):
    said = rf"reward {name}: a call took longer than --reward-timeout 0.1 s and was interrupted in .*hostile.py.*{line}"
    with pytest.raises(ValueError, match=said):
        score(file, name, timeout_s=0.1)
    assert "stood here when its time was up" in caplog.text
    assert not any(signal.getitimer(signal.ITIMER_PROF)) and signal.getsignal(signal.SIGPROF) is signal.SIG_IGN


def test_a_function_that_swallows_the_interruption_gets_it_again(file):
    """Each of its three waits is ended, so that it comes back."""
    assert score(file, "swallows", timeout_s=0.1).total == [0.0, 0.0]


def test_a_limit_that_is_not_reached_changes_nothing(file):
    for limit in (0.0, 30.0):
        assert score(file, "in_time", timeout_s=limit).total == [0.5, 0.5]
        assert score(file, "own_alarm", timeout_s=limit).total == [1.0, 1.0]  # the signal of the limit is another one


def test_a_signal_that_asks_for_the_end_is_seen_while_a_function_runs(file):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        assert score(file, "gets_sigterm").total == [1.0, 1.0] and seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_a_call_is_left_behind(file):
    found = []

    def work():
        found.append(score(file, "in_time").total)
        with pytest.raises(ValueError, match="a call took longer than --reward-timeout 0.1 s .* in sleeps"):
            score(file, "sleeps", timeout_s=0.1)
        found.append("named")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[0.5, 0.5], "named"]


@HOSTILE
def test_nothing_is_left_behind(file):
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    streams, filters = (sys.stdout, sys.stderr), list(warnings.filters)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert score(file, "leaves_things").total == [1.0, 1.0]
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()) == before
    assert (sys.stdout, sys.stderr) == streams and warnings.filters == filters
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    alarm = signal.getitimer(signal.ITIMER_REAL)[0]
    assert alarm == 0 or alarm > 5  # that of pytest's own timeout


RAISED = {
    "leaves": r"SystemExit: os\._exit\(0\)",
    "cancels": "CancelledError",
    "cancelled": "CancelledError: stop",
    "stops": "RuntimeError: coroutine raised StopIteration",
    "ends": "GeneratorExit",
    "recurses": "RecursionError: maximum",
    "runs_out": "MemoryError",
    "warns": "UserWarning: old",
    "dumb": r"Dumb: \(its text cannot be shown\)",
    "surrogate": "ValueError: \ud800",
}


@HOSTILE
@pytest.mark.parametrize("name", RAISED)
def test_whatever_is_raised_is_an_error_that_names_the_function(file, name):
    with pytest.raises(ValueError, match=rf"reward {name}: raised {RAISED[name]}.* on every one of 2 completions"):
        score(file, name)


def test_a_keyboard_interrupt_is_a_persons_only_where_ctrl_c_raises_one(file):
    """As in `evaluate`, and as in `train`, which has a handler of its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            score(file, "interrupts")
        signal.signal(signal.SIGINT, lambda number, frame: None)
        with pytest.raises(ValueError, match="reward interrupts: raised KeyboardInterrupt on every one of 2"):
            score(file, "interrupts")
    finally:
        signal.signal(signal.SIGINT, before)


@HOSTILE
def test_a_value_that_is_no_reward_is_named(functions):
    for name, value in functions.VALUES.items():
        for size, form in ((1, list), (3, list), (1, tuple), (3, tuple)):
            values = form([0.5] * (size - 1) + [value])
            reward = UserReward("f", lambda completions, values=values: values)
            with pytest.raises(ValueError, match=rf"^reward f: reward number {size - 1} is .*; expected a "):
                print(name, size, form, reward.score({"completions": ["a"] * size}))
        one = UserReward("f", lambda solution_str, ground_truth, value=value: {"score": value})
        with pytest.raises(ValueError, match="^reward f: reward number 0 is "):
            print(name, one.score({"completions": ["a"], "answers": ["b"]}))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_numbers_of_any_type_are_rewards(functions, size):
    for value in functions.GOOD.values():
        for form in (list, tuple):
            reward = UserReward("f", lambda completions, value=value, form=form: form([value] * len(completions)))
            assert reward.score({"completions": ["a"] * size}).rewards == [1.0] * size


@HOSTILE
def test_what_is_no_list_of_rewards_is_named(functions):
    for returned in functions.RETURNED.values():
        reward = UserReward("f", lambda completions, returned=returned: returned(len(completions)))
        with pytest.raises(ValueError, match=r"^reward f: (returned|got|reward number 0 is|metric)"):
            reward.score({"completions": ["a", "b"]})


@pytest.mark.parametrize("weight, least", [(1.0, -2.0), (-0.5, 3.0), (0.0, 0.0)])
def test_a_completion_on_which_a_function_raises_is_never_better_than_the_others(tmp_path, weight, least):
    path = tmp_path / "f.py"
    path.write_text("def f(completions):\n    return [float(text) for text in completions]\n")
    with RewardSet([f"{path}:f:{weight}"]) as rewards:
        scores = rewards.score(["?"] * 4, ["3", "bad", "-2", "1"], ["1"] * 4)
    assert scores.each["f"] == [3.0, least, -2.0, 1.0] and scores.statuses == {"error": 1}
    assert scores.total[1] == min(scores.total)


def test_a_total_that_float32_cannot_square_is_refused(tmp_path):
    path = tmp_path / "f.py"
    path.write_text("def f(completions):\n    return [1e17] * len(completions)\n")
    with pytest.raises(ValueError, match=r"the total of completion 0 is 1e\+27, .*: 1e\+10 x f 1e\+17"):
        score(path, "f:1e10")


SMALL = "--problems-per-step 2 --group-size 4 --limit 20 --eval-limit 1 --eval-k 1 --steps 2 --threads 1".split()


def test_a_run_that_a_function_ends_behind_its_back_does_not_look_like_a_success(file, tmp_path):
    import json

    run(tmp_path, *SMALL, "--reward", f"{file}:leaves", code=2)
    status = json.loads((tmp_path / "runs/default/status.json").read_text())
    assert (status["reason"], status["exit_code"]) == ("ValueError", 2) and "os._exit(0)" in status["message"]
    run(tmp_path, *SMALL, "--reward", f"{file}:leaves_by_name", code=0)  # nothing in a process can hinder that
    status = json.loads((tmp_path / "runs/default/status.json").read_text())
    assert (status["reason"], status["exit_code"], status["step"]) == ("running", None, 0)


def test_a_file_that_ends_the_process_is_named(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("import os\nos._exit(0)")
    with pytest.raises(ValueError, match=r"bad\.py:f: importing the file raised SystemExit: os\._exit\(0\)"):
        RewardSet([f"{path}:f"])
    assert os.getpid() and Path(path).exists()
