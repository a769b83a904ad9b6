"""What has memory while sampling, and that it comes back as it was."""

import json

import numpy
import pytest
import torch
from safetensors.torch import load_file

from fastrl import checkpoint
from fastrl.kernels import rows
from fastrl.kernels.workspace import Workspace
from fastrl.step.learner import Minibatch
from fastrl.weights.offload import HostCopies
from support.batches import prepared_batch
from support.cases import mostly_later
from support.run_folders import without_times
from support.trainers import make_trainer

SMALL = ["--problems-per-step", 4, "--group-size", 4, "--eval-limit", 4, "--sample-every", 0, "--rollouts-every", 0]
RULES = {
    "single": [],
    "sfpo, critic": ["--update", "sfpo", "--lookahead", 2, "--objective", "ppo", "--opt-state", "restore"],
    "gxpo": ["--update", "gxpo"],
    "8 bit": ["--optim.name", "adamw8bit"],
    "split": ["--master", "split"],
}


def held(model) -> dict[str, int]:
    """Bytes on the device of what a model under training has beside its weights."""
    tensors = {"gradients": [model.flat.grads], "optimizer": model.optimizer.resident()}
    tensors["master"] = [model.master if model.low is None else model.low]
    own = model.flat.weights.untyped_storage().data_ptr()
    sizes = {}
    for name, group in tensors.items():
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in group)}
        sizes[name] = sum(size for place, size in storages.items() if place != own)
    return sizes


def trained(folder, *flags, count=3):
    """-> trainer after some steps, metrics of each, bytes held at each sampling by each model."""
    trainer, seen = make_trainer(folder, *SMALL, "--dtype", "bfloat16", *flags), []
    models = [m for m in (trainer.learner.policy, trainer.learner.critic) if m]
    sample = trainer.rollout.engine.sample
    trainer.rollout.engine.sample = lambda *args: seen.append([held(m) for m in models]) or sample(*args)
    metrics = [trainer.step() for _ in range(count)]
    return trainer, [without_times(m) for m in metrics], seen


@pytest.mark.parametrize("rule", mostly_later(RULES, "sfpo, critic", "split"))
def test_what_is_offloaded_changes_no_bit(rule, tmp_path):
    here, expected, kept = trained(tmp_path / "here", *RULES[rule])
    away, actual, left = trained(tmp_path / "away", *RULES[rule], "--offload", "optimizer,activations")
    assert json.dumps(actual) == json.dumps(expected) and expected[-1]["grad_norm"] > 0
    parts = dict(here.learner.state_tensors())
    assert parts.keys() == dict(away.learner.state_tensors()).keys() and len(parts) > 2
    for name, tensor in away.learner.state_tensors():
        assert torch.equal(tensor, parts[name]), name
    P = here.learner.policy.flat.weights.numel()
    assert kept[-1][0]["gradients"] == 0 and kept[-1][0]["master"] == (2 if rule == "split" else 4) * P
    assert kept[-1][0]["optimizer"] > (2 if rule == "8 bit" else 8) * P
    for models in left:
        assert len(models) == len(kept[0])
        for sizes in models:
            assert sizes["gradients"] == sizes["master"] == 0 and sizes["optimizer"] < 10_000  # counts and tables
    assert held(away.learner.policy)["gradients"] == 4 * P  # the update has left it awake
    assert held(away.learner.policy)["master"] > 0
    if away.learner.critic:
        assert held(away.learner.critic)["gradients"] == 0, (
            "the policy's update has the memory of the critic's gradients"
        )


def test_gradients_come_back_at_the_same_views(tmp_path):
    policy = make_trainer(tmp_path, *SMALL).learner.policy
    parameter = policy.model.base_model.norm.weight
    policy.flat.grads.fill_(3.0)
    policy.rest()
    assert parameter.grad.untyped_storage().nbytes() == 0
    policy.wake()
    policy.zero_grad()
    assert not policy.flat.grads.any() and policy.flat.grads.numel() == policy.flat.weights.numel()
    parameter.sum().backward()
    assert policy.flat.grads.sum() == parameter.numel() == parameter.grad.sum()


@pytest.mark.parametrize("fused", [True, False])
def test_the_logits_of_all_microbatches_have_one_memory_until_the_policy_rests(fused, tmp_path, monkeypatch):
    """Through the kernels of the head, fused with the loss or before it."""
    monkeypatch.setattr(rows, "BLOCK_V", 64)
    learner = (trainer := make_trainer(tmp_path, *SMALL, "--entropy", 0.01)).learner
    policy, batch = learner.policy, prepared_batch(trainer)
    learner.fitting.tokens = 60
    expected = learner.accumulate(Minibatch(batch)), policy.flat.grads.clone()
    policy.triton = True
    monkeypatch.setattr(type(learner.objective), "fuses", fused)
    made, asked = [], policy.workspace.logits

    def logits(rows, words, device):
        z = asked(rows, words, device)
        made.append((rows * words, policy.workspace.memory.numel()))
        return z

    monkeypatch.setattr(Workspace, "logits", lambda self, *given: logits(*given))
    metrics = learner.accumulate(Minibatch(batch))
    assert metrics == pytest.approx(expected[0], rel=1e-3, abs=1e-5)
    torch.testing.assert_close(policy.flat.grads, expected[1], rtol=1e-3, atol=1e-6)
    largest = [max(needed for needed, _ in made[: at + 1]) for at in range(len(made))]
    assert [held for _, held in made] == largest and len(made) >= 3
    policy.rest()
    assert policy.workspace.memory is None


@pytest.mark.parametrize("rule", mostly_later(["single", "8 bit", "split"], "split"))
def test_a_checkpoint_is_the_same_in_any_phase(rule, tmp_path):
    flags = [*RULES[rule], "--offload", "optimizer"]
    trainer, *_ = trained(tmp_path, *flags, count=2)
    names = trainer.learner.state_names()
    trainer.save()
    awake = load_file(trainer.last_checkpoint / "optim-rank0.safetensors")
    trainer.evaluate()
    assert held(trainer.learner.policy)["optimizer"] < 10_000
    trainer.save()
    asleep = load_file(trainer.last_checkpoint / "optim-rank0.safetensors")
    assert (
        list(asleep) == list(awake) and set(names) == set(awake) and held(trainer.learner.policy)["optimizer"] < 10_000
    )
    assert all(torch.equal(asleep[name], awake[name]) for name in awake)
    other = make_trainer(tmp_path / "other", *SMALL, "--dtype", "bfloat16", *flags)
    other.learner.policy.rest()
    with checkpoint.generators_kept():
        other.load_state_dict(*checkpoint.load(trainer.last_checkpoint))
    one, two = trainer.step(), other.step()
    assert one["grad_norm"] == two["grad_norm"] > 0
    for name, tensor in trainer.learner.state_tensors():
        assert torch.equal(tensor, dict(other.learner.state_tensors())[name]), name
    assert torch.equal(trainer.learner.policy.flat.weights, other.learner.policy.flat.weights)


def test_a_reference_on_the_host_is_on_the_device_while_it_scores(tmp_path):
    """A CPU has no other memory to bring them to, so what shows is that the buffer the model reads is empty between."""
    here, expected, _ = trained(tmp_path / "here", "--kl", "0.05")
    away, *_ = trained(tmp_path / "away", "--kl", "0.05", "--reference-on-host", count=0)
    sizes, read = [], away.learner.reference.model.base_model.register_forward_hook
    read(lambda *_: sizes.append(away.learner.reference.weights.untyped_storage().nbytes()))
    assert all(p.untyped_storage().nbytes() == 0 for p in away.learner.reference.model.parameters())
    actual = [without_times(away.step()) for _ in range(3)]
    assert json.dumps(actual) == json.dumps(expected) and expected[-1]["kl"] > 0
    assert len(sizes) >= 3 and set(sizes) == {2 * away.learner.reference.weights.numel()}
    assert all(p.untyped_storage().nbytes() == 0 for p in away.learner.reference.model.parameters())
    assert here.learner.reference.model.base_model.norm.weight.untyped_storage().nbytes() > 0


def test_tensors_that_share_a_storage_move_once_and_small_ones_stay():
    both, small, foreign = torch.arange(4000.0), torch.ones(3), torch.from_numpy(numpy.ones(5000))
    first, second = both[:2000], both[2000:].view(50, 40)
    host = HostCopies()
    for tensor in (first, second, small, foreign):
        host.put(tensor)
    assert both.untyped_storage().nbytes() == 0 and small.sum() == 3 and foreign.sum() == 5000
    assert torch.equal(host.read(second), torch.arange(2000.0, 4000.0).view(50, 40))
    assert host.read(small) is small
    buffer = next(iter(host.away.values()))[1]
    host.back()
    assert torch.equal(both, torch.arange(4000.0)) and not host.away
    host.put(both)
    assert next(iter(host.away.values()))[1] is buffer  # it is pinned on CUDA, which takes long
