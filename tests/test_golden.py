"""Ten steps of the embedded run, number by number. A change that moves them says so, and why, in its commit."""

import pytest
import torch
from helpers import make_trainer

# reward, loss, entropy (nats), gradient norm; two minibatches, so that the second one's loss is not zero
GOLDEN: list[tuple[float, float, float, float]] = []


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
