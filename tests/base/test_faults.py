"""The switch that breaks the program on purpose: what it reads, when it acts, and that unset it does nothing."""

import errno
import inspect
import math
import re
from pathlib import Path

import pytest
import torch

from fastrl.base import faults
from fastrl.base.faults import POINTS, Fault, Faults
from fastrl.step.learner import Learner

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "text, number, rank, first, last",
    [
        ("kill@save.manifest:3", 1, None, 3, 3),
        ("nan@grad:rank1:12", 1, 1, 12, 12),
        ("sleep=2.5@generate", 2.5, None, 1, 1),
        ("-inf@reward:2+", 1, None, 2, math.inf),
        ("x=1e3@grad:4-7", 1000, None, 4, 7),
    ],
)
def test_what_is_read(text, number, rank, first, last):
    fault = Fault.parse(text)
    assert str(fault) == text
    assert (fault.number, fault.rank, fault.first, fault.last) == (number, rank, first, last)


@pytest.mark.parametrize("text", ["kill", "kill@", "explode@grad", "kill@grad:x", "kill@grad:rank:3", "nan@a b"])
def test_what_cannot_be_read_is_said(text):
    with pytest.raises(ValueError, match="FASTRL_FAULT: .* is not ACTION@POINT"):
        Fault.parse(text)


def test_a_point_that_does_not_exist_is_refused():
    with pytest.raises(
        ValueError, match=r"no point 'save\.manifst'; did you mean save\.manifest\?; there are: dataset, "
    ):
        Fault.parse("kill@save.manifst:3")
    with pytest.raises(ValueError, match="no point 'disk'; there are: dataset, "):
        Fault.parse("kill@disk")


def test_the_points_are_the_calls():
    """POINTS is the list; a call with another name would never be reached, and a name without a call does nothing."""
    calls = [
        re.findall(r"faults\.(?:at|through)\(([^,)]+)", path.read_text()) for path in (ROOT / "fastrl").rglob("*.py")
    ]
    called = {call.strip('"') for calls_of_file in calls for call in calls_of_file}
    assert "name" in called  # `Learner.scored`, of what a batch may be scored by
    scores = {"old_logprobs", "current_logprobs", "ref_logprobs", "values"}
    assert all(f'"{name}"' in inspect.getsource(Learner) for name in scores - {"old_logprobs"})
    assert called - {"name"} | scores == set(POINTS)


def test_a_fault_happens_at_its_visits_and_at_its_rank_only():
    happened = Faults([Fault.parse("fail@grad:2-3"), Fault.parse("fail@loss")], rank=0)
    assert [len(happened.now("grad")) for _ in range(5)] == [0, 1, 1, 0, 0]
    assert [len(happened.now("loss")) for _ in range(3)] == [1, 0, 0]
    assert not Faults([Fault.parse("fail@grad:rank1")], rank=0).planned
    assert Faults([Fault.parse("fail@grad:rank1")], rank=1).planned


def test_errors_are_those_of_the_system(planned):
    planned("full@save.model,eio@save.model:2,fail@save.model:3")
    for number in (errno.ENOSPC, errno.EIO):
        with pytest.raises(OSError) as error:
            faults.at("save.model")
        assert error.value.errno == number
    with pytest.raises(RuntimeError, match="at save.model"):
        faults.at("save.model")
    faults.at("save.model")


def test_values_change_in_place_and_numbers_are_returned(planned):
    planned("nan@grad:2,x=10@grad:3,-inf@reward")
    values = torch.arange(1.0, 5.0).view(2, 2)
    assert faults.through("grad", values).tolist() == [[1, 2], [3, 4]]
    faults.through("grad", values)
    assert values[0, 0].isnan() and values.view(-1)[1:].tolist() == [2, 3, 4]
    faults.through("grad", values)
    assert values.view(-1)[1:].tolist() == [20, 30, 40]
    assert faults.through("reward", 0.5) == -math.inf
    assert faults.through("reward", 0.5) == 0.5


def test_of_a_list_the_first_changes_and_of_a_tensor_the_first_that_is_not_zero(planned):
    planned("none@rollout_logprobs,nan@credit,inf@values")
    values = [-1.0, -2.0]
    assert faults.through("rollout_logprobs", values) == [None, -2.0] and values == [-1.0, -2.0]
    credit = torch.tensor([[0.0, 0.0], [0.5, 1.0]])
    faults.through("credit", credit)
    assert credit[1, 0].isnan() and credit[0].tolist() == [0, 0] and credit[1, 1] == 1
    assert faults.through("values", torch.zeros(2)).tolist() == [math.inf, 0]


def test_without_the_variable_nothing_is_counted(planned):
    planned("")
    faults.at("save.begin")
    assert faults.through("grad", 1.0) == 1.0
    assert not faults.from_environment().visits


def test_the_program_says_aloud_that_it_is_set(run_fastrl):
    done = run_fastrl("train", "--steps", 1, FASTRL_FAULT="fail@forward")
    assert done.returncode == 1
    assert "WARNING: FASTRL_FAULT is set, this run will be broken on purpose: fail@forward" in done.stdout
    assert "RuntimeError: FASTRL_FAULT at forward" in done.stderr
    done = run_fastrl("train", "--steps", 1, FASTRL_FAULT="fail@")
    assert done.returncode == 2 and done.stderr.startswith("fastrl: error: FASTRL_FAULT: 'fail@' is not ACTION@POINT")
