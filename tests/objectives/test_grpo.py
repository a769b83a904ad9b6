"""GRPO and its relatives by hand: advantages, the clipped ratio, aggregation, KL estimators, signs."""

import math

import pytest
import torch

from fastrl.kernels.policy_loss import kl_estimate
from fastrl.objectives.grpo import GRPO
from support.batches import loss_and_grad, make


def test_advantage_of_two_and_of_eight():
    # mean 1/2, unbiased std sqrt(1/4 + 1/4) = 0.7071
    two = GRPO().credit(torch.tensor([1.0, 0.0]))
    assert two.tolist() == pytest.approx([0.5 / 0.70711, -0.5 / 0.70711], abs=1e-5)
    # mean 1/8, unbiased var ((7/8)^2 + 7 (1/8)^2) / 7 = 1/8, std 0.35355
    eight = GRPO().credit(torch.tensor([0.0, 0, 0, 1, 0, 0, 0, 0]))
    assert eight.tolist() == pytest.approx([-0.35355] * 3 + [2.47487] + [-0.35355] * 4, abs=1e-4)
    assert GRPO(std_eps=0.5).credit(torch.tensor([1.0, 0.0]))[0].item() == pytest.approx(0.5 / 1.20711, abs=1e-5)
    assert GRPO(adv_norm="none").credit(torch.tensor([1.0, 0, 0, 0])).tolist() == [0.75, -0.25, -0.25, -0.25]
    assert GRPO().credit(torch.tensor([3.0, 1.0])).tolist() == pytest.approx([0.70711, -0.70711], abs=1e-5)


@pytest.mark.parametrize("adv_norm", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero(adv_norm):
    # the float32 mean of eight times 0.1 need not be 0.1; 1e-9 over std_eps would be an advantage of 1e-3
    for value in (0.1, 1.0, 0.0, -0.7, 1 / 3):
        for size in (2, 3, 7, 8):
            assert GRPO(adv_norm=adv_norm).credit(torch.full((size,), value)).tolist() == [0.0] * size


def test_batch_norm_divides_by_the_std_of_all_rewards():
    batch = make([2, 1, 3, 1], [0.5, -0.5, 0.0, 0.0], reward=[1.0, 0.0, 1.0, 1.0], group=[0, 0, 1, 1])
    batch = GRPO(adv_norm="batch", std_eps=1e-12).prepare(batch)
    # mean 3/4, unbiased variance (3/16 * 4) / 3 = 1/4
    assert batch.credit.tolist() == pytest.approx([1.0, -1.0, 0.0, 0.0])
    equal = make([2, 1], [0.0, 0.0], reward=[0.1, 0.1])
    equal = GRPO(adv_norm="batch").prepare(equal)
    assert equal.credit.tolist() == [0.0, 0.0]


def test_ratio_one_is_reinforce():
    # d(-A exp(x))/dx at 0 is -A; so good tokens go up in descent and bad ones down, padding and prompt stay
    batch = make([3, 1], [2.0, -0.5])
    for log_ratio in (None, [[0.0] * 4, [0.0] * 4]):
        loss, grad, metrics = loss_and_grad(GRPO(), batch, log_ratio)
        assert grad.tolist() == [[0.0, -2.0, -2.0, -2.0], [0.0, 0.5, 0.0, 0.0]]
        assert loss == pytest.approx(-2 * 3 + 0.5)
        assert metrics["policy_kl"] == metrics["clip_ratio/region_mean"] == 0.0


def test_gradient_raises_good_tokens_and_lowers_bad_ones():
    logits = torch.linspace(-1, 1, 5).repeat(2, 3, 1).requires_grad_()
    ids = torch.tensor([[0, 2, 3], [0, 1, 4]])
    batch = make([2, 2], [1.0, -1.0])
    logprobs = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    GRPO().loss_sum(logprobs, torch.zeros_like(logprobs), batch)[0].backward()
    with torch.no_grad():
        after = (logits - 0.1 * logits.grad).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    assert (after - logprobs)[0, 1:].min() > 0 and (after - logprobs)[1, 1:].max() < 0
    assert (after - logprobs)[:, 0].abs().max() == 0


@pytest.mark.parametrize(
    "advantage, ratio, loss, grad",
    [
        (1.0, 1.1, -1.1, -1.1),  # inside: -A ratio, gradient -A ratio
        (1.0, 1.25, -1.25, -1.25),  # clip-higher: 1.25 < 1 + 0.28
        (1.0, 1.3, -1.28, 0.0),  # above, and good: clipped
        (1.0, 0.5, -0.5, -0.5),  # below, and good: pulled back up
        (-1.0, 0.9, 0.9, 0.9),
        (-1.0, 0.7, 0.8, 0.0),  # below, and bad: clipped at 1 - 0.2
        (-1.0, 1.5, 1.5, 1.5),  # above, and bad: pushed back down
        (-1.0, 2.9, 2.9, 2.9),
        (-1.0, 3.5, 3.0, 0.0),  # dual clip: at most 3 |A|
        (-2.0, 3.5, 6.0, 0.0),
        (1.0, 3.5, -1.28, 0.0),  # and only for bad ones
    ],
)
def test_clipping_works_on_one_side(advantage, ratio, loss, grad):
    batch = make([1], [advantage])
    got, gradient, metrics = loss_and_grad(GRPO(clip_high=0.28), batch, [[0.0, math.log(ratio)]])
    assert (got, gradient[0, 1].item()) == pytest.approx((loss, grad), rel=1e-5)
    assert metrics["clip_ratio/low_mean"] == float(advantage < 0 and ratio < 0.8)
    assert metrics["clip_ratio/high_mean"] == float(advantage > 0 and ratio > 1.28)
    assert metrics["policy_kl"] == pytest.approx(-math.log(ratio), rel=1e-5)


def test_no_dual_clip():
    loss, grad, _ = loss_and_grad(GRPO(dual_clip=None), make([1], [-1.0]), [[0.0, math.log(50)]])
    assert (loss, grad[0, 1].item()) == pytest.approx((50, 50), rel=1e-5)


@pytest.mark.parametrize("advantage", [-1.5, 0.0, 1.5])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("log_ratio", [-1e4, -200.0, 200.0, 1e4])
def test_overflowing_ratios(log_ratio, advantage, dual_clip):
    # exp(200) is inf in float32, inf * 0 is NaN; rivals return NaN gradients here
    objective = GRPO(dual_clip=dual_clip, log_ratio_cap=10.0)
    loss, grad, _ = loss_and_grad(objective, make([2], [advantage]), [[0.0, log_ratio, 0.0]])
    assert math.isfinite(loss)
    assert grad.tolist() == [[0.0, 0.0, -advantage]]
    largest = -advantage * (math.exp(10) if dual_clip is None else 3.0)
    expected = {True: largest, False: -advantage * 0.8} if advantage < 0 else {True: -advantage * 1.2, False: 0.0}
    assert loss == pytest.approx(expected[log_ratio > 0] - advantage, rel=1e-4, abs=1e-3)


def test_the_cap_is_on_the_log_ratio():
    for cap, grad in ((2.0, 0.0), (3.0, math.exp(2.5))):
        objective = GRPO(dual_clip=None, log_ratio_cap=cap)
        got = loss_and_grad(objective, make([1], [-1.0]), [[0.0, 2.5]])[1]
        assert got[0, 1].item() == pytest.approx(grad, rel=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("loss_agg", ["token", "seq", "const"])
def test_padding_may_hold_anything(poison, loss_agg):
    objective = GRPO(kl=0.3, entropy=0.1, loss_agg=loss_agg)
    rows = dict(old_logprobs=[[-1.0, -2.0], [-0.5]], ref_logprobs=[[-1.5, -1.0], [-0.7]])
    results = []
    for value in (0.0, poison):
        batch = make([2, 1], [1.0, -1.0], **rows)
        for tensor in (batch.old_logprobs, batch.ref_logprobs):
            tensor[~batch.response_mask] = value
        logprobs = torch.tensor([[value, -1.1, -1.9], [value, -0.6, value]]).requires_grad_()
        entropy = torch.tensor([[value, 0.3, 0.9], [value, 0.6, value]]).requires_grad_()
        loss, metrics = objective.loss_sum(logprobs, entropy, batch)
        loss.backward()
        for grad in (logprobs.grad, entropy.grad):
            assert (grad[~batch.response_mask] == 0).all() and (grad[batch.response_mask] != 0).all()
        results.append([loss.item(), *(m.item() for m in metrics.values()), *logprobs.grad.flatten().tolist()])
    assert results[0] == results[1] and all(map(math.isfinite, results[1]))


def test_aggregation_by_hand():
    # ratio 1: the token losses are -A, here -1 (three tokens) and +2 (one token)
    for loss_agg, loss, grads in (
        ("token", -1 * 3 + 2, (-1, 2)),
        ("seq", -1 + 2, (-1 / 3, 2)),  # each completion's mean
        ("const", (-1 * 3 + 2) / 10, (-1 / 10, 2 / 10)),  # sums over max_new_tokens
    ):
        got, grad, _ = loss_and_grad(GRPO(loss_agg=loss_agg), make([3, 1], [1.0, -2.0], max_new_tokens=10))
        assert got == pytest.approx(loss)
        assert grad[:, 1].tolist() == pytest.approx(grads)
        assert grad[1, 2:].tolist() == [0.0, 0.0]
    assert [GRPO(loss_agg=a).normalizer for a in ("token", "seq", "const")] == ["token", "completion", "completion"]


def test_a_completion_without_tokens_counts_nothing():
    batch = make([2, 1], [1.0, -2.0])
    batch.response_mask[1] = False
    for loss_agg, loss in (("token", -2.0), ("seq", -1.0), ("const", -2 / 8)):
        got, grad, _ = loss_and_grad(GRPO(loss_agg=loss_agg), batch)
        assert got == pytest.approx(loss) and not grad[1].any()


def test_kl_in_the_loss():
    # x = logp - ref = -1 + 1.5 = 0.5, and -1 + 0.4 = -0.6
    k3 = [math.exp(-0.5) - 1 + 0.5, math.exp(0.6) - 1 - 0.6]
    values = {"k1": [0.5, -0.6], "k2": [0.125, 0.18], "k3": k3, "k3+": k3}
    slopes = {"k1": [1, 1], "k2": [0.5, -0.6], "k3": [1 - math.exp(-0.5), 1 - math.exp(0.6)], "k3+": [0.5, -0.6]}
    for kind in values:
        batch = make([2], [1.0], ref_logprobs=[[-1.5, -0.4]])
        loss, grad, metrics = loss_and_grad(GRPO(kl=0.1, kl_type=kind), batch)
        assert loss == pytest.approx(-2 + 0.1 * sum(values[kind]), rel=1e-5)
        assert grad[0, 1:].tolist() == pytest.approx([-1 + 0.1 * s for s in slopes[kind]], rel=1e-5)
        assert metrics["kl"] == pytest.approx(sum(values[kind]), rel=1e-4)


def test_expected_gradients_of_the_kl_estimators():
    # a policy over 4 tokens, enumerated: E[d estimate] under the policy, against the gradient of the KL itself
    g = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(2, 4, generator=g, dtype=torch.float64)
    logits.requires_grad_()
    logp, ref = logits.log_softmax(-1), ref.log_softmax(-1)
    forward = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)[0]
    reverse = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits, retain_graph=True)[0]
    expected = {"k1": torch.zeros(4, dtype=torch.float64), "k2": forward, "k3": reverse, "k3+": forward}
    assert (forward - reverse).abs().max() > 0.05
    for kind, wanted in expected.items():
        loss = (logp.detach().exp() * kl_estimate(logp - ref, kind)).sum()
        got = torch.autograd.grad(loss, logits, retain_graph=True)[0]
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    for kind in ("k1", "k3", "k3+"):  # and these values are unbiased
        mean = (logp.exp() * kl_estimate(logp - ref, kind)).sum()
        torch.testing.assert_close(mean, (logp.exp() * (logp - ref)).sum())


def test_k3_is_never_negative_and_never_infinite():
    tiny = torch.cat([torch.linspace(-1e-3, 1e-3, 4001), torch.logspace(-20, 0, 500), -torch.logspace(-20, 0, 500)])
    for kind in ("k3", "k3+"):
        assert kl_estimate(tiny, kind).min() >= 0
    assert (torch.exp(-tiny) - 1 + tiny).min() < 0  # the textbook form is, in float32
    x = torch.tensor([-1e4, 1e4], requires_grad=True)
    for kind in ("k1", "k2", "k3", "k3+"):
        value = kl_estimate(x, kind)
        assert value.isfinite().all() and not torch.autograd.grad(value.sum(), x)[0].any()
