"""A rule that keeps tensors from step to step: how it is checked, counted and refused before a save could fail."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fastrl.settings.memory import plan_of
from fastrl.settings.run import configure
from fastrl.updates import UPDATES
from fastrl.updates.base import UpdateRule, one_pass
from fastrl.updates.single import Single
from support.arguments import SMALL_STEPS
from support.trainers import make_trainer


@dataclass(kw_only=True)
class Keeping(UpdateRule):
    """Keeps a copy of the weights; where and what of it is changed by each test."""

    where: str = "state_tensors"
    mean: Tensor | None = field(default=None, init=False, repr=False)

    keeps = 1

    def start(self, shard) -> None:
        if self.where != "lazy":
            self.mean = shard.snapshot()
        if self.where == "short":
            self.mean = self.mean[:-1]

    def update(self, shard, minibatches) -> dict[str, float]:
        self.mean = shard.snapshot()
        return one_pass(shard, minibatches)

    def state_dict(self) -> dict:
        return {"mean": self.mean} if self.where == "state_dict" else {}

    def state_tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean} if self.where in ("state_tensors", "short") else {}


@pytest.fixture
def trainer_of(monkeypatch, tmp_path):
    monkeypatch.setitem(UPDATES, "keeping", Keeping)
    return lambda **changed: make_trainer(
        tmp_path, *SMALL_STEPS, "--update", "keeping", *(x for k, v in changed.items() for x in (f"--{k}", v))
    )


def test_what_is_kept_is_in_the_checkpoint(trainer_of):
    trainer = trainer_of()
    trainer.step()
    kept = dict(trainer.learner.state_tensors())["update.mean"]
    assert torch.equal(kept, trainer.learner.update.mean) and "update.mean" in trainer.state_dict()["tensors"]
    trainer.save()


@pytest.mark.parametrize(
    "where, said",
    [
        ("state_dict", r"state_dict\(\) must be JSON, but .*Tensor.*return tensors from state_tensors\(\)"),
        ("nowhere", r"keeps = 1 .* but state_tensors\(\) has 0 tensors; make them in start\(\)"),
        ("short", r"state_tensors\(\) has 'mean' torch.float32 \(\d+,\), expected a vector like the shard"),
    ],
)
def test_it_is_refused_at_the_start(where, said, trainer_of):
    with pytest.raises(ValueError, match=f"update rule Keeping: {said}"):
        trainer_of(where=where)


def test_a_tensor_that_appears_later_is_refused_after_its_first_step(trainer_of, monkeypatch):
    monkeypatch.setattr(Keeping, "keeps", 0)
    trainer = trainer_of(where="lazy")
    with pytest.raises(ValueError, match="the tensor 'mean' is kept from step to step and would be in no checkpoint"):
        trainer.step()


def test_the_memory_plan_counts_it(monkeypatch):
    config = configure([])
    how = dict(device="cpu", dtype=torch.bfloat16, tokens_per_microbatch=2048, engine="hf")
    without = plan_of(config, **how)
    monkeypatch.setattr(Single, "keeps", 2)
    plan = plan_of(config, **how)
    shard = plan.parts["master"]["step"] // 4
    for phase in plan.phases:
        assert plan.total(phase) - without.total(phase) == 2 * 4 * shard
