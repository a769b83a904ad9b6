"""Checkpoints are complete or refused, and the model part is a Hugging Face folder."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

from fastrl import checkpoint
from fastrl.base import faults
from fastrl.base.types import CheckpointError
from support.cases import mostly_later
from support.trainers import make_trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trainer after two steps, and its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, "--problems-per-step", 4, "--eval-limit", 4)
    for _ in range(2):
        trainer.step()
    trainer.save()
    return trainer, folder / "checkpoints" / "step-2"


def test_the_model_part_loads_with_transformers(saved):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer, path = saved
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = torch.tensor([tokenizer.encode("3+5*2-7=")])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, trainer.learner.policy.model(ids).logits)
    fresh = make_trainer(path.parent / "fresh", "--eval-limit", 4)
    assert not torch.equal(
        fresh.learner.policy.flat.weights, trainer.learner.policy.flat.weights
    )  # training did move them


def test_loading_gives_back_every_tensor_and_generator(saved):
    trainer, path = saved
    random.seed(5)
    numpy.random.seed(6)
    torch.manual_seed(7)
    trainer.save()
    expected = (random.random(), numpy.random.rand(), torch.rand(3))
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    state, tensors = checkpoint.load(path)
    assert (random.random(), numpy.random.rand()) == expected[:2] and torch.equal(torch.rand(3), expected[2])
    assert state == json.loads(json.dumps(trainer.state_dict()))
    own = dict(trainer.learner.policy.state_tensors())
    assert tensors.keys() == own.keys() and all(torch.equal(tensors[n], own[n]) for n in own)


FILES = [
    "MANIFEST.json",
    "optim-rank0.safetensors",
    "state.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "rng-rank0.json",
    "rng-rank0.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


def damages(original: bytes, other: bytes, rng: random.Random) -> list[bytes | None]:
    """20 flipped bits, 5 zeroed pages, three cuts, one byte more, the file of another step, and no file."""
    flips, pages = [], []
    for _ in range(20):
        flipped = bytearray(original)
        flipped[rng.randrange(len(original))] ^= 1 << rng.randrange(8)
        flips.append(bytes(flipped))
    for _ in range(5):
        start = rng.randrange(len(original)) // 4096 * 4096
        length = min(4096, len(original) - start)
        pages.append(original[:start] + bytes(length) + original[start + length :])
    cuts = [original[:-1], original[: len(original) // 2], b"", original + b"\n", other, None]
    return [damage for damage in flips + pages + cuts if damage != original]


@pytest.mark.promise("A11")
def test_what_a_checkpoint_holds(saved):
    """Names of files, tensors and state: what is added or lost here changes the format."""
    _, path = saved
    state = json.loads((path / "state.json").read_text())
    known = json.loads((Path(__file__).parents[1] / "golden" / "checkpoint" / "names.json").read_text())
    assert {p.name for p in path.iterdir()} == set(known["files"])
    assert set(load_file(path / "optim-rank0.safetensors")) == set(known["tensors"])
    assert set(state) == set(known["state"]) and set(state["identity"]) == set(known["identity"])


def test_every_file_is_damaged_below(saved):
    _, path = saved
    assert {p.name for p in path.iterdir()} == set(FILES)


@pytest.mark.promise("A5", trials=31)
@pytest.mark.parametrize("name", mostly_later(FILES, *FILES[:3]))
def test_every_damage_is_found_before_anything_is_used(name, saved, tmp_path):
    trainer, path = saved
    broken = tmp_path / "step-2"
    shutil.copytree(path, broken)
    original = (path / name).read_bytes()
    edited = original.replace(b'"step": 2', b'"step": 1').replace(b"8", b"9", 1)
    rng, before = random.Random(name), torch.get_rng_state()
    found = damages(original, edited, rng)
    for damage in found + [found[0]] * (31 - len(found)):  # what is the same in both steps is no damage
        if damage is None:
            (broken / name).unlink()
        else:
            (broken / name).write_bytes(damage)
        text = "manifest|MANIFEST.json" if name == "MANIFEST.json" else name.replace(".", r"\.")
        with pytest.raises(CheckpointError, match=text):
            checkpoint.load(broken, trainer.learner.shard_sizes())
    assert torch.equal(torch.get_rng_state(), before)
    (broken / name).write_bytes(original)
    assert checkpoint.load(broken, trainer.learner.shard_sizes())[0]["step"] == 2


def test_a_number_edited_in_the_manifest_is_found(saved, tmp_path):
    """By its own checksum: an edited step, rank or size that fits the files would be believed otherwise."""
    _, path = saved
    text = (path / "MANIFEST.json").read_text()
    shutil.copytree(path, tmp_path / "copy")
    for old, new in (('"step": 2', '"step": 3'), ('"ranks": 1', '"ranks": 2')):
        assert old in text
        (tmp_path / "copy" / "MANIFEST.json").write_text(text.replace(old, new))
        with pytest.raises(CheckpointError, match="MANIFEST.json has changed"):
            checkpoint.load(tmp_path / "copy")


def test_a_folder_that_is_no_checkpoint_is_refused(saved, tmp_path):
    _, path = saved
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="no MANIFEST.json"):
            checkpoint.load(folder)
    shutil.copytree(path, tmp_path / "step-3")
    with pytest.raises(CheckpointError, match="says step 2, which is not this checkpoint's"):
        checkpoint.load(tmp_path / "step-3")


def save_small(folder, step, keep=2, write_model=lambda path: (path / "model.txt").write_text("m")):
    return checkpoint.save(
        folder, step, write_model=write_model, tensors=[("master", torch.arange(3.0))], state={"step": step}, keep=keep
    )


@pytest.mark.promise("A14")
def test_only_the_newest_are_kept_and_never_fewer_than_two(tmp_path):
    for step in (1, 2, 10, 9, 11):
        save_small(tmp_path, step, keep=1)
    assert [p.name for p in checkpoint.newest(tmp_path)] == ["step-11", "step-10"]
    save_small(tmp_path, 12, keep=3)
    assert [p.name for p in checkpoint.newest(tmp_path)] == ["step-12", "step-11", "step-10"]


@pytest.mark.promise("A14")
def test_only_what_is_named_as_a_checkpoint_is_removed(tmp_path):
    for step in (1, 2):
        save_small(tmp_path, step)
    os.rename(tmp_path / "step-1", tmp_path / "best")
    (tmp_path / "step-0x").mkdir()
    (tmp_path / "step-3").symlink_to(tmp_path / "best")
    for step in (4, 5, 6):
        save_small(tmp_path, step)
    assert {p.name for p in tmp_path.iterdir()} == {"best", "step-0x", "step-3", "step-5", "step-6"}
    assert checkpoint.load(tmp_path / "best")[0]["step"] == 1


@pytest.mark.promise("A14")
def test_old_ones_go_only_when_the_new_one_is_there(tmp_path, planned):
    for step in (1, 2):
        save_small(tmp_path, step)
    for point in ("optim", "rng", "model", "state", "manifest", "sync", "synced", "rename", "renamed"):
        planned(f"full@save.{point}")
        with pytest.raises(CheckpointError, match="could not be written"):
            save_small(tmp_path, 3)
        assert {p.name for p in tmp_path.iterdir()} - {"step-3"} == {"step-1", "step-2"}
    planned("")
    save_small(tmp_path, 4)
    assert checkpoint.newest(tmp_path)[0].name == "step-4" and len(checkpoint.newest(tmp_path)) == 2


@pytest.mark.promise("A4", trials=6)
def test_a_step_that_is_saved_again_is_never_without_a_checkpoint(tmp_path):
    for point in ("save.rename:2", "save.replace", "save.renamed:2", "save.rename:3", "save.replace:2", "save.sync:2"):
        folder = tmp_path / point
        child = os.fork()
        if child == 0:
            os.environ["FASTRL_FAULT"] = f"kill@{point}"
            faults.from_environment.cache_clear()
            for number in range(3):
                save_small(folder, 7, write_model=lambda path, n=number: (path / "model.txt").write_text(f"model {n}"))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
        checkpoint.remove_leftovers(folder)
        assert [p.name for p in folder.iterdir()] == ["step-7"]
        checkpoint.load(folder / "step-7")
        number = int((folder / "step-7" / "model.txt").read_text().split()[1])
        assert number == (1 if ("renamed" in point or point.endswith(":3") or point == "save.replace:2") else 0)


def test_checkpoints_of_an_abandoned_future_are_set_aside(tmp_path):
    for step in (10, 20, 30):
        save_small(tmp_path, step, keep=3)
    checkpoint.set_aside(tmp_path, 10)
    assert [p.name for p in checkpoint.newest(tmp_path)] == ["step-10"]
    save_small(tmp_path, 11, keep=2)
    assert [p.name for p in checkpoint.newest(tmp_path)] == ["step-11", "step-10"]
    assert (tmp_path / "abandoned-step-30" / "MANIFEST.json").exists()


def test_a_save_that_fails_leaves_the_older_checkpoint_alone(tmp_path):
    older = save_small(tmp_path, 1)

    def full_disk(path):
        (path / "model.txt").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step-2: the checkpoint could not be written .*No space left"):
        save_small(tmp_path, 2, write_model=full_disk)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1"]
    assert checkpoint.load(older)[0] == {"step": 1}
    # what a killed save leaves behind is no checkpoint, and the next save of that step replaces it
    (tmp_path / ".tmp-step-2").mkdir()
    (tmp_path / ".tmp-step-2" / "junk").write_text("x")
    assert [p.name for p in checkpoint.newest(tmp_path)] == ["step-1"]
    assert "junk" not in [p.name for p in save_small(tmp_path, 2).iterdir()]


def test_generators_kept_undoes_every_draw():
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    with checkpoint.generators_kept():
        inside = random.random(), numpy.random.rand(), torch.rand(()).item()
    assert inside == (random.random(), numpy.random.rand(), torch.rand(()).item())
