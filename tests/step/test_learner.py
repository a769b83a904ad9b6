"""The training step: gradients do not depend on how a batch is cut, padded or spread over ranks."""

from dataclasses import replace

import pytest
import torch

from fastrl.kernels.apo_loss import apo_loss
from fastrl.objectives import apo
from fastrl.step.batching import make_batch, minibatches, select
from fastrl.step.learner import Minibatch
from support.batches import padded, prepared_batch
from support.programs import together
from support.trainers import make_trainer

OBJECTIVES = {
    "token": [],
    "seq": ["--loss-agg", "seq", "--clip-high", "0.28"],
    "const": ["--loss-agg", "const", "--adv-norm", "none"],
    "kl": ["--kl", "0.05", "--kl-type", "k3+", "--entropy", "0.01", "--overlong", "mask"],
    "reward_kl": ["--kl", "0.05", "--kl-in", "reward", "--drop-zero-std"],
    "ppo": ["--objective", "ppo", "--kl", "0.05", "--gamma", "0.9", "--lam", "0.8", "--entropy", "0.01"],
}


def gradient(trainer, batch, tokens: int) -> tuple[torch.Tensor, dict[str, float]]:
    trainer.learner.fitting.tokens = tokens
    metrics = trainer.learner.accumulate(Minibatch(batch))
    return trainer.learner.policy.flat.grads.clone(), metrics


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("settings", OBJECTIVES.values(), ids=OBJECTIVES)
def test_gradient_does_not_depend_on_cut_or_padding(settings, packs, tmp_path, float64_norms):
    trainer = make_trainer(tmp_path, "--dtype", "float64", "--problems-per-step", 6, "--group-size", 4, *settings)
    assert trainer.learner.policy.packs
    batch = prepared_batch(trainer)
    assert len(batch.lengths().unique()) > 3  # rows of different length, or cutting would not change the padding
    expected, metrics = gradient(trainer, batch, tokens=10**6)
    trainer.learner.policy.packs = packs
    assert expected.abs().max() > 1e-4

    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    variants = {
        "one row each": (batch, 1),
        "a few rows": (batch, 75),
        "other order": (select(batch, order), 60),
        "poisoned padding": (padded(batch, 9), 10**6),
        "poisoned padding, cut": (padded(batch, 3), 90),
    }
    for name, (variant, tokens) in variants.items():
        actual, got = gradient(trainer, variant, tokens)
        assert (actual - expected).abs().max() <= 1e-12, name
        assert got.keys() == metrics.keys()
        for key in metrics:
            assert got[key] == pytest.approx(metrics[key], abs=1e-12), (name, key)


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
def test_first_pass_leaves_old_logprobs_and_later_ones_keep_them(packs, tmp_path, float64_norms):
    """What the policy thought before the step: of every row, those that only went forward too, in their own order."""
    trainer = make_trainer(tmp_path, "--tokens-per-microbatch", "300", "--problems-per-step", "12")
    trainer.learner.policy.packs &= packs
    groups = trainer.rollout.run(trainer.allocator.take(trainer.completions_per_step), step=0)
    batch = make_batch(
        groups, trainer.learner.objective.credit, pad_id=trainer.learner.policy.pad_id, max_new_tokens=10
    )
    silent = trainer.learner.objective.silent(batch)
    assert silent.any() and not silent.all()
    with torch.no_grad():
        whole = trainer.learner.policy.score(batch)
    expected = torch.where(batch.response_mask, whole, 0.0).float()
    minibatch = Minibatch(batch)
    trainer.learner.accumulate(minibatch)
    torch.testing.assert_close(minibatch.batch.old_logprobs, expected, rtol=0, atol=2e-6)
    trainer.learner.policy.master.mul_(1.01)
    trainer.learner.policy.publish()
    metrics = trainer.learner.accumulate(minibatch)
    torch.testing.assert_close(minibatch.batch.old_logprobs, expected, rtol=0, atol=2e-6)
    assert batch.old_logprobs is None
    assert abs(metrics["policy_kl"]) > 1e-6, "the second pass sees the ratio to the weights of the first"


def test_minibatches_sum_to_the_whole(tmp_path, float64_norms):
    # token mean: whole gradient = sum over minibatches of (tokens_m / tokens) gradient_m
    trainer = make_trainer(tmp_path, "--dtype", "float64", "--problems-per-step", 6, "--group-size", 4)
    batch = prepared_batch(trainer)
    whole, _ = gradient(trainer, batch, 10**6)
    parts = minibatches(batch, 3)
    tokens = [part.response_mask.sum().item() for part in parts]
    total = sum(gradient(trainer, part, 64)[0] * n / sum(tokens) for part, n in zip(parts, tokens, strict=True))
    assert (total - whole).abs().max() <= 1e-12


FUSED = {name: OBJECTIVES[name] for name in ("token", "seq", "const", "kl", "reward_kl", "ppo")} | {
    "cispo": ["--surrogate", "cispo"], "k1": ["--kl", "0.05", "--kl-type", "k1"],
    "tis": ["--is-correction", "tis", "--is-cap", "1.1"],
}  # fmt: skip


@pytest.mark.parametrize("settings", FUSED.values(), ids=FUSED)
def test_kernels_learn_what_the_objective_says(settings, tmp_path, monkeypatch):
    """The head and the loss in one pass of kernels, against `loss_sum` and autograd: gradient, metrics, log-probs."""
    trainer = make_trainer(tmp_path, "--problems-per-step", 6, "--group-size", 4, *settings)
    batch = prepared_batch(trainer)
    noise = 0.2 * torch.randn(batch.old_logprobs.shape, generator=torch.Generator().manual_seed(2))
    batch = in_float32(replace(batch, old_logprobs=batch.old_logprobs + noise))
    expected, metrics = gradient(trainer, batch, 60)
    trainer.learner.policy.triton = True
    calls = []
    once = trainer.learner.policy.fused_loss
    monkeypatch.setattr(trainer.learner.policy, "fused_loss", lambda *args: calls.append(1) or once(*args))
    actual, got = gradient(trainer, batch, 60)
    assert len(calls) > 1 and expected.abs().max() > 1e-4
    assert (actual - expected).norm() < 1e-5 * expected.norm()
    assert got == pytest.approx(metrics, rel=1e-4, abs=1e-6) and metrics["clip_ratio/region_mean"] > 0
    if "old_logprobs" in trainer.learner.objective.needs(1):
        return
    minibatch = Minibatch(replace(batch, old_logprobs=None))
    trainer.learner.accumulate(minibatch)  # on-policy: it leaves what it saw
    seen = minibatch.batch.old_logprobs.float()
    torch.testing.assert_close(seen, trainer.learner.policy.score(batch).detach(), rtol=0, atol=1e-5)


def in_float32(batch):
    """The batch with all that it has been given in float64 as the program has it."""
    names = ("old_logprobs", "ref_logprobs", "values", "credit", "advantages", "returns", "reward", "rollout_logprobs")
    return replace(batch, **{name: x.float() for name in names if (x := getattr(batch, name)) is not None})


def test_the_kernel_of_the_regression_learns_what_its_definition_says(tmp_path, monkeypatch):
    """A*-PO as on a GPU: Triton's head, its own kernel for the loss and the gradient of the head with it."""
    flags = (
        "--objective",
        "apo",
        "--value-mode",
        "zero",
        "--group-size",
        2,
        "--beta2",
        0.3,
        "--objective.entropy",
        0.1,
    )
    trainer = make_trainer(tmp_path, "--problems-per-step", 6, *flags)
    batch = in_float32(prepared_batch(trainer, noise=0.3))
    expected, metrics = gradient(trainer, batch, 60)
    calls = []

    def by_kernel(*rows):
        calls.append(len(rows[0]))
        return apo_loss(*rows, triton=True)

    trainer.learner.policy.triton = True
    monkeypatch.setattr(apo, "apo_loss", by_kernel)
    actual, got = gradient(trainer, batch, 60)
    assert len(calls) > 1 and sum(calls) == len(batch) and expected.abs().max() > 1e-4
    assert (actual - expected).norm() < 1e-5 * expected.norm()
    assert got == pytest.approx(metrics, rel=1e-4, abs=1e-6) and metrics["apo/residual_abs"] > 0.1


def test_a_token_that_is_no_word_stops_the_fused_update_as_it_stops_the_other(tmp_path):
    """The kernel leaves such a token out of the loss: without a sign of it the step would be taken."""
    trainer = make_trainer(tmp_path, "--problems-per-step", 4, "--group-size", 4)
    trainer.learner.policy.triton = True
    batch = prepared_batch(trainer)
    batch = replace(batch, credit=batch.credit.float())
    trainer.learner.accumulate(Minibatch(batch))
    assert trainer.learner.policy.flat.grads.isfinite().all()
    row = (~trainer.learner.objective.silent(batch)).nonzero()[0, 0]
    last = batch.response_mask[row].nonzero()[-1, 0]
    trainer.learner.policy.num_tokens -= 1
    batch.input_ids[row, last] = trainer.learner.policy.num_tokens
    trainer.learner.accumulate(Minibatch(batch))
    assert not trainer.learner.policy.gradient(0.0).norm < float("inf")
    assert trainer.learner.policy.optimizer_step(0.0)["skipped"] == 1


def test_what_is_not_of_single_tokens_is_not_fused(tmp_path, monkeypatch):
    for number, settings in enumerate(
        (
            ["--ratio-level", "sequence"],
            ["--is-correction", "mis"],
            ["--is-correction", "tis", "--entropy", "0.01"],
            ["--objective", "rebel"],
        )
    ):
        trainer = make_trainer(tmp_path / str(number), "--problems-per-step", 4, "--group-size", 2, *settings)
        trainer.learner.policy.triton = True
        monkeypatch.setattr(trainer.learner.policy, "fused_loss", lambda *args: pytest.fail("it was fused"))
        assert trainer.step()["num_backward_passes"] == 1


@pytest.mark.parametrize("settings", [[], ["--entropy", "0.01"], ["--kl", "0.05"]], ids=["plain", "entropy", "kl"])
def test_rows_without_a_gradient_change_nothing_but_the_work(settings, tmp_path, float64_norms, monkeypatch):
    trainer = make_trainer(tmp_path, "--dtype", "float64", "--problems-per-step", 6, "--group-size", 4, *settings)
    batch = prepared_batch(trainer)
    batch.credit[batch.group < 3] = 0.0
    silent = trainer.learner.objective.silent(batch)
    assert silent.sum() == 0 if settings else silent.sum() >= 12
    learning = [learns for learns, *_ in trainer.learner.microbatches(batch)]
    assert learning == ([True] if settings else [True, False])
    actual, metrics = gradient(trainer, batch, 10**6)
    monkeypatch.setattr(
        type(trainer.learner.objective), "silent", lambda self, batch: torch.zeros_like(batch.truncated)
    )
    expected, whole = gradient(trainer, batch, 10**6)
    assert expected.abs().max() > 1e-4 and (actual - expected).abs().max() <= 1e-12
    assert metrics == pytest.approx(whole, abs=1e-12)


RANKS = """
import torch
from pathlib import Path
from support.trainers import make_trainer
from fastrl.base import ranks
SHARED = ("reward_", "rewards/", "frac", "completions")
ranks.start('cpu')
trainer = make_trainer(Path({folder!r}) / str(ranks.rank()), "--dtype", "float64", "--problems-per-step", 6,
                       "--group-size", 4, "--update.epochs-per-batch", 2, "--lr", 1e-3, *{settings!r})
history = [trainer.step() for _ in range(3)]
if ranks.rank() == 0:
    torch.save({{"weights": trainer.learner.policy.flat.weights,
                "critic": trainer.learner.critic.flat.weights if trainer.learner.critic else torch.zeros(0),
                "value_loss": [h.get("value_loss", 0.0) for h in history],
                "grad_norm": [h["grad_norm"] for h in history],
                "reward": [h["reward"] for h in history], "loss": [h["loss"] for h in history],
                "shared": [{{k: v for k, v in h.items() if k.startswith(SHARED)}} for h in history],
                "rollouts": trainer.num_rollouts, "tokens": trainer.num_tokens}}, {out!r})
ranks.barrier()
ranks.stop()
ranks.leave(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([], id="grpo", marks=pytest.mark.soak),
        pytest.param(["--objective", "ppo", "--critic.optim.lr", "1e-3"], id="ppo"),
    ],
)
def test_two_ranks_train_like_one(settings, tmp_path):
    """Three steps on 1 and on 2 processes (gloo): same rollouts, same gradients, same weights in float64."""
    results = []
    for world in (1, 2):
        out = tmp_path / f"{world}.pt"
        together(
            tmp_path, RANKS.format(folder=str(tmp_path / f"runs{world}"), out=str(out), settings=settings), count=world
        )
        results.append(torch.load(out, weights_only=True))
    one, two = results
    assert one["rollouts"] == two["rollouts"] == 72 and one["tokens"] == two["tokens"]
    assert one["reward"] == pytest.approx(two["reward"], abs=0)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-9)
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-9)
    for alone, shared in zip(one["shared"], two["shared"], strict=True):
        assert alone == pytest.approx(shared, nan_ok=True)
    assert one["value_loss"] == pytest.approx(two["value_loss"], abs=1e-9)
    for name in ("weights", "critic") if settings else ("weights",):
        n = min(len(one[name]), len(two[name]))  # two ranks may pad the buffer further
        assert n and (one[name][:n] - two[name][:n]).abs().max() <= 1e-9
        assert not two[name][n:].any()
