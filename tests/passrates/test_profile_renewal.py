"""Profiles that are taken anew in the course of a run: what changes, and that a resumed run is not another one."""

import json
import shutil

import pytest

from fastrl import checkpoint
from fastrl.base.types import CheckpointError
from fastrl.passrates.file import read_profile
from fastrl.passrates.key import weights_digest
from fastrl.run.resume import resume
from fastrl.settings.parse import parse
from fastrl.settings.run import AXES, EMBEDDED_RECIPE, TrainConfig
from fastrl.step.metrics import spearman
from support.arguments import SMALL_PROFILE
from support.run_folders import rows, step_records
from support.trainers import make_trainer

# every step moves the weights: with seeds 0 to 5 the smallest gradient norm was 0.19, and 6 to 15 of the 24 problems
# had another group size in a new profile
RENEWED = [
    *SMALL_PROFILE,
    "--problems-per-step",
    4,
    "--unsolved-keep-frac",
    0,
    "--reprofile-every",
    2,
    "--steps",
    6,
    "--save-every",
    1,
    "--keep",
    9,
    "--lr",
    1e-3,
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """6 steps with a new profile before the third and the fifth."""
    trainer = make_trainer(tmp_path_factory.mktemp("renewed") / "run", *RENEWED)
    trainer.run()
    return trainer


def config_of(folder):
    return parse(TrainConfig, [str(EMBEDDED_RECIPE), "--out", str(folder), *map(str, RENEWED)], AXES)


def continued(straight, folder, step):
    """Continue the run from its checkpoint of `step` in `folder`, a copy of the run's."""
    trainer = make_trainer(folder, *RENEWED)
    with checkpoint.generators_kept():
        resume(trainer, str(folder / "checkpoints" / f"step-{step}"), config_of(folder))
        trainer.run()
    return trainer


def test_a_new_profile_is_logged_with_how_much_it_changed(straight):
    steps = [row for row in rows(straight.folder) if "reward" in row]
    assert [("profile/spearman" in row) for row in steps] == [False, False, True, False, True, False]
    names = sorted(path.name for path in straight.folder.glob("profile-*"))
    assert names == ["profile-step-2.jsonl", "profile-step-4.jsonl"]
    first = read_profile(straight.profiler.path)
    second, third = (read_profile(straight.folder / name) for name in names)
    assert len({first.key.model, second.key.model, third.key.model}) == 3
    assert steps[2]["profile/spearman"] == spearman(first.pass_rates(), second.pass_rates())
    assert steps[4]["profile/spearman"] == spearman(second.pass_rates(), third.pass_rates())
    assert steps[4]["profile/pass_rate"] == pytest.approx(sum(third.pass_rates()) / 24)
    assert steps[4]["profile/num_rollouts"] == 96
    # group sizes by hand from the rows, 4 completions: 1/4 -> 4, 1/2 -> 2, 3/4 -> 2; 4/4 and 0/4 are left out
    size = {0.25: 4, 0.5: 2, 0.75: 2}
    moved = sum(size.get(a) != size.get(b) for a, b in zip(second.pass_rates(), third.pass_rates(), strict=True))
    assert 24 * steps[4]["profile/frac_group_size_changed"] == pytest.approx(moved) and moved > 0
    by_id = dict(zip((row["id"] for row in third.rows), third.pass_rates(), strict=True))
    for p in straight.profiler.problems:  # the newest is in force
        assert p.profile_right.mean().item() == by_id[p.id]


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_run_that_renews_its_profile_resumes_exactly(straight, step, tmp_path):
    shutil.copytree(straight.folder, tmp_path / "run")
    if step == 4:  # an unfinished write: the profile before step 5 must be made again
        (tmp_path / "run/profile-step-4.jsonl").unlink()
    trainer = continued(straight, tmp_path / "run", step)
    assert step_records(tmp_path / "run") == step_records(straight.folder)
    assert trainer.profiler.digest == straight.profiler.digest


@pytest.mark.slow
def test_a_run_goes_on_under_another_name_with_its_profile(straight, tmp_path):
    folder = tmp_path / "other"
    trainer = make_trainer(folder, *RENEWED)
    with checkpoint.generators_kept():
        resume(trainer, str(straight.folder / "checkpoints" / "step-3"), config_of(folder))
    assert (folder / "profile-step-2.jsonl").exists()
    assert trainer.profiler.profile.rows == read_profile(straight.folder / "profile-step-2.jsonl").rows


def test_a_stop_while_a_profile_is_renewed_leaves_the_step_before(straight, tmp_path):
    shutil.copytree(straight.folder, tmp_path / "run")
    (tmp_path / "run/profile-step-4.jsonl").unlink()
    calls = iter([False, False, True])  # before the step, and before the chunk
    trainer = make_trainer(tmp_path / "run", *RENEWED)
    with checkpoint.generators_kept():
        resume(trainer, str(tmp_path / "run/checkpoints/step-4"), config_of(tmp_path / "run"))
        next(calls)
        trainer.stop_requested = lambda: next(calls, True)
        assert trainer.run() == "stopped"
    state = json.loads((tmp_path / "run/checkpoints/step-4/state.json").read_text())
    original = json.loads((straight.folder / "checkpoints/step-4/state.json").read_text())
    assert state["profile"]["file"] == original["profile"]["file"] == "profile-step-2.jsonl"
    assert state["allocator"] == original["allocator"]


def test_a_profile_that_leaves_nothing_to_learn_does_not_end_a_run(tmp_path, capsys):
    (tmp_path / "f.py").write_text(
        "import os\n"
        "def f(completions, **columns):\n"
        f"    easy = os.path.exists({str(tmp_path / 'easy')!r})\n"
        "    return [1.0 if easy else float(sum(map(ord, c)) % 2) for c in completions]\n"
    )
    args = [*RENEWED, "--reward", f"{tmp_path / 'f.py'}:f", "--grade-truncated", "--steps", 3]
    trainer = make_trainer(tmp_path / "run", *args)
    before = trainer.profiler.digest
    (tmp_path / "easy").write_text("")
    trainer.run()
    assert trainer.profiler.digest == before and trainer.profiler.file == ""
    assert "so nothing is left to learn" in capsys.readouterr().out
    assert {p.profile_right.mean().item() for p in trainer.profiler.problems} != {1.0}
    third = [row for row in rows(tmp_path / "run") if "reward" in row][2]
    assert third["profile/pass_rate"] == 1.0 and third["profile/frac_group_size_changed"] == 0.0


def test_another_profile_than_the_checkpoints_is_refused(straight, tmp_path):
    shutil.copytree(straight.folder, tmp_path / "run")
    state = json.loads((tmp_path / "run/checkpoints/step-3/state.json").read_text())["profile"]
    profiler = make_trainer(tmp_path / "run", *RENEWED).profiler
    profiler.load_state_dict(state)  # as it is, it fits
    with pytest.raises(CheckpointError, match="profile-step-2.jsonl: the profile has other rewards than the one"):
        profiler.load_state_dict(state | {"digest": "0"})
    (tmp_path / "run/profile-step-2.jsonl").unlink()
    with pytest.raises(CheckpointError, match="profile-step-2.jsonl: the profile that the checkpoint goes on with"):
        profiler.load_state_dict(state | {"folder": str(tmp_path)})


def test_an_abandoned_profile_is_made_again(straight, tmp_path):
    trainer = make_trainer(tmp_path / "run", *RENEWED)
    stale = tmp_path / "run/profile-step-2.jsonl"
    shutil.copy(straight.folder / "profile-step-2.jsonl", stale)  # of weights that this run does not have
    trainer.profiler.renew(2, lambda: None)
    renewed = read_profile(stale)
    assert renewed.key.model == weights_digest(trainer.learner.policy.flat.weights)
    # the weights are still those of the first profile, but the samples are new ones
    assert renewed.rows != read_profile(trainer.profiler.path).rows
    assert trainer.profiler.renew(3, lambda: None) == {} == trainer.profiler.renew(0, lambda: None)
