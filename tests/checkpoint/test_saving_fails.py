"""A checkpoint that cannot be written: the older one is as it was, the run goes on, and three in a row end it."""

import pytest
import torch
from safetensors.torch import save_file

from fastrl import checkpoint
from fastrl.base.types import CheckpointError, NumericsError
from support.cases import mostly_later
from support.run_folders import leftovers, rows, step_records
from support.run_in_pieces import RunInPieces
from support.small_disk import SmallDisk

MIB = 2**20


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return RunInPieces(tmp_path_factory.mktemp("built"))


@pytest.fixture
def disk(tmp_path):
    """MiB -> a folder on a disk of that size."""
    disks = []

    def of(mib: float) -> SmallDisk:
        disks.append(SmallDisk(tmp_path / f"disk{len(disks)}", mib))
        if not disks[-1].ok:
            pytest.skip("this user may not mount a small disk")
        return disks[-1]

    yield of
    for one in disks:
        one.close()


def save(folder, step, write_model=lambda path: None, weights=None, state=None, say=print):
    tensors = [("master", torch.zeros(MIB))]  # 4 MiB
    return checkpoint.save(
        folder,
        step,
        write_model=write_model,
        tensors=tensors,
        weights=weights,
        state=state or {"step": step},
        keep=2,
        say=say,
    )


@pytest.mark.promise("A6", trials=10)
def test_too_little_room_is_seen_before_anything_is_written(disk):
    weights = torch.zeros(2 * MIB, dtype=torch.bfloat16)  # 4 MiB: the estimate is 8, the room wanted 9.6
    for mib in (0.5, 1, 2, 4, 5, 6, 7, 8, 9, 9.5):
        folder = disk(mib).folder
        with pytest.raises(CheckpointError, match=r"step-1: .*GB free, 0.0101 GB needed.*; free some space there"):
            save(folder, 1, weights=weights, write_model=lambda path: pytest.fail("it was begun"))
        assert not list(folder.iterdir())
    assert save(disk(9.7).folder, 1, weights=weights).name == "step-1"


def fill(kind):
    def write(path):
        if kind == "safetensors":
            save_file({"x": torch.zeros(2 * MIB)}, path / "model.safetensors")
        elif kind == "text":
            (path / "model.txt").write_text("x" * 8 * MIB)

    return write


@pytest.mark.promise("A6", trials=5)
def test_a_disk_that_fills_up_in_the_middle(disk):
    folder = disk(11.5).folder
    save(folder, 1)
    for step, kind in enumerate(["safetensors", "text", "state", "text", "safetensors"], start=2):
        state = {"step": step, "x": "y" * 8 * MIB} if kind == "state" else None
        with pytest.raises(CheckpointError, match=r"could not be written \(.*No space left"):
            save(folder, step, fill(kind), state=state)
        assert [p.name for p in folder.iterdir()] == ["step-1"]
        assert checkpoint.load(folder / "step-1")[0] == {"step": 1}
    save(folder, 7)


def test_a_tokenizer_that_finds_no_room_is_an_error_of_the_disk(disk, tmp_path):
    from fastrl.models.loading import load_model, save_model

    loaded = load_model("embedded", dtype=torch.float32, device="cpu")
    folder = disk(793 / 256).folder  # 790 pages of weights, one for each file but tokenizer.json
    with pytest.raises(OSError, match="No space left"):
        save_model(loaded, folder)


@pytest.mark.promise("A6")
@pytest.mark.parametrize(
    "fault",
    mostly_later(
        ["x=0@save.free:2", "full@save.optim:2", "full@save.model:2", "full@save.sync:2", "full@save.rename:2"],
        "x=0@save.free:2",
        "full@save.model:2",
    ),
)
def test_the_run_goes_on_and_the_next_interval_saves(fault, pieces, tmp_path):
    code, said = pieces.run(tmp_path, 4, fault)
    assert code == 0 and said.count("warning:") == 1
    assert "could not be written" in said and "The run goes on and tries again in 1 steps" in said
    assert [p.name for p in checkpoint.newest(tmp_path / "checkpoints")] == ["step-4", "step-3"]
    assert leftovers(tmp_path / "checkpoints") == [] and pieces.check(tmp_path) == 4
    assert {"step": 2, "ckpt/failed_saves": 1.0} in rows(tmp_path)


@pytest.mark.promise("A6")
@pytest.mark.parametrize(
    "fault, last, end",  # the newest checkpoint, the last step taken
    [("full@save.model:2-4", 1, 4), ("full@save.model:2-3,full@save.model:5-7", 4, 7), ("full@save.state:3", 2, 3)],
    ids=["three in a row", "two and then three", "the last save of the run"],
)
def test_what_ends_the_run(fault, last, end, pieces, tmp_path):
    code, said = pieces.run(tmp_path, 3 if end == 3 else 9, fault)
    assert code == 6 and "CheckpointError" in said and "No space left" in said
    assert pieces.check(tmp_path) == last and leftovers(tmp_path / "checkpoints") == []
    assert len(step_records(tmp_path)) == end


@pytest.mark.promise("A6", trials=2)
def test_a_run_on_a_disk_that_is_too_small(disk, pieces):
    folder = disk(38).folder  # a checkpoint has 13 MB, with 15.7 wanted before it is begun
    code, said = pieces.run(folder, 9)
    assert code == 6 and said.count("warning:") == 2 and "GB free" in said
    assert pieces.check(folder) == 2


@pytest.mark.promise("A7")
@pytest.mark.parametrize(
    "fault",
    mostly_later(
        ["denied@save.begin:2", "eio@save.sync:2", "eio@save.rename:2", "eio@save.renamed:2"], "eio@save.sync:2"
    ),
)
def test_an_error_of_the_disk_is_survived(fault, pieces, tmp_path):
    code, said = pieces.run(tmp_path, 3, fault)
    assert code == 0 and said.count("warning:") == 1 and "FASTRL_FAULT" in said
    assert pieces.check(tmp_path) == 3 and leftovers(tmp_path / "checkpoints") == []


@pytest.mark.promise("A7")
def test_a_folder_that_becomes_read_only(disk):
    one = disk(30)
    save(one.folder, 1)
    one.read_only(True)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        save(one.folder, 2)
    one.read_only(False)
    assert [p.name for p in one.folder.iterdir()] == ["step-1"] and save(one.folder, 2).name == "step-2"


@pytest.mark.promise("A7")
@pytest.mark.parametrize("fault", mostly_later(["denied@save.prune:1", "eio@save.tidy:3"], "denied@save.prune:1"))
def test_an_old_one_that_cannot_be_removed_is_a_warning(fault, pieces, tmp_path):
    code, said = pieces.run(tmp_path, 4, fault)
    assert code == 0 and said.count("warning:") == 1 and "could not be removed" in said
    assert pieces.check(tmp_path) == 4 and leftovers(tmp_path / "checkpoints") == []
    assert len(checkpoint.newest(tmp_path / "checkpoints")) == 2  # the next save removes it


@pytest.mark.promise("B2")
@pytest.mark.parametrize("name", ["master", "optimizer.exp_avg", "weights"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_never_saved(name, value, tmp_path):
    tensors = {"master": torch.ones(8), "optimizer.exp_avg": torch.ones(8), "optimizer.state1": torch.ones(8).byte()}
    weights = torch.ones(8, dtype=torch.bfloat16)
    tensors.get(name, weights)[5] = value
    with pytest.raises(NumericsError, match=f"step 4: {name} is not finite, so no checkpoint was written") as error:
        checkpoint.save(
            tmp_path / "c", 4, write_model=pytest.fail, tensors=tensors.items(), weights=weights, state={}, keep=2
        )
    assert error.value.exit_code == 4 and not (tmp_path / "c").exists()
