"""Stopped and continued = never stopped, bit for bit; and the test that says so notices every missing piece."""

import itertools
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from fastrl import checkpoint
from fastrl.base.types import CheckpointError
from fastrl.run.resume import resume
from fastrl.settings.parse import parse
from fastrl.settings.run import AXES, EMBEDDED_RECIPE, TrainConfig
from support import programs
from support.cases import mostly_later
from support.run_folders import digest, rows, sign_again, step_records
from support.trainers import make_trainer

SMALL = """
    --problems-per-step 2 --group-size 4 --eval-limit 2 --eval-k 2 --rollouts-every 1 --sample-every 0
    --threads 1 --keep 3 --reward last_character --reward noise.py:noise:0.05 --warmup 30 --kl 0.01
""".split()

# a reward that draws from every global generator, so that none of them may be forgotten
NOISE = """
import random, numpy, torch
def noise(completions, **columns):
    return [random.random() + numpy.random.rand() + torch.rand(()).item() for _ in completions]
"""


def rollouts(folder) -> dict[str, str]:
    """Prompts, token ids, rewards and advantages of every step, as written."""
    return {path.name: path.read_text() for path in sorted((folder / "rollouts").iterdir())}


def ending(folder, step: int) -> tuple[list[dict], dict, dict]:
    """Records of all steps; digests and state of the checkpoint of `step`, without the settings of its process."""
    path = folder / f"checkpoints/step-{step}"
    state = json.loads((path / "state.json").read_text())
    return step_records(folder), digest(path), {name: state[name] for name in state if name != "config"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    (folder / "noise.py").write_text(NOISE)
    return folder


@pytest.fixture(scope="module")
def straight(workplace):
    """settings -> the folder of the undisturbed run with them; each is made once."""
    made = {}

    def of(*args):
        if args not in made:
            made[args] = workplace / "runs" / f"straight{len(made)}"
            programs.run(workplace, *SMALL, "--name", made[args].name, *args)
        return made[args]

    return of


def same_after_a_cut(cut: int, steps: int, workplace, straight, *args) -> None:
    """A run that a signal ends behind step `cut`, and its continuation in a new process, against one of `steps`."""
    args = ("--steps", steps, *args)
    expected = straight(*args)
    folder = workplace / "runs" / f"cut{sum(1 for _ in (workplace / 'runs').iterdir())}"
    # graded once by the first evaluation and once a step; the step in which the signal comes is abandoned
    programs.run(workplace, *SMALL, "--name", folder.name, *args, code=75, FASTRL_FAULT=f"term@grade:{cut + 2}")
    status = json.loads((folder / "status.json").read_text())
    assert (status["reason"], status["step"]) == ("stopped", cut)
    programs.run(workplace, *SMALL, "--name", folder.name, *args, "--resume", "auto")
    assert len(step_records(expected)) == steps
    for one, other in zip(step_records(expected), step_records(folder), strict=True):
        assert one == other
    assert rollouts(expected) == rollouts(folder)
    assert ending(expected, steps)[1:] == ending(folder, steps)[1:]
    shutil.rmtree(folder)


# with 2 problems a step, cuts fall in the middle of epochs of 100 problems, and every cut is an end of one of 2
EPOCHS = {"in an epoch": 100, "at its end": 2}
GRID = list(itertools.product([1, 7, 20, 33], ["float32", "bfloat16"], ["adamw", "adamw8bit"], EPOCHS))


@pytest.mark.soak
@pytest.mark.promise("A1")
@pytest.mark.parametrize("cut, dtype, optimizer, where", sorted(GRID, key=lambda case: case[1:]))
def test_a_new_process_goes_on_as_the_run_did(cut, dtype, optimizer, where, workplace, straight):
    args = ("--dtype", dtype, "--optim.name", optimizer, "--limit", EPOCHS[where])
    expected = straight("--steps", 43, "--save-every", 1, "--keep", 99, *args)
    folder, steps = workplace / "runs" / f"cut{cut}-{expected.name}", cut + 10
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(expected / "metrics.jsonl", folder)
    shutil.copytree(expected / f"checkpoints/step-{cut}", folder / f"checkpoints/step-{cut}")
    said = programs.run(workplace, *SMALL, "--name", folder.name, "--steps", steps, *args, "--resume", "auto")
    assert f"resume: step {cut} from" in said
    assert len(step_records(expected)) == 43 and len(step_records(folder)) == steps
    for one, other in zip(step_records(expected)[:steps], step_records(folder), strict=True):
        assert one == other
    sampled = rollouts(folder)
    assert len(sampled) == 10 and sampled.items() <= rollouts(expected).items()
    assert ending(expected, steps)[1:] == ending(folder, steps)[1:]
    shutil.rmtree(folder)


@pytest.mark.promise("A1")
@pytest.mark.parametrize(
    "dtype, optimizer, where",
    mostly_later(
        [("float32", "adamw", "in an epoch"), ("bfloat16", "adamw8bit", "at its end")],
        ("bfloat16", "adamw8bit", "at its end"),
    ),
)
def test_a_short_run_cut_in_two_equals_one_that_was_not(dtype, optimizer, where, workplace, straight):
    args = ("--dtype", dtype, "--optim.name", optimizer, "--limit", EPOCHS[where])
    same_after_a_cut(3, 13, workplace, straight, *args)
    state = load_file(straight("--steps", 13, *args) / "checkpoints/step-13/optim-rank0.safetensors")
    assert ("optimizer.state1" in state) == (optimizer == "adamw8bit") and str(state["master"].dtype) == "torch.float32"


@pytest.mark.promise("A3")
@pytest.mark.parametrize("seed", mostly_later([0, 1, 2]))
def test_the_same_seed_twice_is_the_same_run(seed, workplace):
    folders = [workplace / "runs" / f"seed{seed}-{n}" for n in (1, 2)]
    for folder in folders:
        programs.run(workplace, *SMALL, "--name", folder.name, "--steps", 8, "--limit", 100, "--seed", seed)
    one, other = folders
    assert step_records(one) == step_records(other) and len(step_records(one)) == 8
    assert rollouts(one) == rollouts(other)
    assert digest(one / "checkpoints/step-8") == digest(other / "checkpoints/step-8")


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
        other = old[::-1] if isinstance(old, str) else old if old != target[keys[-1]] else (old or 0) + 1
        target[keys[-1]] = other
        file.write_text(json.dumps(state))
    sign_again(path)


# what a resumed run would forget, and the part of it that the promise names
ITEMS = {
    "step": "scheduler",
    "num_rollouts": "",
    "num_tokens": "",
    "num_backward_passes": "",
    "allocator.epoch": "sampler epoch",
    "allocator.position": "data position",
    "guard.skipped": "skip counters",
    "tensor:master": "optimizer",
    "tensor:optimizer.exp_avg": "",
    "tensor:optimizer.exp_avg_sq": "",
    "tensor:optimizer.step": "",
    "file:rng-rank0.safetensors": "torch and device generators",
    "generator:python": "python generator",
    "generator:numpy": "numpy generator",
    "update.since": "alpha schedule",
    "update.watch.values": "entropy buffer",
    "update.watch.seen": "switch-off gate",
    "guard.window": "spike window",
    "identity.reference": "reference",
}
NOW = {"step", "allocator.position", "tensor:optimizer.exp_avg", "file:rng-rank0.safetensors", "update.since"}


SFPO = ["--update", "sfpo", "--lookahead", "1", "--gate-window", "3", "--gate-threshold", "0.5", "--decay-steps", "9"]
SHORT = [*SMALL, "--limit", "10", "--steps", "16", "--save-every", "6", *SFPO]


@pytest.fixture(scope="module")
def short(workplace):
    """16 steps with checkpoints at 6 and 12, over epochs of 5 steps; SFPO's gate trips in between."""
    programs.run(workplace, *SHORT, "--name", "short")
    return workplace / "runs" / "short"


def continued(short, folder, workplace, monkeypatch, item=None) -> tuple:
    """Continue the short run from step 12 in this process, after making `item` stale -> its ending."""
    shutil.copytree(short, folder)
    path = folder / "checkpoints" / "step-12"
    if item is not None:
        stale(path, folder / "checkpoints" / "step-6", item)
    monkeypatch.chdir(workplace)
    trainer = make_trainer(folder, *SHORT)
    with checkpoint.generators_kept():
        resume(trainer, str(path), trainer_config(folder))
        trainer.run()
    trainer.rollout.rewards.close()
    return ending(folder, 16)


def trainer_config(folder):
    return parse(TrainConfig, [str(EMBEDDED_RECIPE), "--out", str(folder), *map(str, SHORT)], AXES)


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the runs that are compared with
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_continuing_in_this_process_is_exact_too(short, tmp_path, workplace, monkeypatch):
    assert continued(short, tmp_path / "run", workplace, monkeypatch) == ending(short, 16)


@pytest.mark.slow
@pytest.mark.promise("A2")
@pytest.mark.parametrize("item", mostly_later(ITEMS, *NOW))
def test_every_stale_item_of_a_checkpoint_shows(item, short, tmp_path, workplace, monkeypatch):
    try:
        found = continued(short, tmp_path / "run", workplace, monkeypatch, item)
    except CheckpointError as error:
        assert item in ("step", "identity.reference", "tensor:optimizer.step"), error
    else:
        assert found != ending(short, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "item", ["guard", "allocator", "update", "policy_version", "num_rollouts", "master", "optimizer.exp_avg"]
)
def test_a_checkpoint_without_an_item_is_refused(item, short, tmp_path, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    trainer = make_trainer(tmp_path / "run", *SHORT)
    with checkpoint.generators_kept():
        state, tensors = checkpoint.load(short / "checkpoints" / "step-12")
    if item in state:
        del state[item]
    else:
        del tensors[item]
    with pytest.raises(CheckpointError, match=item):
        trainer.load_state_dict(state, tensors)


@pytest.mark.slow
@pytest.mark.promise("A5")
def test_a_damaged_checkpoint_is_passed_over(short, tmp_path, workplace, monkeypatch, capsys):
    shutil.copytree(short, tmp_path / "run")
    weights = tmp_path / "run/checkpoints/step-16/optim-rank0.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    weights.write_bytes(damaged)
    monkeypatch.chdir(workplace)
    trainer = make_trainer(tmp_path / "run", *SHORT)
    config = trainer_config(tmp_path / "run")
    with checkpoint.generators_kept():
        with pytest.raises(CheckpointError, match="optim-rank0.safetensors has changed"):
            resume(trainer, str(weights.parent), config)
        resume(trainer, "auto", config)
    assert trainer.completed == 12
    assert "optim-rank0.safetensors has changed" in capsys.readouterr().out
    assert (weights.parent.parent / "abandoned-step-16").exists()
    assert {"step": 12, "ckpt/rejected": 1.0} in rows(tmp_path / "run")
