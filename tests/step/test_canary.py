"""The canary after a resume: it sees an engine that samples from other weights before the first rollout."""

import copy

import pytest

from fastrl import checkpoint
from fastrl.base.types import EngineError
from fastrl.engine.hf import HFEngine
from fastrl.step.canary import Canary
from support.cases import mostly_later
from support.trainers import make_trainer

ARGS = ["--problems-per-step", 4, "--group-size", 4, "--eval-limit", 2, "--reward", "last_character", "--lr", 3e-3]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, *ARGS)
    for _ in range(2):
        trainer.step()
    trainer.save()
    return trainer.last_checkpoint


@pytest.mark.promise("A12")
@pytest.mark.parametrize("seed", mostly_later(range(5), 0))
def test_a_resumed_engine_samples_from_the_restored_weights(seed, saved, tmp_path):
    trainer = make_trainer(tmp_path, *ARGS, "--seed", seed)
    first = copy.deepcopy(trainer.learner.policy.model)
    with checkpoint.generators_kept():
        trainer.load_state_dict(*checkpoint.load(saved, trainer.learner.shard_sizes()))
    canary = Canary.of(trainer.rollout.engine, trainer.learner.policy, 1.0, trainer.allocator.problems, 200)
    trainer.rollout.canary = canary.check
    trainer.step()
    assert trainer.rollout.canary_metrics["sampling/canary_logp_difference/mean"] < 1e-4
    # an engine over a copy that was made before
    own = trainer.rollout.engine
    stale = HFEngine(first, eos_ids=tuple(own.eos_ids.tolist()), pad_id=own.pad_id, num_tokens=own.num_tokens)
    stale.policy_version = own.policy_version
    trainer.rollout.engine = canary.engine = stale
    completed = trainer.completed
    with pytest.raises(EngineError, match="does not sample from the trainer's weights"):
        trainer.step()
    assert trainer.completed == completed
