"""Checkpoints are complete or refused, and the model part is a Hugging Face folder."""

import json
import random
import shutil

import numpy
import pytest
import torch
from helpers import make_trainer

from fastrl import checkpoint
from fastrl.types import CheckpointError


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
        assert torch.equal(model(ids).logits, trainer.policy.model(ids).logits)
    fresh = make_trainer(path.parent / "fresh", "--eval-limit", 4)
    assert not torch.equal(fresh.policy.flat.weights, trainer.policy.flat.weights)  # training did move them


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
    own = dict(trainer.policy.state_tensors())
    assert tensors.keys() == own.keys() and all(torch.equal(tensors[n], own[n]) for n in own)


def test_every_damage_to_every_file_is_found(saved, tmp_path):
    _, path = saved
    names = [p.name for p in path.iterdir() if p.name != "MANIFEST.json"]
    assert {"model.safetensors", "config.json", "state.json", "optim-rank0.safetensors", "tokenizer.json"} <= set(names)
    rng = random.Random(0)
    for name in names:
        original = (path / name).read_bytes()
        flipped = bytearray(original)
        flipped[rng.randrange(len(original))] ^= 1 << rng.randrange(8)
        zeroed = original[: len(original) // 2] + bytes(64) + original[len(original) // 2 + 64 :]
        damages = [bytes(flipped), original[:-1], original[: len(original) // 2], b"", original + b"x", None]
        for damage in damages + ([zeroed] if zeroed != original else []):
            broken = tmp_path / "step-2"
            shutil.copytree(path, broken)
            if damage is None:
                (broken / name).unlink()
            else:
                (broken / name).write_bytes(damage)
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                checkpoint.load(broken)
            shutil.rmtree(broken)


def test_a_hostile_or_foreign_manifest_is_refused(saved, tmp_path):
    _, path = saved
    manifest = json.loads((path / "MANIFEST.json").read_text())
    outside = tmp_path / "outside"
    outside.write_text("x")
    entry = {"size": 1, "crc32": checkpoint.checksum(outside)}
    cases = {
        "../outside": {**manifest, "files": {"../outside": entry}},
        "version 1": {**manifest, "version": 99},
        "written by 4 ranks but this run has 1": {**manifest, "ranks": 4},
    }
    for text, content in cases.items():
        broken = tmp_path / "step-2"
        shutil.copytree(path, broken)
        (broken / "MANIFEST.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=text):
            checkpoint.load(broken)
        shutil.rmtree(broken)
    with pytest.raises(CheckpointError, match="no MANIFEST.json"):
        checkpoint.load(tmp_path)


def save_small(folder, step, keep=2, write_model=lambda path: (path / "model.bin").write_text("m")):
    return checkpoint.save(
        folder, step, write_model=write_model, tensors=[("x", torch.arange(3.0))], state={"step": step}, keep=keep
    )


def test_only_the_newest_are_kept_and_never_fewer_than_two(tmp_path):
    for step in (1, 2, 10, 9, 11):
        save_small(tmp_path, step, keep=1)
    assert [p.name for p in checkpoint.newest(tmp_path)] == ["step-11", "step-10"]
    save_small(tmp_path, 12, keep=3)
    assert [p.name for p in checkpoint.newest(tmp_path)] == ["step-12", "step-11", "step-10"]


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
        (path / "model.bin").write_text("half")
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
