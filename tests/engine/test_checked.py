"""An engine that is lost or lies: noticed before anything is learnt from it, said in a line, exit code 5."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastrl.base.types import Completion, EngineError
from fastrl.engine.base import Request, Sampling
from fastrl.engine.checked import fault, sample_checked
from support.arguments import SHORT_RUN
from support.broken_engines import Broken, nan, spoil
from support.trainers import make_trainer


def raises(sampled):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def none(sampled):
    spoil(sampled, None, 16)


def infinite(sampled):
    spoil(sampled, -math.inf, 9)


def no_logprobs(sampled):
    sampled[2][0].rollout_logprobs.pop()


def too_few(sampled):
    sampled[1].pop()


def no_answer(sampled):
    sampled.pop()


def outside(sampled):
    sampled[3][1].token_ids[0] = 30


def negative(sampled):
    sampled[3][1].token_ids[0] = -1


def too_long(sampled):
    one = sampled[0][3]
    one.token_ids, one.rollout_logprobs = [1] * 11, [-1.0] * 11


def aborted(sampled):
    sampled[0][0] = replace(sampled[0][0], finish_reason="abort")


def words(sampled):
    sampled[0][0].token_ids[0] = "a"


BREAKS = [
    (raises, "Broken failed while it sampled: RuntimeError: CUDA error: an illegal memory access was encountered"),
    (nan, "Broken returned log-probabilities that are missing or not finite in 16 of 16 completions; the weights are"),
    (none, "returned log-probabilities that are missing or not finite in 16 of 16 completions"),
    (infinite, "returned log-probabilities that are missing or not finite in 9 of 16 completions"),
    (no_logprobs, "returned another number of log-probabilities than of tokens in a completion"),
    (too_few, "returned 3 completions of request 1, asked for 4"),
    (no_answer, "returned completions of 3 requests, asked for 4"),
    (outside, "returned 1 token ids outside the vocabulary of 16, the first of them 30"),
    (negative, "returned 1 token ids outside the vocabulary of 16, the first of them -1"),
    (too_long, "returned 11 tokens in a completion, at most 10 were allowed"),
    (aborted, "returned a completion that ended by 'abort', expected stop or length"),
    (words, "returned tokens or log-probabilities that are not numbers .*'a'"),
]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    one = make_trainer(tmp_path_factory.mktemp("run"), *SHORT_RUN)
    yield one
    one.rollout.rewards.close()


@pytest.mark.parametrize("breaks, message", BREAKS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.promise("E1")
def test_what_an_engine_returns_is_looked_at(breaks, message, trainer):
    engine, before = trainer.rollout.engine, trainer.learner.policy.master.clone()
    trainer.rollout.engine = Broken(engine, breaks)
    try:
        with pytest.raises(EngineError, match=message) as caught:
            trainer.step()
    finally:
        trainer.rollout.engine = engine
    assert caught.value.exit_code == 5 and trainer.completed == 0 and torch.equal(trainer.learner.policy.master, before)
    if breaks is raises:
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_half_of_the_completions_without_a_number_is_the_guards_matter(tmp_path):
    trainer = make_trainer(tmp_path, *SHORT_RUN)
    before = trainer.learner.policy.master.clone()
    trainer.rollout.engine = Broken(trainer.rollout.engine, lambda sampled: spoil(sampled, math.nan, 8))
    assert trainer.step()["skipped"] == 1 and torch.equal(trainer.learner.policy.master, before)
    trainer.rollout.rewards.close()


def test_what_is_right_passes_and_user_errors_stay_what_they_are(trainer):
    assert fault([], [], 5, 5) == ""
    nothing = Completion(token_ids=[], rollout_logprobs=[], finish_reason="length")
    edge = Completion(token_ids=[0, 4], rollout_logprobs=[0.0, -1e9], finish_reason="stop")
    assert fault([[nothing, edge], []], [2, 0], 2, 5) == ""
    assert fault([[nothing, edge], []], [2, 0], 2, 4) != ""

    def refuses(sampled):
        raise ValueError("--engine vllm samples at temperatures up to 2, got 3")

    request = Request(prompt_ids=trainer.allocator.problems[0].prompt_ids, seeds=[1])
    with pytest.raises(ValueError, match="temperatures up to 2"):
        sample_checked(Broken(trainer.rollout.engine, refuses), [request], Sampling(), 16)


# the program, with an engine that breaks in the fourth generation: its error, or no end
SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from support.broken_engines import Broken, nan
from fastrl import train
from fastrl.base import ranks
calls = []

def breaks(sampled):
    calls.append(1)
    if len(calls) == 4:
        time.sleep(1e9) if {hangs} else nan(sampled)

build = train.build

def with_broken_engine(*args):
    trainer = build(*args)
    trainer.rollout.engine = Broken(trainer.rollout.engine, breaks)
    return trainer

train.build = with_broken_engine
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.promise("E1")
@pytest.mark.parametrize("hangs", [pytest.param(True, marks=pytest.mark.soak), False], ids=["hangs", "nan"])
def test_the_program_ends_with_5(hangs, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(tests=str(Path(__file__).parents[1]), hangs=hangs))
    command = [sys.executable, "script.py", *SHORT_RUN, "--steps", "6", "--hang-timeout", "8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 5, done.stderr
    status = json.loads((tmp_path / "runs/default/status.json").read_text())
    assert status["exit_code"] == 5 and status["phase"] == "rollout" and status["step"] == 2
    assert status["last_checkpoint"].endswith("step-2")
    if hangs:
        assert status["reason"] == "hang" and "no progress for 8 s in phase rollout" in done.stderr
        assert "in sample" in (tmp_path / "runs/default/stacks-rank0.txt").read_text()
    else:
        assert status["reason"] == "EngineError" and status["message"].endswith("(step 3, phase rollout)")
        assert done.stderr.startswith("fastrl: error: Broken returned log-prob") and "Traceback" not in done.stderr
