"""A master in two halves against one in float32: the same bits after the same gradients, in less memory."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from fastrl import checkpoint
from fastrl.base.types import CheckpointError
from fastrl.run.identity import check_same
from fastrl.settings.run import configure
from fastrl.weights import halves_adamw, shard
from fastrl.weights.halves import split
from fastrl.weights.halves_optim import SplitOptimizer
from support.cases import mostly_later
from support.programs import together
from support.short_trainings import BFLOAT16_STEPS, randomly_updated
from support.trainers import make_trainer

RULES = {
    "single": [],
    "sfpo": ["--update", "sfpo", "--lookahead", 2],
    "sfpo restore": ["--update", "sfpo", "--lookahead", 2, "--opt-state", "restore"],
    "sfpo scale": ["--update", "sfpo", "--lookahead", 2, "--opt-state", "scale"],
    "gxpo": ["--update", "gxpo"],
    "gxpo coord_grad": ["--update", "gxpo", "--ratio", "coord_grad", "--opt-state", "keep"],
    "gxpo tensor": ["--update", "gxpo", "--ratio", "tensor", "--min-effective-multiplier", 0.1],
    "gxpo refused": ["--update", "gxpo", "--min-effective-multiplier", 99],
    "8 bit": ["--optim.name", "adamw8bit"],
    "bfloat16 gradients": ["--grad-dtype", "bfloat16"],
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(shard, "SplitOptimizer", partial(SplitOptimizer, chunk=300_000))
    monkeypatch.setattr(halves_adamw, "PART", 293 * 1024)
    monkeypatch.setattr(halves_adamw, "kernel_on", lambda device: False)  # on a GPU it rounds otherwise


@pytest.mark.parametrize(
    "rule, bad",
    mostly_later(
        [*((rule, ()) for rule in RULES), ("single", (2,)), ("sfpo restore", (5,)), ("gxpo", (5,)), ("gxpo", (6,))],
        ("8 bit", ()),
        ("sfpo restore", (5,)),
        ("gxpo", (5,)),
        ("gxpo tensor", ()),
    ),
)
def test_the_same_bits_as_a_float32_master(rule, bad, tmp_path):
    """bad: which gradients are not finite."""
    whole, expected = randomly_updated(tmp_path / "whole", RULES[rule], "float32", bad=bad)
    halves, actual = randomly_updated(tmp_path / "halves", RULES[rule], "split", bad=bad)
    assert rule != "8 bit" or len(halves.learner.policy.optimizer.parts) == 3
    assert actual == expected and sum(m["num_backward_passes"] for m in actual) >= 5
    before, after = dict(whole.learner.policy.state_tensors()), dict(halves.learner.policy.state_tensors())
    assert list(before) == list(after) and len(before) > 3
    for name in before:
        assert before[name].dtype == after[name].dtype and torch.equal(before[name].cpu(), after[name].cpu()), name
    one, other = whole.learner.policy.flat.weights, halves.learner.policy.flat.weights
    # halfway between two bfloat16 values float32 goes to the even one, and the halves away from zero
    tie = (whole.learner.policy.master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(one[~tie], other[~tie])
    assert tie.float().mean() < 1e-3
    assert other.data_ptr() == halves.learner.policy.master.data_ptr()


RANKS = """
import torch
from pathlib import Path
from support.short_trainings import randomly_updated
from fastrl.base import ranks
ranks.start("cpu")
found = {{}}
for master in ("float32", "split"):
    folder = Path({folder!r}) / f"{{master}}{{ranks.rank()}}"
    policy = randomly_updated(folder, ["--update", "gxpo"], master)[0].learner.policy
    found[master] = dict(policy.state_tensors()) | {{"weights": policy.flat.weights}}
torch.save(found | {{"low": policy.low}}, Path({folder!r}) / f"{{ranks.rank()}}.pt")
ranks.barrier()
ranks.stop()
ranks.leave(0)
"""


@pytest.mark.slow
@pytest.mark.soak
def test_each_rank_has_the_lower_half_of_its_shard(tmp_path):
    together(tmp_path, RANKS.format(folder=str(tmp_path)))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["split"]["weights"], second["split"]["weights"])
    for found in (first, second):
        assert 2 * len(found["low"]) == len(found["split"]["weights"])
        for name in set(found["split"]) - {"weights"}:
            assert torch.equal(found["split"][name], found["float32"][name]), name
    master = torch.cat([first["split"]["master"], second["split"]["master"]])
    assert torch.equal(split(master)[0], first["split"]["weights"])
    assert not torch.equal(first["split"]["master"], second["split"]["master"])


def test_bytes_per_parameter(tmp_path):
    policy = randomly_updated(tmp_path, [], "split", steps=1)[0].learner.policy
    P = policy.flat.weights.numel()
    assert policy.master.untyped_storage().data_ptr() == policy.flat.weights.untyped_storage().data_ptr()
    assert policy.low.dtype == torch.int16 and policy.low.untyped_storage().nbytes() == 2 * P
    assert sum(t.untyped_storage().nbytes() for t in policy.optimizer.resident() if t.numel() > 1) == 8 * P
    parts = randomly_updated(tmp_path, RULES["8 bit"], "split", steps=1)[0].learner.policy.optimizer.parts
    buffers = {part.shard.untyped_storage().data_ptr(): part.shard.untyped_storage() for part in parts}
    assert len(buffers) == 1 and next(iter(buffers.values())).nbytes() < 1.01 * 4 * P / 3


@pytest.mark.parametrize(
    "rule, then, now",
    mostly_later(
        [
            (rule, *pair)
            for rule in ("single", "8 bit")
            for pair in (("split", "split"), ("split", "float32"), ("float32", "split"))
        ],
        ("single", "split", "split"),
        ("8 bit", "split", "float32"),
    ),
)
def test_a_run_goes_on_with_either_master(rule, then, now, tmp_path):
    first, _ = randomly_updated(tmp_path / "first", RULES[rule], then, steps=2)
    first.save()
    stored = load_file(first.last_checkpoint / "optim-rank0.safetensors")
    assert stored["master"].dtype == torch.float32 and len(stored["master"]) == len(first.learner.policy.master)
    second = make_trainer(tmp_path / "second", *BFLOAT16_STEPS, *RULES[rule], "--master", now)
    with checkpoint.generators_kept():
        state, tensors = checkpoint.load(first.last_checkpoint)
    if then != now:
        with pytest.raises(CheckpointError, match=f"master was {then} and is now {now}"):
            check_same(state["config"], second.config, {"out"}, tmp_path)
    check_same(state["config"], second.config, {"out", "master"}, tmp_path)
    # in memory that an optimizer could go on with: chunks must not share a step count
    second.load_state_dict(state, {name: tensor.clone() for name, tensor in tensors.items()})
    direction = torch.randn(len(first.learner.policy.flat.grads), generator=torch.Generator().manual_seed(9)) * 1e-3
    for trainer in (first, second):
        for factor in (1.0, 0.5):
            trainer.learner.policy.set_lr(1e-3)
            trainer.learner.policy.flat.grads.copy_(direction * factor)
            trainer.learner.policy.optimizer_step(0.0)
    one, other = dict(first.learner.policy.state_tensors()), dict(second.learner.policy.state_tensors())
    for name in one:
        assert torch.equal(one[name].cpu(), other[name].cpu()), name
    if then == now:
        assert torch.equal(first.learner.policy.flat.weights, second.learner.policy.flat.weights)


def test_a_training_step_with_it(tmp_path):
    trainer = make_trainer(tmp_path, *BFLOAT16_STEPS, "--master", "split", "--objective", "ppo", "--update", "sfpo")
    before = trainer.learner.policy.flat.weights.clone()
    assert trainer.step()["grad_norm"] > 0
    assert trainer.learner.critic.low is not None and not torch.equal(before, trainer.learner.policy.flat.weights)


def test_only_bfloat16_weights_have_halves():
    with pytest.raises(ValueError, match="these are torch.float32; use --dtype bfloat16, or --master float32"):
        configure(["--master", "split"])
