"""Ten steps of the embedded run, number by number. A change that moves them says so, and why, in its commit."""

import math

import pytest
import torch

from support.trainers import make_trainer

# reward, loss, entropy (nats), gradient norm; two minibatches, so that the second one's loss is not zero
GOLDEN = [
    (0.40625, -0.000105099, 0.7764811, 0.654500),
    (0.484375, -0.000121685, 0.7642271, 0.575487),
    (0.4375, 0.006823939, 0.7748939, 0.637130),
    (0.59375, -0.000250799, 0.7642206, 0.557175),
    (0.40625, -0.000230904, 0.7792551, 0.543139),
    (0.546875, -0.000578482, 0.7222433, 0.820327),
    (0.65625, -0.000312168, 0.7078520, 0.886157),
    (0.453125, -0.000443810, 0.7520728, 0.634328),
    (0.546875, -0.000539643, 0.7107606, 0.673621),
    (0.59375, -0.000639519, 0.6940701, 0.603449),
]


EXACT = (0.0, 2e-6, 1e-4, 1e-3)  # reward; loss, absolute; entropy and gradient norm, relative
# With other instruction sets, other libraries or two threads nothing was further off than 3e-8, 2e-7 and 2e-6. But now
# and then rounding makes a sampled token another one, the sooner the more the weights have drifted. From there on other
# completions are compared: with a token changed on purpose, in eight places, at most 0.016, 1e-4, 0.001 and 0.05.
PARTED = (0.04, 5e-4, 0.01, 0.2)
CERTAIN = 5  # steps in which that is as good as impossible


def off(actual, expected, limits) -> bool:
    """Whether any of the four numbers is further off than it may be."""
    scales = (1.0, 1.0, abs(expected[2]), abs(expected[3]))
    errors = (abs(a - b) / scale for a, b, scale in zip(actual, expected, scales, strict=True))
    return not all(error <= limit for error, limit in zip(errors, limits, strict=True))


def first_off(got) -> int | None:
    """The first step, counted from 0, that is none of the recorded run."""
    parted = False
    for step, (actual, expected) in enumerate(zip(got, GOLDEN, strict=True)):
        parted = parted or (step >= CERTAIN and off(actual, expected, EXACT))
        if off(actual, expected, PARTED if parted else EXACT):
            return step
    return None


def test_golden_steps(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = make_trainer(tmp_path, "--problems-per-step", 8, "--minibatches", 2, "--eval-limit", 4)
    steps = [trainer.step() for _ in range(10)]
    torch.set_num_threads(threads)
    got = [(m["reward"], m["loss"], m["entropy"], m["grad_norm"]) for m in steps]
    assert first_off(got) is None, got


@pytest.mark.parametrize("number, change", [(0, 1 / 64), (1, 3e-6), (2, 2e-4), (3, 2e-3)])
def test_a_changed_number_is_seen(number, change):
    for step, factor, seen in ((0, 1, 0), (4, 1, 4), (7, 1, None), (7, 500, 7)):
        got = [list(row) for row in GOLDEN]
        got[step][number] += factor * change
        assert first_off(got) == seen
    assert first_off(GOLDEN) is None
    assert first_off([(math.nan,) * 4] * 10) == 0
