"""The critic: where its values stand, what it learns, what it leaves alone, and that a stopped run goes on with it."""

import hashlib
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fastrl import checkpoint
from fastrl.base.types import CheckpointError, NumericsError
from fastrl.models.critic import Critic, CriticConfig, explained_variance
from fastrl.models.loading import load_model
from fastrl.objectives.ppo import PPO
from fastrl.run.resume import resume
from fastrl.settings.parse import parse
from fastrl.settings.run import AXES, EMBEDDED_RECIPE, TrainConfig
from fastrl.step.batching import averages, cut, make_batch, select
from fastrl.step.learner import Minibatch
from fastrl.weights.optim import OptimConfig
from support.batches import completion, group, padded, prepared_batch
from support.run_folders import step_records
from support.trainers import make_trainer

PPO_ARGS = ["--objective", "ppo", "--problems-per-step", 6, "--group-size", 4, "--eval-limit", 4]
GROUPS = [
    group([1, 2, 3], completion([4, 5]), completion([6]), completion([7, 8, 9])),
    group([10], completion([11, 12]), completion([13, 14])),
]


def make_critic(dtype=torch.float64, random_head=True, **settings) -> Critic:
    config = CriticConfig(optim=OptimConfig(**{"lr": 1e-3, "weight_decay": 0.0} | settings))
    critic = Critic(load_model("embedded", dtype=dtype, device="cpu"), config)
    if random_head:
        with torch.no_grad():
            critic.model.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    return critic


def batch_of(groups):
    return make_batch(groups, lambda rewards, problem: rewards, pad_id=0, max_new_tokens=4)


def test_values_stand_at_the_token_they_come_before(float64_norms):
    critic = make_critic()
    batch = batch_of(GROUPS)
    values = critic.score(batch).detach()
    assert (values[batch.response_mask] != 0).all() and not values[~batch.response_mask].any()
    # row 2 is the prompt 1 2 3 and the tokens 7 8 9: its second value is read off after 1 2 3 7
    hidden = critic.model.base_model(torch.tensor([[1, 2, 3, 7]])).last_hidden_state[0, -1]
    head = critic.model.value_head
    assert values[2, 4].item() == pytest.approx((head.weight[0] @ hidden + head.bias[0]).item(), abs=1e-12)
    # another token in its place changes only later values
    batch.input_ids[2, 4] = 0
    changed = critic.score(batch).detach() != values
    assert changed.nonzero().tolist() == [[2, 5]]


def test_packed_equals_padded(float64_norms):
    critic, batch, results, seen = make_critic(), batch_of(GROUPS), [], []
    embeddings = critic.model.base_model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    assert critic.packs
    for critic.packs in (True, False):
        critic.zero_grad()
        values = critic.score(batch)
        (values * torch.linspace(-1, 2, values.numel(), dtype=values.dtype).view_as(values)).sum().backward()
        results.append((values.detach(), critic.flat.grads.clone()))
    assert seen == [9, 5 * 5]  # each prompt once and no padding; five rows of five tokens
    for packed, plain in zip(*results, strict=True):
        assert packed.abs().max() > 0.1 and (packed - plain).abs().max() <= 1e-12


def test_it_starts_at_zero_and_trains_all_but_the_lm_head():
    critic = make_critic(random_head=False)
    assert not critic.score(batch_of(GROUPS)).any()
    named = dict(critic.model.named_parameters())
    assert all(critic.flat.owns(p) for p in named.values())
    backbone = sum(p.numel() for p in load_model("embedded", dtype=torch.float64, device="cpu").model.parameters())
    hidden = critic.model.value_head.weight.shape[1]
    assert sum(p.numel() for p in named.values()) == backbone + hidden + 1  # the LM head is the embedding


def test_it_learns_the_mean_return_of_each_prompt():
    # one token each: 1, 0, 0, 0 after one prompt, 1, 1 after the other; V = 1/4 and 1 are exact for squared error,
    # and leave (9/16 + 3/16) / 2 = 3/8 over 6 tokens
    critic = make_critic(torch.float32, random_head=False, lr=3e-3)
    groups = [group([1, 2], *(completion([t]) for t in (3, 4, 5, 6))), group([7], completion([3]), completion([4]))]
    batch = batch_of(groups)
    batch = replace(batch, credit=torch.tensor([1.0, 0, 0, 0, 1, 1]))
    objective = PPO(value_clip=None)
    batch = replace(batch, values=critic.score(batch).detach())
    batch = objective.prepare(batch)

    def accumulate():
        return averages(critic.backward([batch], objective.value_loss_sum, 6.0), 6.0)

    first = critic.fit([accumulate])
    assert first["value_loss"] == pytest.approx(3 / 2 / 6)  # values 0, three returns of 1
    for n in range(60):
        critic.set_lr(3e-3 * (1 - n / 60))
        metrics = critic.fit([accumulate])
    assert metrics["value_loss"] == pytest.approx(3 / 8 / 6, abs=1e-5)
    assert critic.score(batch)[batch.response_mask].tolist() == pytest.approx([0.25] * 4 + [1.0] * 2, abs=1e-2)


def test_gradient_does_not_depend_on_cut_or_padding(tmp_path, float64_norms):
    trainer = make_trainer(tmp_path, "--dtype", "float64", *PPO_ARGS, "--value-clip", "0.02")
    critic, batch = trainer.learner.critic, prepared_batch(trainer)
    tokens = batch.response_mask.sum().item()

    def gradient(variant, size):
        pieces = [part for _, part in cut(variant, size, packed=critic.packs)]
        metrics = averages(critic.backward(pieces, trainer.learner.objective.value_loss_sum, tokens), tokens)
        return critic.flat.grads.clone(), metrics, len(pieces)

    expected, metrics, _ = gradient(batch, 10**6)
    assert expected.abs().max() > 1e-3 and 0 < metrics["clip_ratio"] < 1
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    variants = {
        "one row each": (batch, 1, 24),
        "a few rows, other order": (select(batch, order), 60, 3),
        "poisoned padding": (padded(batch, 9), 10**6, 1),
        "poisoned padding, cut": (padded(batch, 3), 90, 2),
    }
    for packs in (True, False):
        critic.packs = packs
        for name, (variant, size, at_least) in variants.items():
            actual, got, count = gradient(variant, size)
            assert count >= at_least and (actual - expected).abs().max() <= 1e-12, name
            assert got == pytest.approx(metrics, abs=1e-12), name


@pytest.mark.parametrize("rule, backward_passes", [("single", 2), ("sfpo", 8), ("gxpo", 6)])
def test_it_is_trained_once_per_step_under_every_update_rule(rule, backward_passes, tmp_path):
    args = [
        "--update",
        rule,
        "--minibatches",
        2,
        "--critic.passes",
        3,
        "--critic.optim.lr",
        0.002,
        "--critic.optim.warmup",
        1,
    ]
    trainer = make_trainer(tmp_path, *PPO_ARGS, *args)
    metrics = [trainer.step()]
    assert trainer.learner.critic.lr == 0.001  # its own warm-up of one step
    metrics.append(trainer.step())
    assert trainer.learner.critic.lr == 0.002
    assert trainer.learner.critic.policy_version == 2 * 2 * 3  # steps, minibatches, passes
    assert metrics[1]["num_backward_passes"] == 2 * backward_passes  # the policy's alone
    assert metrics[0]["value_loss"] > 0 and metrics[0]["critic/grad_norm"] > 0 and metrics[0]["critic/skipped"] == 0
    assert metrics[0]["critic/explained_variance"] == 0.0  # all values 0: no worse and no better than a constant
    assert metrics[1]["critic/explained_variance"] != 0.0


def test_its_loss_is_the_mean_over_response_tokens(tmp_path, float64_norms):
    trainer = make_trainer(tmp_path, "--dtype", "float64", *PPO_ARGS, "--value-clip", "None")
    batch = prepared_batch(trainer)
    error = (trainer.learner.critic.score(batch).detach() - batch.returns)[batch.response_mask]
    trainer.learner.fitting.tokens = 60
    assert trainer.learner.fit_critic(batch)["value_loss"] == pytest.approx(error.square().mean().item() / 2, abs=1e-12)


def test_policy_and_critic_share_nothing(tmp_path):
    trainer = make_trainer(tmp_path, *PPO_ARGS)
    batch = prepared_batch(trainer)
    weights, critic = trainer.learner.policy.flat.weights.clone(), trainer.learner.critic.flat.weights.clone()
    trainer.learner.fit_critic(batch)
    assert torch.equal(trainer.learner.policy.flat.weights, weights) and not torch.equal(
        trainer.learner.critic.flat.weights, critic
    )
    critic = trainer.learner.critic.flat.weights.clone()
    trainer.learner.accumulate(Minibatch(batch))
    trainer.learner.policy.optimizer_step(0.0)
    assert torch.equal(trainer.learner.critic.flat.weights, critic) and not torch.equal(
        trainer.learner.policy.flat.weights, weights
    )


def test_a_broken_target_reaches_neither_weights_nor_moments(tmp_path):
    trainer = make_trainer(tmp_path, *PPO_ARGS)
    batch = prepared_batch(trainer)
    trainer.learner.fit_critic(batch)
    before = {name: tensor.clone() for name, tensor in trainer.learner.critic.state_tensors()}
    batch.returns[batch.response_mask] = math.nan
    assert trainer.learner.fit_critic(batch)["critic/skipped"] == 1.0
    assert trainer.learner.critic.guard.end_step(1) == ["loss is nan"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.learner.critic.state_tensors())
    for step in (2, 3):
        trainer.learner.fit_critic(batch)
        trainer.learner.critic.guard.end_step(step)
    with pytest.raises(NumericsError, match="3 steps in a row were refused.*loss is nan.*lower --critic.optim.lr"):
        trainer.learner.critic.guard.give_up()
    assert trainer.learner.policy.guard.skipped == 0


def test_explained_variance_by_hand():
    batch = batch_of([group([1], completion([2, 3]), completion([4]))])
    batch = replace(batch, returns=torch.tensor([[math.nan, 1.0, 1.0], [math.nan, 0.0, math.nan]]))
    # returns 1 1 0: mean square 2/3 - 4/9 = 2/9; errors 0 1/2 0: 1/12 - 1/36 = 1/18, a quarter of it
    batch = replace(batch, values=torch.tensor([[math.nan, 1.0, 0.5], [math.nan, 0.0, math.nan]]))
    assert explained_variance(batch) == pytest.approx(0.75)
    for value in (0.1, 0.3, 0.7, 1.0):  # 0.3: the mean square less the squared mean is 2e-16, not 0
        batch = replace(batch, returns=torch.full_like(batch.returns, value, dtype=torch.float64))
        assert math.isnan(explained_variance(batch))


def run(folder, *args, restart=False) -> None:
    args = [*PPO_ARGS, "--minibatches", 2, "--kl", "0.01", "--save-every", 4, "--keep", 9, "--rollouts-every", 1, *args]
    trainer = make_trainer(folder, *args)
    with checkpoint.generators_kept():
        checkpoint.seed_generators(0)
        if restart:
            config = parse(TrainConfig, [str(EMBEDDED_RECIPE), "--out", str(folder), *map(str, args)], AXES)
            resume(trainer, "auto", config)
        trainer.run()
    trainer.rollout.rewards.close()


def optimizer_state(folder, step) -> str:
    return hashlib.sha256((folder / f"checkpoints/step-{step}/optim-rank0.safetensors").read_bytes()).hexdigest()


def test_a_run_cut_in_two_equals_one_that_was_not(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(tmp_path / "straight", "--steps", 8)
    run(tmp_path / "cut", "--steps", 4)
    run(tmp_path / "cut", "--steps", 8, restart=True)
    torch.set_num_threads(threads)
    straight, cut_in_two = step_records(tmp_path / "straight"), step_records(tmp_path / "cut")
    assert len(straight) == 8 and straight == cut_in_two
    assert optimizer_state(tmp_path / "straight", 8) == optimizer_state(tmp_path / "cut", 8)
    early, late = (load_file(tmp_path / f"cut/checkpoints/step-{n}/optim-rank0.safetensors") for n in (4, 8))
    names = {"critic.master", "critic.optimizer.exp_avg", "critic.optimizer.exp_avg_sq", "critic.optimizer.step"}
    assert names <= early.keys() and not any(torch.equal(early[name], late[name]) for name in names)


def test_the_guard_of_the_critic_is_restored(tmp_path):
    one, other = (make_trainer(tmp_path / name, *PPO_ARGS) for name in ("one", "other"))
    one.learner.critic.guard.skipped = one.learner.critic.guard.in_a_row = 2
    tensors = dict(one.learner.state_tensors())
    other.load_state_dict(one.state_dict(), tensors)
    assert other.learner.critic.guard == one.learner.critic.guard
    for lacking, name in (({"critic_guard"}, "critic_guard"), ({"critic.master"}, "critic.master")):
        state = {k: v for k, v in one.state_dict().items() if k not in lacking}
        with pytest.raises(CheckpointError, match=f"the checkpoint has no {name}"):
            other.load_state_dict(state, {k: v for k, v in tensors.items() if k not in lacking})


def test_its_settings_leave_short_names_to_the_policy(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[optim]\nlr = 0.002\n[critic]\npasses = 2\n[critic.optim]\nlr = 0.003\nwarmup = 7\n")
    config = parse(TrainConfig, [str(recipe), "--warmup", "5", "--critic.optim.max-grad-norm", "0.5"], AXES)
    assert (config.optim.lr, config.optim.warmup, config.optim.max_grad_norm) == (0.002, 5, 1.0)
    own = config.critic.optim
    assert (config.critic.passes, own.lr, own.warmup, own.max_grad_norm) == (2, 0.003, 7, 0.5)
    with pytest.raises(ValueError, match="--critic.passes must be at least 1, got 0"):
        parse(TrainConfig, ["--critic.passes", "0"], AXES)
    with pytest.raises(ValueError, match=r"did you mean --optim.lr\?"):
        parse(TrainConfig, ["--lrr", "1"], AXES)
    recipe.write_text("[critic.optim]\nrl = 1\n")
    with pytest.raises(ValueError, match="there is no key 'critic.optim.rl'; did you mean lr"):
        parse(TrainConfig, [str(recipe)], AXES)
