"""SFPO against its equations on quadratics, and inside the trainer: what the optimizer sees, when it stops."""

import math

import pytest
import torch

from fastrl.updates.sfpo import SFPO
from support.arguments import SMALL_STEPS
from support.cases import mostly_later
from support.toys import F64, FLAT_SIGNAL, Descent, quadratic
from support.trainers import make_trainer, weights_and_state


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("K", [1, 3, 7])
def test_equation_12_and_the_contraction_of_eigenvectors(K, alpha):
    H, b, theta = quadratic()
    lam, Q = torch.linalg.eigh(H)
    lr, best = 0.9 / lam.max().item(), torch.linalg.solve(H, b)
    policy = Descent(theta, lambda x: H @ x - b, lr)
    metrics = SFPO(lookahead=K, alpha=alpha).update(policy, [policy.accumulate])
    *fast, slow = policy.seen
    assert len(fast) == (K if alpha else 0) == metrics["num_backward_passes"] - 1
    # theta' = theta_0 - lr (alpha sum of the fast gradients + the slow one)
    twelve = theta - lr * (alpha * sum(fast, torch.zeros_like(theta)) + slow)
    assert (policy.master - twelve).abs().max() < 5e-15
    # e' = (1 - lr lam) (1 - alpha (1 - (1 - lr lam)^K)) e along each eigenvector
    factor = (1 - lr * lam) * (1 - alpha * (1 - (1 - lr * lam) ** K))
    closed = best + Q @ (factor * (Q.T @ (theta - best)))
    assert (policy.master - closed).abs().max() < 2e-13  # 3e-14 with three seeds and instruction sets


def test_fast_steps_go_over_all_minibatches_before_the_pull_back():
    # f1 = x, f2 = 3 x per minibatch, lr 0.1: a pass is x -> 0.9 x -> 0.63 x
    policy = Descent(torch.tensor([1.0], dtype=F64), lambda x: x, lr=0.1)
    scales = iter([1.0, 3.0] * 3)
    policy.gradient_of = lambda x: next(scales) * x
    SFPO(lookahead=2, alpha=0.5).update(policy, [policy.accumulate, policy.accumulate])
    # two passes 1 -> 0.63 -> 0.3969, halfway back 0.69845, one more pass
    assert policy.master.item() == pytest.approx(0.69845 * 0.63)


@pytest.mark.parametrize("opt_state, steps, moment", [("keep", 4, 1.0), ("restore", 1, 1.0), ("scale", 4, 0.8)])
def test_what_becomes_of_the_optimizer_state(opt_state, steps, moment):
    policy = Descent(torch.ones(3, dtype=F64), lambda x: x, lr=0.1)
    SFPO(opt_state=opt_state).update(policy, [policy.accumulate])
    assert policy.state["step"] == steps and policy.first_moment == pytest.approx(moment)


def test_gate_trips_upward_for_good_and_saves_the_passes():
    def run(gate, entropies):
        policy = Descent(torch.ones(1, dtype=F64), lambda x: 0 * x + 1, lr=0.0)
        rule, passes = SFPO(gate=gate), []
        for entropy in entropies:
            policy.accumulate = lambda value=entropy: Descent.accumulate(policy) | {"entropy": value}
            expected = rule.backward_passes
            passes.append(rule.update(policy, [policy.accumulate])["num_backward_passes"])
            assert passes[-1] == expected
        return passes

    up, down = [*FLAT_SIGNAL, 9.0, 2.0, 2.0], [*FLAT_SIGNAL, -9.0, 2.0, 2.0]
    assert run("paper", up) == run("paper", down) == [4] * 31 + [1] * 2
    assert run("code", up) == [4] * 31 + [1] * 2
    assert run("code", down) == [4] * 33
    assert run("off", up) == [4] * 33


def test_alpha_may_fall_slowly_after_the_gate():
    rule = SFPO(alpha=0.8, decay_steps=3, gate="paper", gate_window=2)
    rule.after(1.0), rule.after(3.0)
    assert rule.alpha_now == 0.8
    rule.after(50.0)
    seen = []
    for _ in range(5):
        seen.append(rule.alpha_now)
        rule.after(2.0)
    assert seen == pytest.approx([0.6, 0.4, 0.2, 0.0, 0.0])


BAD = [
    (dict(lookahead=0), "--update.lookahead must be at least 1, got 0"),
    (dict(alpha=1.2), "--update.alpha must be at most 1, got 1.2"),
    (dict(gate_window=1), "--update.gate-window must be at least 2"),
    (dict(gate_threshold=0.0), "--update.gate-threshold must be above 0, got 0.0"),
]


@pytest.mark.parametrize("options, text", BAD, ids=[str(o) for o, _ in BAD])
def test_bad_settings(options, text):
    with pytest.raises(ValueError, match=text):
        SFPO(**options)


def test_alpha_zero_is_the_single_rule_bit_for_bit(tmp_path):
    single = make_trainer(tmp_path, *SMALL_STEPS)
    sfpo = make_trainer(tmp_path, *SMALL_STEPS, "--update", "sfpo", "--alpha", 0)
    for _ in range(3):
        one, other = single.step(), sfpo.step()
        assert other["num_backward_passes"] == one["num_backward_passes"]
        assert other["loss"] == one["loss"] and other["grad_norm"] == one["grad_norm"]
    for a, b in zip(weights_and_state(single), weights_and_state(sfpo), strict=True):
        assert torch.equal(a, b)


def test_alpha_one_is_more_passes_over_the_batch(tmp_path):
    single = make_trainer(tmp_path, *SMALL_STEPS, "--minibatches", 2, "--epochs-per-batch", 4)
    sfpo = make_trainer(tmp_path, *SMALL_STEPS, "--minibatches", 2, "--update", "sfpo", "--alpha", 1, "--lookahead", 3)
    for _ in range(2):
        assert single.step()["num_backward_passes"] == sfpo.step()["num_backward_passes"]
    for a, b in zip(weights_and_state(single), weights_and_state(sfpo), strict=True):
        assert torch.equal(a, b)
    assert sfpo.learner.policy.optimizer.state[sfpo.learner.policy.master]["step"] == 2 * 2 * 4


@pytest.mark.parametrize("opt_state, steps", [("keep", 4), ("restore", 1)])
def test_adam_counts_its_steps(opt_state, steps, tmp_path):
    trainer = make_trainer(tmp_path, *SMALL_STEPS, "--update", "sfpo", "--opt-state", opt_state)
    for step in (1, 2):
        trainer.step()
        assert trainer.learner.policy.optimizer.state[trainer.learner.policy.master]["step"] == step * steps
        assert trainer.learner.policy.lr == pytest.approx(1e-4 * step / 6)  # the schedule counts steps, not passes


def test_the_slow_pass_takes_its_gradient_where_the_pull_back_ends(tmp_path):
    """In bfloat16 the weights are a copy of the master, so a move that is not published would not be seen."""
    flags = ["--dtype", "bfloat16", "--lr", 1e-3, "--warmup", 0]
    trainer = make_trainer(tmp_path, *SMALL_STEPS, "--update", "sfpo", *flags)
    seen, accumulate = [], trainer.learner.accumulate
    trainer.learner.accumulate = lambda part: (
        seen.append(trainer.learner.policy.flat.weights.clone()) or accumulate(part)
    )
    masters = []
    publish = trainer.learner.policy.publish
    trainer.learner.policy.publish = lambda **how: (
        masters.append(trainer.learner.policy.master.clone()) or publish(**how)
    )
    trainer.step()
    # anchor, 3 fast steps, pull back, slow step
    assert len(seen) == 4 and len(masters) == 5
    assert torch.equal(seen[3], masters[3].bfloat16())
    assert torch.allclose(masters[3] - seen[0], 0.8 * (masters[2] - seen[0]), atol=1e-6)


@pytest.mark.parametrize("opt_state", mostly_later(["keep", "restore", "scale"], "restore"))
@pytest.mark.parametrize("broken, skipped", [((3,), 1), ((0, 1, 2, 3), 4), ((1,), 1)])
def test_a_refused_pass_leaves_the_update_whole(broken, skipped, opt_state, tmp_path):
    """The slow one: back to the anchor. All: nothing has happened. A fast one: as if there had been one fewer."""
    trainer = make_trainer(tmp_path, *SMALL_STEPS, "--update", "sfpo", "--lookahead", 3, "--opt-state", opt_state)
    policy = trainer.learner.policy
    trainer.step()  # so that there is state
    before = [tensor.clone() for tensor in weights_and_state(trainer)]
    gradient = torch.randn(len(policy.master), generator=torch.Generator().manual_seed(1)) * 1e-4
    calls = []

    def accumulate():
        policy.flat.grads.copy_(gradient)
        if len(calls) in broken:
            policy.flat.grads[7] = math.nan
        calls.append(1)
        return {"loss": 0.0, "entropy": 1.0}

    metrics = trainer.learner.update.update(policy, [accumulate])
    assert len(calls) == 4 and metrics["skipped"] == skipped
    now = weights_and_state(trainer)
    same = [torch.equal(a, b) for a, b in zip(before, now, strict=True)]
    assert all(tensor.isfinite().all() for tensor in now)
    if broken == (1,):
        assert not any(same)
    else:
        assert same[0] and (all(same) or (opt_state != "restore" and broken == (3,)))
