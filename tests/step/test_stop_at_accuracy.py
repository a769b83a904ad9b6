"""A run ends at the first evaluation that reaches the wanted accuracy, or falls below another, and only then."""

import pytest

from support.run_folders import rows
from support.trainers import make_trainer

PLANNED = [0.5, 0.625, 0.25, 0.625, 0.75, 0.75, 0.375]  # accuracy after 0, 1, ... steps
# rewards do not hang on what is sampled; an evaluation has 16 completions, a step 32
REWARD = f"""
accuracies = iter({PLANNED})

def planned(completions, **columns):
    share = next(accuracies) if len(completions) == 16 else 0.5
    return [float(n < share * len(completions)) for n in range(len(completions))]
"""
ARGS = [
    "--problems-per-step",
    4,
    "--eval-limit",
    8,
    "--eval-k",
    2,
    "--eval-every",
    1,
    "--steps",
    6,
    "--grade-truncated",
]


def make(folder, *args):
    (folder / "planned.py").write_text(REWARD)
    return make_trainer(folder / "run", "--reward", f"{folder / 'planned.py'}:planned", *ARGS, *args)


def accuracies(trainer) -> list[float]:
    """avg@2 after 0, 1, ... steps; fails when a step was evaluated twice or not at all."""
    logged = [row for row in rows(trainer.folder) if "eval/arithmetic/avg@2" in row]
    assert [row["step"] for row in logged] == list(range(len(logged)))
    return [row["eval/arithmetic/avg@2"] for row in logged]


def test_without_limits_the_run_goes_to_its_end(tmp_path):
    trainer = make(tmp_path)
    assert trainer.run() == "done" and accuracies(trainer) == PLANNED


@pytest.mark.parametrize("target, steps", [(0.75, 4), (0.6, 1), (0.625, 1), (0.626, 4)])
def test_the_first_evaluation_at_the_target_ends_the_run(target, steps, tmp_path):
    trainer = make(tmp_path, "--stop-at-accuracy", target)
    assert trainer.run() == "target" and trainer.completed == steps
    assert accuracies(trainer) == PLANNED[: steps + 1]
    assert trainer.last_checkpoint == tmp_path / "run" / "checkpoints" / f"step-{steps}"
    assert (trainer.last_checkpoint / "MANIFEST.json").exists()


def test_a_target_that_is_not_reached_changes_nothing(tmp_path):
    trainer = make(tmp_path, "--stop-at-accuracy", 0.751)
    assert trainer.run() == "done" and accuracies(trainer) == PLANNED


def test_a_model_that_is_good_enough_takes_no_step(tmp_path):
    trainer = make(tmp_path, "--stop-at-accuracy", 0.5)
    assert trainer.run() == "target" and trainer.completed == 0
    assert accuracies(trainer) == PLANNED[:1]


@pytest.mark.parametrize("limit, reason, steps", [(0.25, "done", 6), (0.251, "collapsed", 2), (0.5, "collapsed", 2)])
def test_the_first_evaluation_below_the_lower_limit_ends_the_run(limit, reason, steps, tmp_path):
    trainer = make(tmp_path, "--stop-below-accuracy", limit)
    assert trainer.run() == reason and trainer.completed == steps
    assert accuracies(trainer) == PLANNED[: steps + 1]
