"""AdamW over a flat shard against float64, schedules and clipping by hand, the guard, states that round-trip."""

import copy
import math
import re
import sys

import pytest
import torch

from fastrl.base.types import NumericsError
from fastrl.models.loading import load_model
from fastrl.models.policy import Policy
from fastrl.weights.guard import Guard
from fastrl.weights.optim import OptimConfig, ShardOptimizer, load_state_tensors, make_optimizer, state_tensors

EIGHT_BIT = ["adamw8bit", "paged_adamw8bit"]


@pytest.fixture(scope="module")
def embedded():
    return load_model("embedded", dtype=torch.float32, device="cpu")


def make_policy(embedded, dtype=torch.float32, guard=None, **settings):
    loaded = copy.deepcopy(embedded)
    loaded.model.to(dtype)
    return Policy(loaded, OptimConfig(**settings), guard or Guard())


def gradient(policy, seed=0, size=1e-3):
    """A reproducible gradient on the parameters (padding stays 0), put into the buffer; returns it in float64."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(policy.flat.grads.numel(), generator=g) * size
    policy.flat.grads.copy_(noise * (policy.flat.weights != 0))
    return policy.flat.grads.double()


def adamw(p, gradients, lr, betas=(0.9, 0.999), eps=1e-8, wd=0.01):
    """arXiv:1711.05101, algorithm 2, in the dtype of p; lr: one per gradient."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, (g, rate) in enumerate(zip(gradients, lr, strict=True), start=1):
        p = p * (1 - rate * wd)
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        p = p - rate * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return p


def snapshot(policy):
    return {name: tensor.clone() for name, tensor in policy.state_tensors()} | {"weights": policy.flat.weights.clone()}


def assert_same(policy, before):
    now = snapshot(policy)
    assert now.keys() == before.keys()
    for name in before:
        assert torch.equal(now[name], before[name]), name


def test_five_steps_equal_adamw_in_float64(embedded):
    policy = make_policy(embedded, lr=1e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, max_grad_norm=0)
    start, rates, gradients = policy.master.double(), [1e-3, 2e-3, 3e-3, 2e-3, 1e-3], []
    for i, lr in enumerate(rates):
        gradients.append(gradient(policy, seed=i))
        policy.set_lr(lr)
        assert policy.optimizer_step(0.0) == {
            "grad_norm": pytest.approx(gradients[-1].norm().item(), rel=1e-6),
            "skipped": 0.0,
        }
    expected = adamw(start, gradients, rates, betas=(0.8, 0.95), eps=1e-6, wd=0.1)
    error = (policy.master.double() - expected).abs().max()
    assert error < 5 * torch.finfo(torch.float32).eps * start.abs().max()
    assert (expected - start).abs().median() > 1e-3
    assert policy.policy_version == 5 and torch.equal(policy.model.lm_head.weight[0], policy.master[:128])


def test_clipping_by_hand(embedded):
    for limit, scale in ((1.0, 0.2), (4.0, 0.8), (5.0, 1.0), (6.0, 1.0), (0.0, 1.0)):
        policy = make_policy(embedded, max_grad_norm=limit)
        policy.flat.grads[0], policy.flat.grads[7] = 3.0, -4.0  # norm 5
        assert policy.optimizer_step(0.0)["grad_norm"] == 5.0  # before clipping
        state = dict(policy.state_tensors())
        first, second = state["optimizer.exp_avg"], state["optimizer.exp_avg_sq"]
        # moments after one step: (1 - 0.9) g and (1 - 0.999) g^2
        assert first[[0, 7]].tolist() == pytest.approx([0.1 * 3 * scale, -0.1 * 4 * scale], rel=1e-5)
        assert second[[0, 7]].tolist() == pytest.approx([1e-3 * 9 * scale**2, 1e-3 * 16 * scale**2], rel=1e-4)
        assert first.count_nonzero() == 2


CLIPPED = {"adamw": torch.float32, "adamw, float64": torch.float64, "adamw, bfloat16": torch.bfloat16}


@pytest.mark.parametrize("form", [*CLIPPED, *EIGHT_BIT])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_gradient_is_left_as_it_was_applied(form):
    """Divided in place, whether the optimizer does it or not, and the step is that of the quotient."""
    name, dtype = form.partition(",")[0], CLIPPED.get(form, torch.float32)
    g = torch.Generator().manual_seed(0)
    start, original = torch.randn(8192, generator=g), torch.randn(8192, generator=g).to(dtype)
    if dtype == torch.float64:
        start = start.double()
    moved = []
    for divisor in (1.0, 5.0):
        shard, gradient = start.clone(), original.clone() if divisor > 1 else (original / 5)
        optimizer = ShardOptimizer(OptimConfig(name=name, lr=1e-2), shard)
        for _ in range(2):  # what is set for one step is not there in the next
            optimizer.step(gradient, divisor)
            torch.testing.assert_close(gradient, original / 5, rtol=1e-15 if dtype == torch.float64 else 1e-6, atol=0)
            divisor = 1.0
        moved.append(shard)
    assert (moved[0] - start).abs().min() > 0
    torch.testing.assert_close(*moved, rtol=1e-6, atol=1e-7)


def test_fused_clipping_is_no_pass_of_its_own(embedded):
    from torch.utils._python_dispatch import TorchDispatchMode

    policy, passes = make_policy(embedded, max_grad_norm=1e-4), []
    place, length = policy.flat.grads.data_ptr(), policy.flat.grads.numel()

    class Writes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            on_all = [a for a in args if isinstance(a, torch.Tensor) and a.data_ptr() == place and a.numel() == length]
            passes.extend(function for _ in on_all if function._schema.is_mutable)
            return function(*args, **kwargs or {})

    gradient(policy)
    before = policy.flat.grads.clone()
    with Writes():
        norm = policy.optimizer_step(0.0)["grad_norm"]
    assert norm > 1e-4 and passes == []
    torch.testing.assert_close(policy.flat.grads, before * (1e-4 / norm), rtol=1e-6, atol=0)


def test_schedules_by_hand():
    lr = 8.0e-3
    constant = OptimConfig(lr=lr, warmup=3)
    assert [constant.lr_at(s, 100) for s in range(5)] == pytest.approx([lr / 4, lr / 2, 3 * lr / 4, lr, lr])
    assert OptimConfig(lr=lr).lr_at(0, 10) == OptimConfig(lr=lr).lr_at(9, 10) == lr
    linear = OptimConfig(lr=lr, warmup=2, lr_schedule="linear")
    # 8 steps after the warm-up: 1, 7/8, ... 1/8, and 0 at the end
    assert [linear.lr_at(s, 10) for s in (2, 3, 6, 9, 10)] == pytest.approx([lr, 7 / 8 * lr, lr / 2, lr / 8, 0])
    cosine = OptimConfig(lr=lr, warmup=2, lr_schedule="cosine")
    half = math.sqrt(0.5)  # cos(pi / 4)
    wanted = [lr / 3, lr, (1 + half) / 2 * lr, lr / 2, (1 - half) / 2 * lr, 0]
    assert [cosine.lr_at(s, 10) for s in (0, 2, 4, 6, 8, 10)] == pytest.approx(wanted, abs=1e-12)
    assert OptimConfig(lr=lr, warmup=20, lr_schedule="cosine").lr_at(9, 10) == pytest.approx(lr * 10 / 21)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("started", [False, True])
def test_a_broken_gradient_changes_nothing(embedded, bad, started):
    policy = make_policy(embedded, lr=1e-3, weight_decay=0.1)
    if started:
        gradient(policy)
        policy.optimizer_step(0.0)
    before, version = snapshot(policy), policy.policy_version
    gradient(policy, seed=1)
    policy.flat.grads[12345] = bad
    metrics = policy.optimizer_step(0.0)
    assert metrics["skipped"] == 1.0 and not math.isfinite(metrics["grad_norm"])
    assert_same(policy, before)
    assert (policy.guard.skipped, policy.policy_version) == (1, version)


def test_three_broken_gradients_in_a_row_end_the_run(embedded):
    policy = make_policy(embedded)
    good, bad = 1.0, math.nan
    for step, value in enumerate((bad, bad, good, bad, bad)):
        policy.flat.grads[5] = value
        policy.optimizer_step(0.0)
        policy.guard.end_step(step)
        policy.guard.give_up()
    assert (policy.guard.skipped, policy.guard.in_a_row) == (4, 2)
    before = snapshot(policy)
    policy.flat.grads[5] = bad
    policy.optimizer_step(0.0)
    policy.guard.end_step(5)
    with pytest.raises(NumericsError, match="3 steps in a row were refused.*grad_norm is nan.*lower --optim.lr"):
        policy.guard.give_up()
    assert_same(policy, before)


def test_a_gradient_that_overflows_float32_when_squared_is_finite(embedded):
    policy = make_policy(embedded)
    policy.flat.grads[:2] = torch.tensor([3e25, 4e25])
    assert policy.optimizer_step(0.0) == {"grad_norm": pytest.approx(5e25, rel=1e-6), "skipped": 0.0}
    assert policy.master.isfinite().all()


@pytest.mark.parametrize("started", [False, True])
def test_a_gradient_of_zero_is_no_step(embedded, started):
    # a batch of all-equal rewards says nothing: neither weight decay nor momentum may move the weights
    policy = make_policy(embedded, lr=1e-3, weight_decay=0.1)
    if started:
        gradient(policy)
        policy.optimizer_step(0.0)
    before, version = snapshot(policy), policy.policy_version
    policy.zero_grad()
    assert policy.optimizer_step(0.0) == {"grad_norm": 0.0, "skipped": 0.0}  # nothing was wrong with it
    assert_same(policy, before)
    assert (policy.guard.empty, policy.guard.skipped, policy.policy_version) == (1, 0, version)


def test_float32_master_moves_where_bfloat16_rounds_away(embedded):
    policy = make_policy(embedded, torch.bfloat16, lr=1e-6, weight_decay=0.0, max_grad_norm=0)
    start, weights = policy.master.clone(), policy.flat.weights.clone()
    assert policy.master.dtype == torch.float32 and torch.equal(start, weights.float())
    # between 2^-7 and 2^-6 neighbours in bfloat16 are 2^-14 = 6e-5 apart: a step of 1e-6 is rounded away, 100 are not
    band = (start.abs() > 2**-7) & (start.abs() < 2**-6 - 1e-4)
    sign = gradient(policy).sign()
    for step in range(100):
        policy.flat.grads.copy_(sign)
        policy.optimizer_step(0.0)
        if step == 0:
            assert torch.equal(policy.flat.weights[band], weights[band]) and band.sum() > 1000
    # a constant gradient moves every element by lr a step
    torch.testing.assert_close((policy.master - start)[band], -1e-4 * sign[band].float(), rtol=1e-3, atol=1e-7)
    assert torch.equal(policy.flat.weights, policy.master.bfloat16())
    assert (policy.flat.weights != weights)[band].all()


def shard_and_optimizer(name, numel=8192):
    g = torch.Generator().manual_seed(3)
    shard = torch.randn(numel, generator=g)
    return shard, make_optimizer(OptimConfig(name=name, lr=1e-2, weight_decay=0.1), shard)


def steps(shard, optimizer, seeds):
    for seed in seeds:
        shard.grad = torch.randn(len(shard), generator=torch.Generator().manual_seed(seed))
        optimizer.step()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["adamw", *EIGHT_BIT])
def test_states_round_trip(name):
    shard, optimizer = shard_and_optimizer(name)
    assert state_tensors(optimizer) == {}
    steps(shard, optimizer, range(5))
    saved, weights = {n: t.clone() for n, t in state_tensors(optimizer).items()}, shard.clone()
    assert all(isinstance(t, torch.Tensor) for t in saved.values())
    if name in EIGHT_BIT:
        assert saved["state1"].dtype == saved["state2"].dtype == torch.uint8
        assert len(saved["state1"].unique()) > 100 and saved["step"].tolist() == [5]
    steps(shard, optimizer, range(5, 10))

    other, fresh = shard_and_optimizer(name)
    other.copy_(weights)
    load_state_tensors(fresh, saved)
    again = state_tensors(fresh)
    assert again.keys() == saved.keys()
    for key, value in saved.items():
        assert again[key].dtype == value.dtype and torch.equal(again[key], value), key
    steps(other, fresh, range(5, 10))
    assert torch.equal(other, shard)
    for key, value in state_tensors(optimizer).items():
        assert torch.equal(state_tensors(fresh)[key], value), key

    without, fresh = shard_and_optimizer(name)
    without.copy_(weights)
    steps(without, fresh, range(5, 10))
    assert not torch.equal(without, shard)  # the state matters


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_eight_bit_states_follow_adamw(name):
    shard, optimizer = shard_and_optimizer(name)
    start = shard.double()
    steps(shard, optimizer, [0] * 5)
    gradients = [torch.randn(8192, generator=torch.Generator().manual_seed(0)).double()] * 5
    moved, expected = shard.double() - start, adamw(start, gradients, [1e-2] * 5, wd=0.1) - start
    assert (moved - expected).norm() < 0.05 * expected.norm()


def test_policy_state_round_trips(embedded):
    policy, other = make_policy(embedded, torch.bfloat16, lr=1e-3), make_policy(embedded, torch.bfloat16, lr=1e-3)
    for seed in range(3):
        gradient(policy, seed)
        policy.optimizer_step(0.0)
    other.load_state_tensors({name: t.clone() for name, t in policy.state_tensors()})
    assert other.policy_version == 0 and torch.equal(other.flat.weights, policy.flat.weights)
    for p in (policy, other):
        gradient(p, 9)
        p.optimizer_step(0.0)
    assert_same(other, snapshot(policy))


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_missing_bitsandbytes(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = f"--optim.name {name} needs bitsandbytes, which is not installed. Run `pip install bitsandbytes`"
    with pytest.raises(ValueError, match=re.escape(message)):
        make_optimizer(OptimConfig(name=name), torch.ones(3))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lr": 0.0}, "--optim.lr must be between 0 and 1, got 0.0; 1e-6 is usual"),
        ({"lr": 1.0}, "--optim.lr must be between 0 and 1, got 1.0"),
        ({"lr": math.nan}, "--optim.lr must be between 0 and 1, got nan"),
        ({"betas": (0.9, 1.0)}, "--optim.betas must be below 1, got (0.9, 1.0)"),
        ({"betas": (-0.1, 0.9)}, "--optim.betas must be at least 0, got (-0.1, 0.9)"),
        ({"eps": -1e-8}, "--optim.eps must be at least 0, got -1e-08"),
        ({"weight_decay": -0.1}, "--optim.weight-decay must be at least 0, got -0.1"),
        ({"max_grad_norm": math.nan}, "--optim.max-grad-norm must be at least 0 and at most 1e9, got nan"),
        ({"warmup": -1}, "--optim.warmup must be at least 0, got -1"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OptimConfig(**settings)


@pytest.mark.promise("B9", trials=3)
def test_eight_bit_state_is_the_same_on_one_two_and_four_ranks(embedded):
    """Shards start at multiples of 1024 elements, so at blocks of 256: each has its own scale wherever it lies."""
    pytest.importorskip("bitsandbytes")
    config = OptimConfig(name="adamw8bit", lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(1 << 16, generator=generator)
    gradients = [torch.randn(1 << 16, generator=generator) for _ in range(3)]
    states = {}
    for ranks in (1, 2, 4):
        shards = [shard.clone() for shard in whole.chunk(ranks)]
        optimizers = [ShardOptimizer(config, shard) for shard in shards]
        for gradient in gradients:
            for optimizer, part in zip(optimizers, gradient.chunk(ranks), strict=True):
                optimizer.step(part)
        kept = [optimizer.state_tensors() for optimizer in optimizers]
        names = ("state1", "state2", "absmax1", "absmax2")
        states[ranks] = [torch.cat(shards), *(torch.cat([state[name] for state in kept]) for name in names)]
    assert states[1][1].dtype == states[4][1].dtype == torch.uint8
    for ranks in (2, 4):
        assert all(torch.equal(a, b) for a, b in zip(states[1], states[ranks], strict=True))


@pytest.mark.promise("B9")
def test_a_shard_that_would_silently_be_kept_in_float32_is_refused():
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="a rank's shard has 2048 elements.*fewer than 4096.*--optim.name adamw"):
        ShardOptimizer(OptimConfig(name="adamw8bit"), torch.zeros(2048))
    assert ShardOptimizer(OptimConfig(name="adamw8bit"), torch.zeros(4096)).shard.numel() == 4096
