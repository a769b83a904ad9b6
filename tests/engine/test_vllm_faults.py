"""A vLLM that breaks: its core raises, its logits are NaN, log-probabilities are missing, a request never ends."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from fastrl.base.types import EngineError
from support.arguments import SHORT_RUN
from support.trainers import make_trainer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
VLLM = [*SHORT_RUN, "--engine", "vllm"]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """Without the canary, which would notice first."""
    one = make_trainer(tmp_path_factory.mktemp("run"), *VLLM, "--no-canary")
    yield one
    one.rollout.engine.close()
    one.rollout.rewards.close()


def lost(trainer) -> EngineError:
    """How a step ends that must end by an EngineError; the policy is as before."""
    before, completed = trainer.learner.policy.master.clone(), trainer.completed
    with pytest.raises(EngineError) as caught:
        trainer.step()
    assert caught.value.exit_code == 5 and trainer.completed == completed
    assert trainer.learner.policy.master.nan_to_num().equal(before.nan_to_num())
    return caught.value


@pytest.mark.promise("E1")
def test_log_probabilities_that_are_missing(trainer, monkeypatch):
    generate = trainer.rollout.engine.llm.generate

    def without(*args, **options):
        outputs = generate(*args, **options)
        outputs[3].outputs[0].logprobs = None
        return outputs

    monkeypatch.setattr(trainer.rollout.engine.llm, "generate", without)
    error = lost(trainer)
    assert str(error).startswith("vLLM failed while it sampled: AttributeError")
    assert isinstance(error.__cause__, AttributeError)


@pytest.mark.promise("E1")
def test_only_a_completion_that_has_ended_is_progress(trainer):
    spans, beats = trainer.rollout.spans, []
    trainer.rollout.spans.beat = lambda: beats.append(1)
    try:
        trainer.rollout.run(trainer.allocator.take(16), 0)
    finally:
        del trainer.rollout.spans.beat
    assert spans is trainer.rollout.spans and 1 <= len(beats) <= 10  # ten tokens at most, so ten steps of the engine


@pytest.mark.promise("E1")
def test_logits_that_are_nan(trainer):
    """Real ones, from a norm of the last layer: whatever vLLM makes of them, nothing is learnt."""
    norm = trainer.learner.policy.model.model.norm.weight
    before = norm.detach().clone()
    try:
        norm.data.fill_(math.nan)
        assert re.search("not finite in 16 of 16|vLLM failed", str(lost(trainer)))
    finally:
        norm.data.copy_(before)
    trainer.step()


@pytest.mark.promise("E1")
def test_a_core_that_raises(trainer, monkeypatch):
    """In the middle of a generation; its requests stay unfinished, so this one comes last."""
    runner, calls = trainer.rollout.engine.runner, []
    execute = runner.execute_model

    def dies(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return execute(*args, **options)

    monkeypatch.setattr(runner, "execute_model", dies)
    error = lost(trainer)
    assert len(calls) == 4 and str(error).startswith("vLLM failed while it sampled: ")
    causes = [error]
    while causes[-1].__cause__ or causes[-1].__context__:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)
    assert any("an illegal memory access" in str(cause) for cause in causes)


# the program, whose engine steps for ever without ending a request from the second generation on
SCRIPT = """
import sys, time
from fastrl import train
build = train.build

def with_stuck_engine(*args):
    trainer = build(*args)
    engine = trainer.rollout.engine
    run, step, stuck = trainer.rollout.run, engine.llm.llm_engine.step, []
    engine.llm.llm_engine.step = lambda: (time.sleep(0.01), [])[1] if stuck else step()
    trainer.rollout.run = lambda plan, at: (stuck.append(1) if at == 2 else None, run(plan, at))[1]
    return trainer

train.build = with_stuck_engine
if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.promise("E1")
def test_a_request_that_never_ends(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", *VLLM, "--steps", "4", "--hang-timeout", "20"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 5, done.stderr[-3000:]
    status = json.loads((tmp_path / "runs/default/status.json").read_text())
    assert (status["reason"], status["exit_code"], status["phase"]) == ("hang", 5, "rollout") and status["step"] == 2
    assert Path(status["last_checkpoint"]).name == "step-2"
    assert "_run_engine" in (tmp_path / "runs/default/stacks-rank0.txt").read_text()
