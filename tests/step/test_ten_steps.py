"""Ten steps of the embedded run, number by number. A change that moves them says so, and why, in its commit."""

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


def test_golden_steps(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = make_trainer(tmp_path, "--problems-per-step", 8, "--minibatches", 2, "--eval-limit", 4)
    steps = [trainer.step() for _ in range(10)]
    torch.set_num_threads(threads)
    got = [(m["reward"], m["loss"], m["entropy"], m["grad_norm"]) for m in steps]
    for expected, actual in zip(GOLDEN, got, strict=True):
        reward, loss, entropy, grad_norm = actual
        assert reward == expected[0], got  # sampled tokens do not hang on the last bits of a sum
        assert loss == pytest.approx(expected[1], abs=2e-6), got
        assert entropy == pytest.approx(expected[2], rel=1e-4), got
        assert grad_norm == pytest.approx(expected[3], rel=1e-3), got
