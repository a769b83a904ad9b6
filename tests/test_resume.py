"""Stopped and continued = never stopped, bit for bit; and the test that says so notices every missing piece."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import make_trainer, mostly_later, rows, step_records
from safetensors.torch import load_file, save_file

from fastrl import checkpoint
from fastrl.config import parse
from fastrl.run_config import AXES, EMBEDDED_RECIPE, TrainConfig
from fastrl.train import resume
from fastrl.types import CheckpointError

# 100 problems and 8 a step: epochs end in the middle of a run, and cuts fall in the middle of epochs
SMALL = """
    --problems-per-step 8 --limit 100 --eval-limit 8 --eval-k 2 --eval-every 10 --rollouts-every 1 --sample-every 0
    --threads 1 --keep 3 --reward last_character --reward noise.py:noise:0.05
""".split()

# a reward that draws from every global generator, so that none of them may be forgotten
NOISE = """
import random, numpy, torch
def noise(completions, **columns):
    return [random.random() + numpy.random.rand() + torch.rand(()).item() for _ in completions]
"""


def digest(path) -> dict[str, str]:
    """sha256 of the weights and of the optimizer state of a checkpoint."""
    names = ("model.safetensors", "optim-rank0.safetensors", "rng-rank0.safetensors", "rng-rank0.json")
    return {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}


def rollouts(folder) -> dict[str, str]:
    """Prompts, token ids, rewards and advantages of every step, as written."""
    return {path.name: path.read_text() for path in sorted((folder / "rollouts").iterdir())}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    (folder / "noise.py").write_text(NOISE)
    return folder


def train(workplace, *args) -> None:
    command = [sys.executable, "-m", "fastrl.train", *map(str, [*SMALL, *args])]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def straight(workplace):
    """The undisturbed run of 40 steps."""
    train(workplace, "--name", "straight", "--steps", 40)
    return workplace / "runs" / "straight"


@pytest.mark.slow
@pytest.mark.parametrize("cut", mostly_later([7, 20, 33], 20))
def test_a_run_cut_in_two_equals_one_that_was_not(cut, straight, workplace):
    name = f"cut{cut}"
    train(workplace, "--name", name, "--steps", cut)
    train(workplace, "--name", name, "--steps", 40, "--resume", "auto")
    folder = workplace / "runs" / name
    expected, actual = step_records(straight), step_records(folder)
    assert len(expected) == 40
    for one, other in zip(expected, actual, strict=True):
        assert one == other
    assert rollouts(straight) == rollouts(folder)
    assert digest(straight / "checkpoints/step-40") == digest(folder / "checkpoints/step-40")


@pytest.mark.slow
def test_eight_bit_state_continues_bit_for_bit(workplace):
    args = ["--optim.name", "adamw8bit", "--kl", "0.01", "--save-every", 6]
    train(workplace, "--name", "straight8", "--steps", 12, *args)
    train(workplace, "--name", "cut8", "--steps", 6, *args)
    train(workplace, "--name", "cut8", "--steps", 12, "--resume", "auto", *args)
    one, other = workplace / "runs/straight8", workplace / "runs/cut8"
    assert step_records(one) == step_records(other) and len(step_records(one)) == 12
    assert digest(one / "checkpoints/step-12") == digest(other / "checkpoints/step-12")
    state = load_file(one / "checkpoints/step-12/optim-rank0.safetensors")
    assert str(state["optimizer.state1"].dtype) == "torch.uint8"


def stale(path, early, item: str) -> None:
    """Overwrite one item of the checkpoint by what it was at an earlier step (or by zero), and sign it again."""
    if item.startswith("tensor:"):
        file = path / "optim-rank0.safetensors"
        tensors = load_file(file)
        name = item.removeprefix("tensor:")
        tensors[name] = load_file(early / "optim-rank0.safetensors")[name]
        save_file(tensors, file)
    elif item.startswith("file:"):
        shutil.copy(early / item.removeprefix("file:"), path)
    elif item.startswith("generator:"):
        file, name = path / "rng-rank0.json", item.removeprefix("generator:")
        state = json.loads(file.read_text())
        state[name] = json.loads((early / "rng-rank0.json").read_text())[name]
        file.write_text(json.dumps(state))
    else:
        file = path / "state.json"
        state = json.loads(file.read_text())
        keys = item.split(".")
        target = state
        for key in keys[:-1]:
            target = target[key]
        old = json.loads((early / "state.json").read_text())
        for key in keys:
            old = old[key]
        # what never changed in this run is set to a value it could have had
        target[keys[-1]] = old if old != target[keys[-1]] else old + 1
        file.write_text(json.dumps(state))
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"] = {
        name: {"size": (path / name).stat().st_size, "crc32": checkpoint.checksum(path / name)}
        for name in manifest["files"]
    }
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


ITEMS = [
    "step", "num_rollouts", "num_tokens", "num_backward_passes", "allocator.epoch", "allocator.position",
    "guard.skipped", "tensor:master", "tensor:optimizer.exp_avg", "tensor:optimizer.exp_avg_sq",
    "tensor:optimizer.step", "file:rng-rank0.safetensors", "generator:python", "generator:numpy",
]  # fmt: skip


@pytest.fixture(scope="module")
def short(workplace):
    """16 steps with checkpoints at 6 and 12, and the same continued from 12 in this process."""
    train(workplace, "--name", "short", "--steps", 16, "--save-every", 6)
    return workplace / "runs" / "short"


def continued(short, folder, workplace, monkeypatch, item=None) -> list[dict]:
    """Continue the short run from step 12 in this process, after making `item` stale -> records of steps 13 to 16."""
    shutil.copytree(short, folder)
    path = folder / "checkpoints" / "step-12"
    if item is not None:
        stale(path, folder / "checkpoints" / "step-6", item)
    monkeypatch.chdir(workplace)
    trainer = make_trainer(folder, *SMALL, "--steps", 16)
    with checkpoint.generators_kept():
        resume(trainer, str(path), trainer_config(folder))
        trainer.run()
    trainer.rollout.rewards.close()
    return step_records(folder)


def trainer_config(folder):
    return parse(TrainConfig, [str(EMBEDDED_RECIPE), "--out", str(folder), *map(str, SMALL)], AXES)


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the runs that are compared with
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_continuing_in_this_process_is_exact_too(short, tmp_path, workplace, monkeypatch):
    assert continued(short, tmp_path / "run", workplace, monkeypatch) == step_records(short)


@pytest.mark.slow
@pytest.mark.parametrize("item", ITEMS)
def test_every_stale_item_of_a_checkpoint_shows(item, short, tmp_path, workplace, monkeypatch):
    assert continued(short, tmp_path / "run", workplace, monkeypatch, item) != step_records(short)


@pytest.mark.slow
@pytest.mark.parametrize(
    "item", ["guard", "allocator", "update", "policy_version", "num_rollouts", "master", "optimizer.exp_avg"]
)
def test_a_checkpoint_without_an_item_is_refused(item, short, tmp_path, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    trainer = make_trainer(tmp_path / "run", *SMALL)
    with checkpoint.generators_kept():
        state, tensors = checkpoint.load(short / "checkpoints" / "step-12")
    if item in state:
        del state[item]
    else:
        del tensors[item]
    with pytest.raises(CheckpointError, match=item):
        trainer.load_state_dict(state, tensors)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_exactly(number, straight, workplace):
    name = f"signal{int(number)}"
    command = [sys.executable, "-m", "fastrl.train", *map(str, SMALL), "--name", name, "--steps", "40"]
    process = subprocess.Popen(command, cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step  9/"):
            process.send_signal(number)
            break
    process.stdout.read()
    assert process.wait(timeout=60) == 75
    folder = workplace / "runs" / name
    status = json.loads((folder / "status.json").read_text())
    assert status["reason"] == "stopped" and status["exit_code"] == 75 and 9 <= status["step"] < 40
    assert status["last_checkpoint"].endswith(f"step-{status['step']}")
    train(workplace, "--name", name, "--steps", 40, "--resume", "auto")
    assert step_records(folder) == step_records(straight)
    assert json.loads((folder / "status.json").read_text())["reason"] == "done"


@pytest.mark.slow
def test_a_second_signal_ends_the_program_at_once(workplace):
    command = [sys.executable, "-m", "fastrl.train", *map(str, SMALL), "--name", "twice", "--max-new-tokens", "10"]
    process = subprocess.Popen(command, cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    assert process.wait(timeout=30) in (75, 130)  # 75 if the save was through before the second one came
    assert time.monotonic() - start < 10
    process.stdout.close()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(short, tmp_path, workplace, monkeypatch, capsys):
    shutil.copytree(short, tmp_path / "run")
    weights = tmp_path / "run/checkpoints/step-16/optim-rank0.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    weights.write_bytes(damaged)
    monkeypatch.chdir(workplace)
    trainer = make_trainer(tmp_path / "run", *SMALL)
    config = trainer_config(tmp_path / "run")
    with checkpoint.generators_kept():
        with pytest.raises(CheckpointError, match="optim-rank0.safetensors has changed"):
            resume(trainer, str(weights.parent), config)
        resume(trainer, "auto", config)
    assert trainer.completed == 12
    assert "optim-rank0.safetensors has changed" in capsys.readouterr().out
    assert (weights.parent.parent / "abandoned-step-16").exists()


@pytest.mark.slow
def test_another_setting_is_refused_unless_allowed(short, workplace):
    command = [sys.executable, "-m", "fastrl.train", *map(str, SMALL), "--name", "short", "--steps", "17"]
    changed = [*command, "--resume", "auto", "--temperature", "0.9"]
    done = subprocess.run(changed, cwd=workplace, capture_output=True, text=True, timeout=100)
    assert done.returncode == 6
    assert "temperature was 1.0 and is now 0.9" in done.stderr and "--allow-change temperature" in done.stderr
    assert len(rows(short)) > 16  # nothing was lost by trying
