"""Signs of collapse: synthetic logs that raise one alarm each, good ones that raise none, and the end of a run."""

import json
import math
import random

import pytest
import torch

from fastrl.step.metrics import one_token_rows
from fastrl.watch.health import Health
from support.batches import make
from support.run_folders import rows
from support.trainers import make_trainer

STEPS = 160
NAMES = {
    "entropy": "entropy",
    "one": "completions/one_token_frac",
    "cut": "completions/clipped_ratio",
    "reward": "reward",
}


def log(seed: int = 0, **series) -> list[dict[str, float]]:
    """A quiet run, with some of its numbers as functions of the step."""
    noise = random.Random(seed)
    quiet = {
        "entropy": lambda n: 0.8 + 0.02 * noise.gauss(0, 1),
        "one": lambda n: 0.02,
        "cut": lambda n: 0.1 + 0.02 * noise.gauss(0, 1),
        "reward": lambda n: 0.4 + 0.02 * noise.gauss(0, 1),
    }
    return [{NAMES[name]: f(n) for name, f in (quiet | series).items()} for n in range(STEPS)]


def said(health: Health, steps: list[dict[str, float]]) -> list[tuple[int, str]]:
    return [(n, line) for n, metrics in enumerate(steps) for line in health.observe(metrics)]


ALARMS = {
    "entropy falls at once": (log(entropy=lambda n: 0.8 if n < 60 else 0.07), 79, "below a tenth", "--lr"),
    "entropy fades away": (log(entropy=lambda n: 0.8 * math.exp(-n / 20)), None, "below a tenth", "--entropy"),
    "one token at once": (log(one=lambda n: 0.5 if n >= 30 else 0.0), 34, "repeat a single token", "--kl 0.001"),
    "one token creeps in": (log(one=lambda n: n / STEPS), None, "repeat a single token", "--lr"),
    "cut off from the start": (log(cut=lambda n: 0.9), 4, "cut off by the length limit", "--max-new-tokens"),
    "cut off more and more": (log(cut=lambda n: n / STEPS), None, "cut off by the length limit", "--grade-truncated"),
    "reward jumps": (log(reward=lambda n: 0.3 if n < 100 else 0.95), 100, "jumped to 0.95 from 0.3", "--reward"),
    "reward jumps from none": (log(reward=lambda n: 0.0 if n < 80 else 0.5), 80, "jumped to 0.5", "--rollouts-every"),
}  # fmt: skip


@pytest.mark.promise("B8")
@pytest.mark.parametrize("name", ALARMS)
def test_a_collapse_is_said_once_with_its_evidence_and_a_flag(name):
    steps, when, text, flag = ALARMS[name]
    ((step, line),) = said(Health(), steps)
    assert step == when or when is None
    assert line.startswith("warning: ") and text in line and flag in line and "\n" not in line


def learning(n: int) -> float:
    return 0.9 - 0.5 * math.exp(-n / 50)


GOOD = {
    "learns": log(1, reward=learning, entropy=lambda n: 0.15 + 0.65 * math.exp(-n / 40), cut=lambda n: 0.3 - n / 600),
    "dips and recovers": log(
        2,
        entropy=lambda n: 0.05 if n > 20 and n % 20 else 0.7,
        one=lambda n: 0.6 if n % 5 else 0.0,
        cut=lambda n: 0.5,
        reward=lambda n: 0.5 + 0.1 * math.sin(n),
    ),
    "rare rewards and broken steps": log(
        3,
        reward=lambda n: math.nan if n == 70 else 0.1 if n % 30 == 29 else 0.0,
        entropy=lambda n: math.nan if n % 7 == 0 else 0.3,
        cut=lambda n: math.nan if n == 5 else 0.2,
    ),
}


@pytest.mark.promise("B8")
@pytest.mark.parametrize("name", GOOD)
def test_a_good_run_raises_no_alarm(name):
    assert said(Health(), GOOD[name]) == []


@pytest.mark.parametrize("name", ALARMS)
@pytest.mark.parametrize("cut", [5, 75, 120])
def test_a_restart_forgets_nothing(name, cut):
    steps = ALARMS[name][0]
    first, second = Health(), Health()
    before = said(first, steps[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    after = [(cut + n, line) for n, line in said(second, steps[cut:])]
    assert before + after == said(Health(), steps)


def test_completions_of_one_token_by_hand():
    batch = make([10, 10, 10, 6, 0])
    batch.input_ids[0, 1:11] = torch.tensor([5] * 8 + [6, 7])  # 8 of 10
    batch.input_ids[1, 1:11] = torch.tensor([5] * 7 + [6, 7, 8])  # 7 of 10
    batch.input_ids[2, 1:11] = torch.tensor([9, 1, 9, 9, 9, 9, 9, 9, 2, 9])
    batch.input_ids[3, 1:7] = 5  # too short to tell
    batch.input_ids[:, 0] = 5  # the prompt does not count
    batch.response_mask[2] = False  # nor what the loss sees
    assert one_token_rows(batch) == 2


def test_a_run_ends_at_an_alarm_only_where_that_was_asked_for(tmp_path, capsys):
    flags = ("--problems-per-step", 4, "--group-size", 2, "--eval-limit", 2, "--max-new-tokens", 2, "--steps", 7)
    asked = make_trainer(tmp_path / "asked", *flags, "--stop-on-collapse")
    assert asked.run() == "collapsed" and asked.completed == 5
    line = "warning: in 5 steps in a row 100% of the completions are cut off"
    assert line in capsys.readouterr().out
    other = make_trainer(tmp_path / "not", *flags)
    assert other.run() == "done" and other.completed == 7
    assert capsys.readouterr().out.count(line) == 1
    assert rows(tmp_path / "not")[-2]["completions/one_token_frac"] == 0.0
