"""Rewards that are all equal: a gradient of exactly zero, no optimizer step, counted, and the next problems come."""

import pytest

from support.cases import mostly_later
from support.trainers import make_trainer

SETTINGS = {
    "zero": (0.0, []),
    "one": (1.0, []),
    "a rounding error": (0.1, ["--adv-norm", "batch"]),
    "dropped": (1.0, ["--drop-zero-std"]),
    "mean of completions": (0.3, ["--loss-agg", "seq", "--adv-norm", "none"]),
    "negative": (-1.0, ["--minibatches", 2, "--update.epochs-per-batch", 2]),
    "rebel": (0.7, ["--objective", "rebel"]),
    "sequence ratio": (0.7, ["--ratio-level", "sequence"]),
    "sfpo": (1.0, ["--update", "sfpo", "--opt-state", "scale"]),
    "gxpo": (1.0, ["--update", "gxpo"]),
}


@pytest.mark.promise("B5")
@pytest.mark.parametrize("name", mostly_later(list(SETTINGS), "a rounding error", "sfpo"))
def test_nothing_moves_but_the_data(name, tmp_path):
    reward, flags = SETTINGS[name]
    (tmp_path / "same.py").write_text(f"def same(completions, **columns):\n    return [{reward}] * len(completions)\n")
    trainer = make_trainer(
        tmp_path / "run",
        "--reward",
        f"{tmp_path / 'same.py'}:same",
        "--problems-per-step",
        4,
        "--group-size",
        3,
        "--eval-limit",
        2,
        "--grade-truncated",
        "--weight-decay",
        0.1,
        *flags,
    )
    before = {tensor: value.clone() for tensor, value in trainer.learner.state_tensors()}
    seen = []
    for _ in range(2):
        metrics = trainer.step()
        seen.append(trainer.latest[0].id)
        assert metrics["grad_norm"] == 0.0 and metrics["skipped"] == 0 and metrics["frac_reward_zero_std"] == 1.0
        assert not trainer.learner.policy.flat.grads.any()
    after = dict(trainer.learner.state_tensors())
    assert before.keys() == after.keys() and all((before[tensor] == after[tensor]).all() for tensor in before)
    steps = {"negative": 4, "sfpo": 4}.get(name, 1)
    assert metrics["empty_total"] == 2 * steps and metrics["skipped_total"] == 0
    assert len(set(seen)) == 2 and trainer.allocator.state_dict()["position"] > 0
    assert not (tmp_path / "run/bad").exists()
