"""A run may leave out the checkpoint at its end; what it is asked to save it saves."""

import json

import pytest

from support.trainers import make_trainer

SHORT = ["--steps", 3, "--problems-per-step", 2, "--group-size", 2, "--eval-limit", 2, "--eval-k", 1]


@pytest.mark.parametrize(
    "flags, saved",
    [
        ([], ["step-3"]),
        (["--no-save-at-end"], []),
        (["--no-save-at-end", "--save-every", 2], ["step-2"]),
        (["--no-save-at-end", "--stop-at-accuracy", 1e-9], []),
    ],
)
def test_which_checkpoints_a_run_leaves(flags, saved, tmp_path):
    trainer = make_trainer(tmp_path, *SHORT, *flags)
    assert trainer.run() in ("done", "target")
    assert [path.name for path in (tmp_path / "checkpoints").glob("*")] == saved
    assert (trainer.last_checkpoint is None) == (not saved)


def test_a_signal_always_gets_its_checkpoint(tmp_path):
    asked = iter([False] * 4 + [True] * 100)
    trainer = make_trainer(tmp_path, *SHORT, "--no-save-at-end", stop_requested=lambda: next(asked))
    assert trainer.run() == "stopped"
    assert (tmp_path / "checkpoints" / f"step-{trainer.completed}" / "MANIFEST.json").exists()


@pytest.mark.slow
def test_the_status_of_a_run_without_a_checkpoint_names_none(run_fastrl, tmp_path):
    ran = run_fastrl("train", *SHORT, "--no-save-at-end", "--out", tmp_path / "run")
    assert ran.returncode == 0, ran.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["last_checkpoint"] is None and status["step"] == 3
