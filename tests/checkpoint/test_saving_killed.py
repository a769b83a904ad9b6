"""kill -9 while a checkpoint is being written: the newest one that was complete is there, whole and of one step."""

import random

import pytest

from fastrl import checkpoint
from support.cases import mostly_later
from support.run_folders import leftovers, step_records
from support.run_in_pieces import RunInPieces

BEFORE = ["optim", "rng", "model", "state", "manifest", "sync", "synced", "rename"]  # it has its name
AFTER = ["renamed", "pruned"]
POINTS = [(point, number) for point in BEFORE + AFTER for number in (1, 2, 3, 4, 5)]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return RunInPieces(tmp_path_factory.mktemp("built"))


@pytest.mark.promise("A4")
@pytest.mark.parametrize("point, number", mostly_later(POINTS, ("rename", 2), ("renamed", 1), ("pruned", 1)))
def test_a_kill_at_any_point_of_a_save(point, number, pieces, tmp_path):
    code, _ = pieces.run(tmp_path, 9, f"kill@save.{point}:{number}")
    assert code == -9
    # every step is saved; the third save is the first that has something to remove
    step = {"renamed": number, "pruned": number + 2}.get(point, number - 1)
    found = checkpoint.newest(tmp_path / "checkpoints")
    kept = (step, step - 1, step - 2) if point == "renamed" else (step, step - 1)  # the third was to be removed next
    assert [p.name for p in found] == [f"step-{n}" for n in kept if n > 0]
    assert leftovers(tmp_path / "checkpoints") == {"renamed": [], "pruned": [f".del-step-{number}"]}.get(
        point, [f".tmp-step-{number}"]
    )
    assert pieces.check(tmp_path) == step
    assert pieces.run(tmp_path, step + 1, "kill@generate")[0] == -9  # before it could save
    assert leftovers(tmp_path / "checkpoints") == []
    code, said = pieces.run(tmp_path, step + 1)
    assert code == 0 and (f"resume: step {step} from" in said or "starting at step 0" in said)
    assert "WARNING" not in said
    assert leftovers(tmp_path / "checkpoints") == [] and pieces.check(tmp_path) == step + 1
    assert len(step_records(tmp_path)) == step + 1


def killed_at_random(pieces, folder, kills: int, rng: random.Random) -> int:
    """A run that is killed `kills` times at random instants, each time it has just begun -> half-written saves seen."""
    halves, before = 0, 0
    for _ in range(kills):
        pieces.kill(folder, rng.uniform(0, 1.0))
        halves += len(leftovers(folder / "checkpoints")) if (folder / "checkpoints").exists() else 0
        step, logged = pieces.check(folder), len(step_records(folder)) if (folder / "metrics.jsonl").exists() else 0
        assert before <= step and logged - 1 <= step <= logged, "more than one interval is lost"
        before = step
    code, _ = pieces.run(folder, before + 1)
    assert code == 0 and leftovers(folder / "checkpoints") == [] and pieces.check(folder) == before + 1
    return halves


@pytest.mark.promise("A4", trials=4)
def test_kills_at_four_random_instants(pieces, tmp_path):
    killed_at_random(pieces, tmp_path, 4, random.Random(7))


@pytest.mark.soak
@pytest.mark.promise("A4", trials=20)
@pytest.mark.parametrize("seed", range(10))
def test_kills_at_random_instants(seed, pieces, tmp_path):
    assert killed_at_random(pieces, tmp_path, 20, random.Random(seed)) > 0
