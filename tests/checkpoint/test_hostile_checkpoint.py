"""Checkpoints made to do harm: refused before a byte of them is used, and nothing is written outside the run folder."""

import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastrl import checkpoint
from fastrl.base.exits import exit_code
from fastrl.base.types import CheckpointError
from fastrl.run.resume import resume
from fastrl.settings.parse import parse
from fastrl.settings.run import AXES, EMBEDDED_RECIPE, TrainConfig
from support.run_folders import sign_again
from support.trainers import make_trainer

ARGS = ["--problems-per-step", "2", "--group-size", "2", "--eval-limit", "2", "--reward", "last_character"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A run folder with one checkpoint, of step 1."""
    folder = tmp_path_factory.mktemp("good")
    trainer = make_trainer(folder, *ARGS)
    trainer.step()
    trainer.save()
    return folder


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("fresh"), *ARGS)


class Evil:
    """Unpickling it makes the file `canary` in the working directory."""

    def __reduce__(self):
        return os.mkdir, ("canary",)


def header(path, text: bytes, length: int | None = None, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def beside(name):
    def attack(path):
        (path / name).write_bytes(pickle.dumps(Evil()))

    return attack


def named(name):
    def attack(path):
        (path / name).write_bytes(pickle.dumps(Evil()))
        sign_again(path)

    return attack


def tensors_header(text: bytes, **kwargs):
    def attack(path):
        header(path / "optim-rank0.safetensors", text, **kwargs)
        sign_again(path)

    return attack


def wrong_tensor(name, tensor):
    def attack(path):
        file = path / "optim-rank0.safetensors"
        save_file({**load_file(file), name: tensor}, file)
        sign_again(path)

    return attack


def manifest_names(name):
    def attack(path):
        files = json.loads((path / "MANIFEST.json").read_text())["files"]
        sign_again(path, files={**files, name: {"size": 1, "crc32": 0}})

    return attack


def link(path):
    outside = path.parent.parent.parent / "outside.json"
    shutil.move(path / "state.json", outside)
    (path / "state.json").symlink_to(outside)


def pipe(path):
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")


def index(path):
    content = {"weight_map": {"model.norm.weight": "../../outside.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(content))
    sign_again(path)


def twice(path):
    text = (path / "MANIFEST.json").read_text()
    (path / "MANIFEST.json").write_text(text.replace('"version": 2', '"version": 1, "version": 2'))


def state(**changed):
    def attack(path):
        content = json.loads((path / "state.json").read_text())
        for name, value in changed.items():
            target = content
            *outer, last = name.split("__")
            for part in outer:
                target = target[part]
            target[last] = value
        (path / "state.json").write_text(json.dumps(content))
        sign_again(path)

    return attack


def step(number, **also):
    def attack(path):
        state(step=number)(path)
        sign_again(path, step=number)

    return attack


def deep(path):
    (path / "state.json").write_text("[" * 100_000 + "]" * 100_000)
    sign_again(path)


def huge(path):
    with (path / "state.json").open("r+b") as file:
        file.truncate(2**36)  # of no blocks: to read it would take minutes
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"]["state.json"]["size"] = 2**36
    (path / "MANIFEST.json").write_text(checkpoint.manifest_text(manifest))


OVERLAP = (
    b'{"master":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"optimizer.step":'
    b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
)
DOUBLE = OVERLAP.replace(b"optimizer.step", b"master")

# the thirteen of the promise, by what each tries
ATTACKS = {
    "pickle beside": (beside("evil.pt"), "'evil.pt' is not named in the manifest"),
    "DCP metadata": (beside(".metadata"), "'.metadata' is not named in the manifest"),
    "rng pickle": (beside("rng_state.pth"), "'rng_state.pth' is not named in the manifest"),
    "header of 100 GB": (tensors_header(b"{}", length=10**11), "header claims 100000000000 bytes"),
    "overlapping offsets": (tensors_header(OVERLAP, data=bytes(4)), "not readable|needs"),
    "wrong dtype": (wrong_tensor("master", torch.zeros(8, dtype=torch.int32)), "master is 'I32', expected F32 or F64"),
    "path upwards": (manifest_names("../outside"), "names '../outside'"),
    "absolute path": (manifest_names("/etc/passwd"), "names '/etc/passwd'"),
    "link": (link, "state.json is named in the manifest but missing, or no plain file"),
    "NUL": (manifest_names("a\0b"), r"names 'a\\x00b'"),
    "names twice": (tensors_header(DOUBLE, data=bytes(4)), "comes twice"),
    "step of 10**30": (step(10**30), "says step 1000000000000000000000000000000"),
    "negative step": (step(-1), "says step -1"),
}
MORE = {
    "named pickle": (named("evil.pt"), "names 'evil.pt'"),
    "named code": (named("modeling.py"), "names 'modeling.py'"),
    "index upwards": (index, "leads to a file that the manifest does not name"),
    "pipe": (pipe, "no plain file"),
    "manifest twice": (twice, "comes twice|has changed"),
    "deep": (deep, "RecursionError"),
    "text": (state(num_tokens="1"), "num_tokens is '1', expected a number"),
    "truth": (state(num_rollouts=True), "num_rollouts is True, expected an integer"),
    "position": (state(allocator__position=10**9), "is at group 1000000000 of an epoch that has"),
    "negative": (state(guard__skipped=-1), "guard: skipped is -1, expected an integer"),
    "beyond": (state(allocator__epoch=10**30), "allocator: epoch is 1000000000"),
    "list": (state(guard=[1]), r"guard is \[1\], expected an object"),
    "deep list": (state(guard__window=[[[1.0]]]), r"window is \[\[\[1.0\]\]\], expected a list of numbers"),
    "unknown object": (state(health__streaks={"a": {"b": 1}}), "streaks: 'a' is .*, expected a number"),
    "no config": (state(config=3), "no config or no identity"),
    "unknown tensor": (wrong_tensor("optimizer.evil", torch.zeros(1)), "which this run has not"),
    "long tensor": (wrong_tensor("optimizer.exp_avg", torch.zeros(5)), r"has the shape \[5\]"),
    "huge": (huge, "of state.json, expected size and crc32"),
}


def files_of(folder) -> dict:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.promise("D2")) for n in ATTACKS), *MORE])
def test_it_is_refused(name, good, trainer, tmp_path, monkeypatch):
    attack, text = {**ATTACKS, **MORE}[name]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copytree(good, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-1"
    attack(path)
    before = files_of(tmp_path)
    config = parse(TrainConfig, [str(EMBEDDED_RECIPE), "--out", str(tmp_path / "run"), *ARGS], AXES)
    for wanted in (str(path), "auto"):
        with checkpoint.generators_kept(), pytest.raises(CheckpointError, match=text) as error:
            resume(trainer, wanted, config)
        assert exit_code(error.value) == 6 and len(str(error.value)) < 1000
    assert trainer.completed == 0
    assert files_of(tmp_path) == before and not list((tmp_path / "elsewhere").iterdir())


def test_the_canary_lives_when_such_a_file_is_opened(tmp_path, monkeypatch):
    """What the attacks carry does run, if somebody unpickles it."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil()))  # noqa: S301, to see that it is one
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["step-1000000000000000000000000000000", "step--1", "step-²", "step-01", "step-1\n"])
def test_a_folder_with_such_a_step_in_its_name_is_no_checkpoint(name, tmp_path):
    (tmp_path / name).mkdir()
    assert checkpoint.newest(tmp_path) == []


def test_the_program_ends_with_6(good, tmp_path):
    from support.programs import run

    shutil.copytree(good, tmp_path / "runs" / "evil")
    path = tmp_path / "runs" / "evil" / "checkpoints" / "step-1"
    beside("rng_state.pth")(path)
    said = run(tmp_path, *ARGS, "--name", "evil", "--steps", 2, "--resume", path, code=6)
    assert "fastrl: error:" in said and "rng_state.pth" in said and "Traceback" not in said
    assert json.loads((tmp_path / "runs/evil/status.json").read_text())["exit_code"] == 6
    assert not (tmp_path / "canary").exists()
