"""Engine against trainer: what is warned of, what ends a run after three steps, and whose log-probabilities are old."""

import json
import math

import pytest
import torch

from fastrl.base.types import EngineError
from fastrl.step.metrics import sampling_mismatch
from fastrl.weights.guard import MismatchWatch
from support.trainers import make_trainer


def metrics(*log_ratios: float) -> dict[str, float]:
    return sampling_mismatch(torch.tensor(log_ratios))


def test_by_hand():
    got = metrics(math.log(2), -math.log(2), 0.0)
    assert got["sampling/token_mult_prob_error/mean"] == pytest.approx(5 / 3)
    assert got["sampling/token_mult_prob_error/median"] == pytest.approx(2.0)


def test_the_watch_goes_on_after_a_restart():
    one, other = MismatchWatch(), MismatchWatch()
    for _ in range(2):
        one.observe(metrics(math.nan, 0.0, 0.0))
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other == one and other.in_a_row == 2 and other.warned
    with pytest.raises(EngineError):
        other.observe(metrics(math.nan, 0.0, 0.0))


def test_a_clean_run_gives_no_alarm():
    watch = MismatchWatch()
    assert [watch.observe(metrics(1e-5, -2e-5, 3e-5)) for _ in range(200)] == [[]] * 200
    assert watch.observe({}) == []


def test_each_kind_is_warned_of_once():
    watch = MismatchWatch()
    first = watch.observe(metrics(0.04, 0.06, 0.06))  # mean of exp: 1.055; k3: 0.0015
    assert [line.split(": ")[2].split()[0] for line in first] == [
        "sampling/token_mult_prob_error/mean",
        "sampling/mismatch_kl",
    ]
    assert "1.05" in first[0] and "--is-correction tis" in first[0]
    assert watch.observe(metrics(0.04, 0.06, 0.06)) == []


@pytest.mark.parametrize(
    "log_ratios, name",
    [
        ([0.2, -0.2, 0.2], "token_mult_prob_error/median 1.22"),
        ([0.0, 0.0, 0.0, 1.0], "mismatch_kl 0.18"),
        ([-0.8, -0.8, -0.8], "importance_sampling_ratio/mean 0.449"),
        ([math.nan, 0.0, 0.0], "median nan"),
    ],
)
def test_three_steps_in_a_row_end_the_run(log_ratios, name):
    watch = MismatchWatch()
    for _ in range(2):
        watch.observe(metrics(*log_ratios))
    watch.observe(metrics(0.0, 0.0))  # not in a row
    for _ in range(2):
        watch.observe(metrics(*log_ratios))
    with pytest.raises(EngineError, match=f"in 3 steps in a row .*{name}") as error:
        watch.observe(metrics(*log_ratios))
    assert error.value.exit_code == 5


@pytest.mark.promise("B6")
def test_a_run_whose_trainer_forgets_the_temperature_is_ended(tmp_path):
    trainer = make_trainer(tmp_path, "--problems-per-step", 4, "--eval-limit", 4, "--temperature", 0.3, "--steps", 9)
    trainer.learner.policy.inv_temperature = 1.0
    with pytest.raises(EngineError, match="in 3 steps in a row the engine's log-probabilities were not the trainer's"):
        trainer.run()
    assert trainer.completed == 2 or trainer.completed == 3


@pytest.mark.parametrize("minibatches", [1, 2])
def test_old_log_probabilities_may_be_the_engines(tmp_path, monkeypatch, minibatches):
    """They are then not scored again, and the ratio of the first pass is to them."""
    flags = ("--problems-per-step", 4, "--group-size", 4, "--minibatches", minibatches, "--eval-limit", 4)
    trainer = make_trainer(tmp_path / "engine", *flags, "--old-logprobs", "engine")
    scored = []
    monkeypatch.setattr(trainer.learner.policy, "score", lambda batch: scored.append(batch))
    sample = trainer.rollout.engine.sample

    def off(requests, sampling):
        groups = sample(requests, sampling)
        for completion in (c for group in groups for c in group):
            completion.rollout_logprobs = [x - 0.05 for x in completion.rollout_logprobs]
        return groups

    monkeypatch.setattr(trainer.rollout.engine, "sample", off)
    found = trainer.step()
    assert scored == [] and found["policy_kl"] == pytest.approx(-0.05, abs=2e-3)
    other = make_trainer(tmp_path / "recompute", *flags)
    assert abs(other.step()["policy_kl"]) < 2e-3


def test_a_correction_of_equal_log_probabilities_is_refused():
    from fastrl.settings.run import configure

    with pytest.raises(ValueError, match="--old-logprobs engine makes equal; leave one of them out"):
        configure(["--old-logprobs", "engine", "--is-correction", "tis"])
