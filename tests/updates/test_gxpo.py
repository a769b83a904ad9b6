"""GXPO against SFPO and gradient descent on quadratics, its ratios, its gate, and what it leaves of the optimizer."""

import math

import pytest
import torch

from fastrl.updates.gxpo import GXPO
from fastrl.updates.sfpo import SFPO
from fastrl.weights.shard import Gradient, segments
from support.arguments import SMALL_STEPS
from support.cases import mostly_later
from support.toys import F64, Descent, quadratic
from support.trainers import make_trainer, weights_and_state

# no guards: every coordinate is extrapolated by what its gradients say
BARE = dict(ratio="coord_grad", ratio_min=-1e9, ratio_max=1e9, scale_max=1e9, active_threshold=0.0, gate="off")


def diagonal(n=1000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=generator, dtype=F64) * 0.95 + 0.02, torch.randn(n, generator=generator, dtype=F64)


def moved(rule, theta, gradient_of, lr=1.0):
    policy = Descent(theta, gradient_of, lr)
    metrics = rule.update(policy, [policy.accumulate])
    return policy, metrics


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("K", [3, 5, 10])
def test_on_a_diagonal_quadratic_it_is_sfpo_in_three_passes(K, alpha):
    h, theta = diagonal()
    gxpo, metrics = moved(GXPO(lookahead=K, alpha=alpha, **BARE), theta, lambda x: h * x)
    sfpo, _ = moved(SFPO(lookahead=K, alpha=alpha), theta, lambda x: h * x)
    assert (gxpo.master - sfpo.master).abs().max() < 5e-15
    assert metrics["num_backward_passes"] == 3 and len(sfpo.seen) == K + 1
    assert metrics["update/ratio"] == pytest.approx((1 - h).mean().item())  # r = 1 - lr h
    if alpha == 1.0:
        assert (gxpo.master - theta * (1 - h) ** (K + 1)).abs().max() < 5e-15  # K + 1 steps of gradient descent


def error_of_theta_K(lr, rule):
    """Distance between where the extrapolation leads on a dense quadratic and where K steps would."""
    H, b, theta = quadratic()
    policy, _ = moved(rule, theta, lambda x: H @ x - b, lr)
    walk = theta.clone()
    for _ in range(rule.lookahead):
        walk -= lr * (H @ walk - b)
    reached = policy.master + lr * policy.seen[-1]  # before the corrective step
    return (reached - walk).norm().item()


def test_the_error_on_a_dense_quadratic_is_of_third_order():
    rule = GXPO(lookahead=5, alpha=1.0, **BARE)
    errors = [error_of_theta_K(lr, rule) for lr in (1e-2, 1e-3, 1e-4)]
    slopes = [math.log10(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert min(slopes) > 2.7
    # K / 2 times two steps, without looking at the ratios, is of second order
    fixed = GXPO(lookahead=5, alpha=1.0, **BARE | dict(ratio_min=1.0, ratio_max=1.0 + 1e-12))
    errors = [error_of_theta_K(lr, fixed) for lr in (1e-2, 1e-3, 1e-4)]
    assert all(1.8 < math.log10(a / b) < 2.2 for a, b in zip(errors, errors[1:], strict=False))


def test_one_ratio_per_tensor_is_exact_where_curvature_is_equal():
    _, theta = diagonal()
    options = BARE | dict(ratio="tensor")
    policy, metrics = moved(GXPO(lookahead=5, alpha=1.0, **options), theta, lambda x: 0.3 * x)
    assert (policy.master - theta * 0.7**6).abs().max() < 5e-15
    assert metrics["update/ratio"] == pytest.approx(0.7) and metrics["update/active_frac"] == 1.0
    # <g0, g1> / <g0, g0> of (1, 2) and (0.5, -1) is -1.5 / 5 = -0.3: 1 - 0.3 + 0.09 over 0.7; the floor of 1 wins not
    policy = Descent(torch.zeros(2, dtype=F64), None)
    gradients = iter([[1.0, 2.0], [0.5, -1.0], [0.0, 1.0]])
    policy.gradient_of = lambda x: torch.tensor(next(gradients), dtype=F64)
    GXPO(lookahead=3, alpha=1.0, **options).update(policy, [policy.accumulate])
    scale = 0.79 / 0.7
    assert policy.master.tolist() == pytest.approx([-1.5 * scale, -1.0 * scale - 1.0])


def test_adamw_directions_are_the_default_and_see_through_the_moments(tmp_path):
    """A second gradient four times the first says r = 4, clipped to 3; AdamW hardly changes its direction."""
    stretch = {}
    for ratio in ("coord_grad", "coord_adamw"):
        trainer = make_trainer(tmp_path / ratio, *SMALL_STEPS, "--update", "gxpo", "--ratio", ratio, "--lookahead", 10)
        policy = trainer.learner.policy
        gradient = torch.randn(len(policy.master), generator=torch.Generator().manual_seed(0)) * 1e-4
        factors = iter([1.0] * 50 + [1.0, 4.0, 1.0])

        def accumulate(policy=policy, gradient=gradient, factors=factors):
            policy.flat.grads.copy_(gradient * next(factors))
            return {"loss": 0.0, "entropy": 1.0}

        policy.set_lr(1e-5)
        for _ in range(50):  # settled moments
            accumulate()
            policy.optimizer_step(0.0)
        stretch[ratio] = trainer.learner.update.update(policy, [accumulate])
    assert stretch["coord_grad"]["update/ratio"] == pytest.approx(3.0)
    assert stretch["coord_grad"]["update/multiplier"] == pytest.approx(0.5 * 6.0, rel=0.01)
    # m^ 0.1 * 3 above, v^ 0.001 * 15 above the settled: 1.3 / sqrt(1.015) at 50 steps of history, about 1.17
    assert 0.9 < stretch["coord_adamw"]["update/ratio"] < 1.3
    assert stretch["coord_adamw"]["update/ratio_clipped_frac"] < 0.01


def test_clipped_probes_are_compared_as_they_were_applied(tmp_path):
    """g0 is clipped from a norm of 10 to 1, g1 = g0 / 20 is not: what was applied fell by half."""
    trainer = make_trainer(tmp_path, *SMALL_STEPS, "--update", "gxpo", "--ratio", "coord_grad", "--active-threshold", 0)
    policy = trainer.learner.policy
    direction = torch.ones(len(policy.master))
    direction /= direction.norm()
    norms = iter([10.0, 0.5, 0.5])

    def accumulate():
        policy.flat.grads.copy_(direction * next(norms))
        return {"loss": 0.0, "entropy": 1.0}

    metrics = trainer.learner.update.update(policy, [accumulate])
    assert metrics["update/ratio"] == pytest.approx(0.5, rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(0.5)


@pytest.mark.parametrize("opt_state, steps", [("restore", 1), ("keep", 3)])
def test_the_optimizer_after_a_step(opt_state, steps, tmp_path):
    """restore: moments and count are those of a run that saw the corrective gradients alone."""
    trainer = make_trainer(tmp_path, *SMALL_STEPS, "--update", "gxpo", "--opt-state", opt_state)
    policy = trainer.learner.policy
    seen = []
    apply = policy.apply
    policy.apply = lambda gradient: seen.append(gradient.shard.clone()) or apply(gradient)
    for step in (1, 2):
        trainer.step()
        assert policy.optimizer.state[policy.master]["step"] == step * steps
    alone = torch.nn.Parameter(torch.zeros_like(policy.master))
    optimizer = torch.optim.AdamW([alone], lr=1e-4, betas=(0.9, 0.95), fused=True)
    for gradient in seen[2::3] if opt_state == "restore" else seen:
        alone.grad = gradient * min(1.0, 1.0 / gradient.norm())
        optimizer.step()
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.allclose(optimizer.state[alone][name], policy.optimizer.state[policy.master][name], rtol=1e-5)


@pytest.mark.parametrize("opt_state", mostly_later(["restore", "keep"], "restore"))
@pytest.mark.parametrize("value", mostly_later([math.nan, math.inf, 0.0], math.nan))
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_broken_gradient_ends_in_a_plain_step_or_none(broken, value, opt_state, tmp_path):
    """First: nothing moves. Second: the first has been a plain step. Third: a plain one is taken from the anchor."""
    plain = make_trainer(tmp_path / "a", *SMALL_STEPS)
    gxpo = make_trainer(tmp_path / "b", *SMALL_STEPS, "--update", "gxpo", "--opt-state", opt_state)
    for trainer in (plain, gxpo):
        trainer.step()  # so that there is state to put back
    # from the same weights and state
    for own, other in zip(plain.learner.policy.state_tensors(), weights_and_state(gxpo), strict=True):
        own[1].copy_(other)
    gradient = torch.randn(len(plain.learner.policy.master), generator=torch.Generator().manual_seed(1)) * 1e-4
    calls = []

    def accumulate(trainer):
        trainer.learner.policy.flat.grads.copy_(gradient)
        if trainer is gxpo:
            if len(calls) == broken:
                trainer.learner.policy.flat.grads.mul_(value)
            calls.append(1)
        return {"loss": 0.0, "entropy": 1.0}

    if broken:
        plain.learner.update.update(plain.learner.policy, [lambda: accumulate(plain)])
    metrics = gxpo.learner.update.update(gxpo.learner.policy, [lambda: accumulate(gxpo)])
    assert metrics["update/fallback"] == 1.0
    assert metrics["num_backward_passes"] == len(calls) == (1, 2, 4)[broken]
    assert metrics["skipped"] == float(value != 0.0) and metrics["grad_norm"] == pytest.approx(value, nan_ok=True)
    weights, *state = zip(weights_and_state(plain), weights_and_state(gxpo), strict=True)
    assert torch.equal(*weights) or (broken == 2 and opt_state == "keep")
    if broken < 2 or opt_state == "restore":
        assert all(torch.equal(a, b) for a, b in state)
    assert all(tensor.isfinite().all() for tensor in weights_and_state(gxpo))


def gated_run(norms, **options):
    """Passes of each step of a run whose corrective gradients have these norms."""
    policy = Descent(torch.zeros(1, dtype=F64), None, lr=0.0)
    rule, passes = GXPO(ratio="coord_grad", **options), []
    for norm in norms:
        policy.gradient_of = lambda x, norm=norm: torch.full((1,), norm, dtype=F64)
        assert rule.backward_passes == (3 if rule.active else 1)
        passes.append(int(rule.update(policy, [policy.accumulate])["num_backward_passes"]))
    return passes


def test_gate_on_the_norm_of_the_corrective_gradient():
    quick = dict(gate_window=4, gate_warmup=0, gate_patience=1, gate_threshold=3.0)
    calm = [1.0, 3.0, 1.0, 3.0]
    assert gated_run([*calm, 9.0, 1.0, 1.0], **quick) == [3] * 5 + [1] * 2  # closed from the step after, for good
    assert gated_run([*calm, 1e-3, 1.0, 1.0], **quick) == [3] * 7  # a fall is no reason
    assert gated_run([*calm, 9.0, 9.0, 9.0, 1.0], **quick | dict(gate_patience=3)) == [3] * 7 + [1]
    assert gated_run([9.0, 1.0, 9.0, *calm, 9.0, 1.0], **quick | dict(gate_warmup=3)) == [3] * 8 + [1]
    assert gated_run([*calm, 9.0, 1.0], gate="off") == [3] * 6
    # a pause of two steps, then a new window has to fill
    pause = quick | dict(fallback_steps=2)
    assert gated_run([*calm, 9.0, 1.0, 1.0, *calm, 9.0, 1.0], **pause) == [3] * 5 + [1] * 2 + [3] * 5 + [1]


def test_gate_on_the_angle_between_first_and_corrective_gradient():
    policy = Descent(torch.zeros(2, dtype=F64), None)
    rule = GXPO(ratio="coord_grad", gate="cosine", gate_warmup=0, gate_patience=1)
    for slow, stays in (([1.0, 0.2], True), ([3.0, 4.0], False)):  # 1 - cos: 0.02 and 0.4 against 0.15
        gradients = iter([[1.0, 0.0], [1.0, 0.0], slow])
        policy.gradient_of = lambda x, gradients=gradients: torch.tensor(next(gradients), dtype=F64)
        metrics = rule.update(policy, [policy.accumulate])
        assert metrics["update/gate_z"] == pytest.approx(1 - slow[0] / math.hypot(*slow))
        assert rule.active is stays


def test_probes_that_hardly_reach_are_taken_back():
    # r = 0: scale 1, multiplier alpha = 0.5 < 0.6
    policy = Descent(torch.zeros(1, dtype=F64), None)
    gradients = iter([[1.0], [1e-3], [1.0]])
    policy.gradient_of = lambda x: torch.tensor(next(gradients), dtype=F64)
    metrics = GXPO(ratio="coord_grad", min_effective_multiplier=0.6).update(policy, [policy.accumulate])
    assert metrics["update/refused"] == 1.0 and policy.master.item() == -1.0  # the corrective step, from the anchor


def test_blocks_know_their_tensor():
    assert segments([slice(0, 2048), slice(2048, 2058), slice(4096, 4096)], torch.zeros(4096)).tolist() == [0, 0, 1, 1]


def test_thresholds_are_root_mean_squares_of_whole_tensors(tmp_path):
    policy = make_trainer(tmp_path, *SMALL_STEPS).learner.policy
    values = torch.randn(len(policy.master), generator=torch.Generator().manual_seed(0))
    rms = policy.tensor_rms(lambda part: values[part])
    slots = list(policy.flat.slots.values())
    assert len(rms) == len(slots)
    for i in (0, 3, len(slots) - 1):
        own = policy.flat.view(values, slots[i])
        assert rms[i].item() == pytest.approx(own.square().mean().sqrt().item(), rel=1e-5)


BAD = [
    (dict(lookahead=1), "--update.lookahead must be at least 2, got 1"),
    (dict(alpha=0.0), "--update.alpha must be above 0"),
    (dict(ratio_min=3.0), "--update.ratio-min 3.0 must be below --update.ratio-max 3.0"),
    (dict(gate_patience=0), "--update.gate-patience must be at least 1, got 0"),
]


@pytest.mark.parametrize("options, text", BAD, ids=[str(o) for o, _ in BAD])
def test_bad_settings(options, text):
    with pytest.raises(ValueError, match=text):
        GXPO(**options)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_cosine_gate_asks_for_a_direction_and_not_for_its_sign(sign):
    """1 - |cosine|: 0 for gradients on one line, and 1 - 0.6 for 3, 4 against 5, 0."""
    rule, shard = GXPO(gate="cosine"), Descent(torch.zeros(2), lambda theta: theta)
    g0 = torch.tensor([5.0, 0.0])
    for slow, wanted in (([2.0, 0.0], 0.0), ([3.0, 4.0], 0.4)):
        gradient = Gradient(sign * torch.tensor(slow), norm=1.0, loss=0.0)
        assert rule.signal(shard, {}, gradient, g0) == pytest.approx(wanted, abs=1e-6)
