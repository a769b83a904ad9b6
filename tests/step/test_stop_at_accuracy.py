"""A run ends at the first evaluation that reaches the wanted accuracy, or falls below another, and only then."""

import pytest

from support.run_folders import rows
from support.trainers import make_trainer

# a high learning rate, so that accuracy changes within a few steps
ARGS = ["--lr", "4e-4", "--warmup", 0, "--problems-per-step", 8, "--eval-limit", 32, "--eval-k", 2, "--eval-every", 1]


def accuracies(folder) -> dict[int, float]:
    """avg@2 by step; fails when a step was evaluated twice."""
    logged = [(row["step"], row["eval/arithmetic/avg@2"]) for row in rows(folder) if "eval/arithmetic/avg@2" in row]
    assert len(dict(logged)) == len(logged)
    return dict(logged)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Accuracy by step of a run without a target."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert make_trainer(folder, *ARGS, "--steps", 6).run() == "done"
    return accuracies(folder)


def test_the_first_evaluation_at_the_target_ends_the_run(undisturbed, tmp_path):
    best = max(undisturbed.values())
    step = next(s for s, accuracy in undisturbed.items() if accuracy == best)
    assert 0 < step < 6, undisturbed
    trainer = make_trainer(tmp_path, *ARGS, "--steps", 6, "--stop-at-accuracy", best)
    assert trainer.run() == "target" and trainer.completed == step
    assert accuracies(tmp_path) == {s: a for s, a in undisturbed.items() if s <= step}
    assert trainer.last_checkpoint == tmp_path / "checkpoints" / f"step-{step}"
    assert (trainer.last_checkpoint / "MANIFEST.json").exists()


def test_a_target_that_is_not_reached_changes_nothing(undisturbed, tmp_path):
    trainer = make_trainer(tmp_path, *ARGS, "--steps", 6, "--stop-at-accuracy", max(undisturbed.values()) + 1e-3)
    assert trainer.run() == "done" and accuracies(tmp_path) == undisturbed


def test_a_model_that_is_good_enough_takes_no_step(undisturbed, tmp_path):
    trainer = make_trainer(tmp_path, *ARGS, "--steps", 6, "--stop-at-accuracy", undisturbed[0])
    assert trainer.run() == "target" and trainer.completed == 0
    assert accuracies(tmp_path) == {0: undisturbed[0]}


def test_the_first_evaluation_below_the_lower_limit_ends_the_run(undisturbed, tmp_path):
    lowest = min(undisturbed.values())
    step = next(s for s, accuracy in undisturbed.items() if accuracy == lowest)
    trainer = make_trainer(tmp_path / "at", *ARGS, "--steps", 6, "--stop-below-accuracy", lowest)
    assert trainer.run() == "done" and accuracies(tmp_path / "at") == undisturbed  # at the limit is not below it
    trainer = make_trainer(tmp_path / "below", *ARGS, "--steps", 6, "--stop-below-accuracy", lowest + 1e-3)
    assert trainer.run() == "collapsed" and trainer.completed == step
    assert accuracies(tmp_path / "below") == {s: a for s, a in undisturbed.items() if s <= step}
