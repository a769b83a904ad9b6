"""Loss of single tokens: the kernel against its definition in float64, both by hand, and what must not break."""

import math
from functools import partial

import pytest
import torch

from fastrl.kernels.policy_loss import STATS, TokenLoss, clip, policy_loss, policy_loss_ref
from fastrl.kernels.vectors import BLOCK_N
from support.device import DEVICE

kernel = partial(policy_loss, triton=True)
PATHS = pytest.mark.parametrize("function", [kernel, policy_loss_ref], ids=["triton", "torch"])
REF = dict(ref_logprobs=True, kl=0.1)
SETTINGS = {
    "clip": {}, "asymmetric": dict(clip_low=0.1, clip_high=0.28), "no dual clip": dict(dual_clip=None),
    "cispo": dict(surrogate="cispo"), "cispo, asymmetric": dict(surrogate="cispo", clip_low=10.0, clip_high=0.28),
    "k1": REF | dict(kl_type="k1"), "k2": REF | dict(kl_type="k2"), "k3": REF, "k3+": REF | dict(kl_type="k3+"),
    "on-policy": dict(on_policy=True),
}  # fmt: skip


def tokens(N, seed=0):
    """logprobs, old, advantage, w, ref of N tokens: ratios on both sides of every edge, a fifth of weight 0."""
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(N, generator=g)
    old, ref = (logp + 0.6 * torch.randn(N, generator=g) for _ in range(2))
    w = (torch.rand(N, generator=g) > 0.2) / 1000.0
    return [x.to(DEVICE) for x in (logp, old, torch.randn(N, generator=g), w, ref)]


def call(function, vectors, **settings):
    logp, old, advantage, w, ref = vectors
    if settings.pop("on_policy", False):
        old = None
    ref = ref if settings.pop("ref_logprobs", False) else None
    return function(TokenLoss(**settings), logp, old, advantage, w, ref)


@pytest.mark.parametrize("N", [0, 1, BLOCK_N - 1, BLOCK_N, 2 * BLOCK_N + 7])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_kernel_is_its_definition(settings, N):
    vectors = tokens(N, seed=N)
    ours, truth = (call(kernel, vectors, **settings), call(policy_loss_ref, [v.double() for v in vectors], **settings))
    assert ours.coef.dtype == torch.float32 and ours.coef.shape == (N,)
    near = torch.zeros(N, dtype=torch.bool, device=DEVICE)  # the edges of the clip, where one rounding decides
    if N and not settings.get("on_policy"):
        ratio = (vectors[0].double() - vectors[1].double()).exp()
        low, high = settings.get("clip_low", 0.2), settings.get("clip_high", 0.2)
        near = ((ratio - 1 + low).abs() < 1e-5) | ((ratio - 1 - high).abs() < 1e-5)
    assert near.sum() <= 2
    torch.testing.assert_close(ours.coef[~near].double(), truth.coef[~near], rtol=2e-5, atol=1e-9)
    if not near.any():
        at = STATS.index("policy_kl")
        # log-ratios of both signs cancel: the roundings of 2055 tokens leave up to 6e-6 of a sum that may be small
        assert ours.stats[at].item() == pytest.approx(truth.stats[at].item(), rel=2e-5, abs=1e-6 + 2e-8 * N)
        rest = torch.arange(len(STATS), device=DEVICE) != at
        torch.testing.assert_close(ours.stats[rest].double(), truth.stats[rest], rtol=2e-5, atol=1e-6)
    if N > BLOCK_N and not settings:
        named = dict(zip(STATS, truth.stats.tolist(), strict=True))
        assert min(named["clip_low"], named["clip_high"]) > 20


# A, ratio -> loss, d loss / d logprob, by hand: epsilon 0.2, dual clip 3
CLIP = [
    (2.0, 1.0, -2.0, -2.0), (2.0, 1.5, -2.4, 0.0), (2.0, 0.5, -1.0, -1.0), (-2.0, 1.5, 3.0, 3.0),
    (-2.0, 0.5, 1.6, 0.0), (-2.0, 4.0, 6.0, 0.0), (0.0, 9.0, 0.0, 0.0),
]  # fmt: skip
CISPO = [(2.0, 1.5, -2.4 * math.log(0.3), -2.4), (-2.0, 0.5, 1.6 * math.log(0.3), 1.6)]  # probability 0.3


@PATHS
@pytest.mark.parametrize("surrogate, cases", [("clip", CLIP), ("cispo", CISPO)])
def test_by_hand(function, surrogate, cases):
    for advantage, ratio, loss, slope in cases:
        logp = torch.tensor([math.log(0.3)], device=DEVICE)
        old = logp - math.log(ratio)
        vectors = (logp, old, torch.tensor([advantage], device=DEVICE), torch.full((1,), 0.5, device=DEVICE))
        out = function(TokenLoss(surrogate=surrogate), *vectors)
        assert out.loss.item() == out.stats[0].item() == pytest.approx(0.5 * loss, abs=1e-6), (advantage, ratio)
        assert out.coef.item() == pytest.approx(0.5 * slope, abs=1e-6), (advantage, ratio)


@PATHS
def test_at_the_edge_of_the_clip_the_gradient_is_whole(function):
    # 1.25 and 0.75 are exact in binary; log_ratio 0 with edges at 1 is too
    zero, w = torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE)
    for advantage in (1.0, -1.0):
        out = function(
            TokenLoss(clip_low=0.0, clip_high=0.0), zero, zero, torch.full((1,), advantage, device=DEVICE), w
        )
        assert out.coef.item() == -advantage


def test_what_is_clipped_by_hand():
    x = torch.tensor([-3.0, -1.0, 0.5, 2.0, 5.0, math.inf, math.nan], dtype=torch.float64, requires_grad=True)
    clipped = clip(x, -1.0, 2.0)
    assert clipped.dtype == torch.float64 and clipped[:-1].tolist() == [-1, -1, 0.5, 2, 2, 2] and clipped[-1].isnan()
    (slope,) = torch.autograd.grad(clipped.sum(), x)
    assert slope.tolist() == [0, 1, 1, 1, 0, 0, 1]


@PATHS
@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
@pytest.mark.parametrize("log_ratio", [200.0, -200.0, math.inf])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_a_ratio_that_overflows_has_no_gradient_through_it(function, surrogate, log_ratio, advantage):
    logp, w = torch.tensor([-1.0, -1.0], device=DEVICE), torch.ones(2, device=DEVICE)
    old = torch.tensor([-1.0 - log_ratio, -1.0], device=DEVICE)
    loss = TokenLoss(surrogate=surrogate, dual_clip=None)
    out = function(loss, logp, old, torch.full((2,), advantage, device=DEVICE), w)
    assert out.coef.isfinite().all() and out.stats[0].isfinite()
    clipped = 1.2 if log_ratio > 0 else 0.8
    assert out.coef.tolist() == pytest.approx([-advantage * clipped if surrogate == "cispo" else 0.0, -advantage])
    assert out.stats[STATS.index("capped")] == 1


@PATHS
def test_tokens_of_weight_zero_may_hold_anything(function):
    (logp, old, advantage, w, ref), loss = tokens(64), TokenLoss(kl=0.1)
    clean = function(loss, logp, old, advantage, w, ref)
    for poison in (math.nan, math.inf, -math.inf):
        dirty = [torch.where(w == 0, poison, x) for x in (logp, old, advantage, ref)]
        out = function(loss, *dirty[:3], w, dirty[3])
        assert torch.equal(out.coef, clean.coef) and torch.equal(out.stats, clean.stats)
    nothing = function(loss, *[torch.full_like(logp, math.nan)] * 3, torch.zeros_like(w))
    assert not nothing.coef.any() and not nothing.stats.any()


@PATHS
@pytest.mark.parametrize("which", ["logprob nan", "logprob -inf", "advantage nan", "ref -inf", "old nan"])
def test_a_broken_token_gives_nothing_and_is_counted(function, which):
    vectors = dict(zip(("logprob", "old", "advantage", "w", "ref"), tokens(8), strict=True))
    vectors["w"] = torch.ones_like(vectors["w"])
    name, value = which.split()
    others = {k: v.clone() for k, v in vectors.items()}
    others["w"][3] = 0.0
    vectors[name][3] = float(value)
    ours, without = (function(TokenLoss(kl=0.1), *given.values()) for given in (vectors, others))
    assert torch.equal(ours.coef, without.coef) and ours.coef[3] == 0
    assert ours.stats[STATS.index("nonfinite")] == 1 and ours.stats[0] == without.stats[0]


def test_kl_of_nearly_equal_policies_is_never_negative():
    d = torch.linspace(-1e-4, 1e-4, 201, dtype=torch.float64)
    zero, w = torch.zeros(201, device=DEVICE), torch.ones(201, device=DEVICE)
    kl = []
    for x in d.float().to(DEVICE):
        out = kernel(TokenLoss(kl=1.0), zero[:1], None, zero[:1], w[:1], -x[None])
        kl.append(out.stats[0].item())
    truth = torch.expm1(-d.float().double()) + d.float().double()
    assert min(kl) >= 0
    torch.testing.assert_close(torch.tensor(kl, dtype=torch.float64), truth, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("d", [0.0999, 0.1001, -0.0999, -0.1001, 3.0, 25.0, -25.0])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3+"])
def test_kl_and_its_slope_on_both_sides_of_every_branch(estimator, d):
    logp, w, zero = (torch.tensor([x], device=DEVICE) for x in (-1.0, 1.0, 0.0))
    ref = torch.tensor([-1.0 - d], device=DEVICE)
    loss = TokenLoss(kl=1.0, kl_type=estimator)
    ours = kernel(loss, logp, None, zero, w, ref)
    truth = policy_loss_ref(loss, logp.double(), None, zero.double(), w.double(), ref.double())
    assert ours.stats[0].item() == pytest.approx(truth.stats[0].item(), rel=2e-5)
    assert ours.coef.item() == pytest.approx(truth.coef.item(), rel=2e-5)


def test_two_runs_are_equal():
    first, again = (kernel(TokenLoss(), *tokens(2000)[:4]) for _ in range(2))
    assert torch.equal(first.coef, again.coef) and torch.equal(first.stats, again.stats)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(w=torch.ones(3)), r"w must be a contiguous float32 vector as long as logprobs, \[4\], got .* \(3,\)"),
        (dict(advantage=torch.ones(4).double()), "advantage must be .*, got torch.float64"),
        (dict(old_logprobs=torch.ones(8)[::2]), r"old_logprobs must be .*, got torch.float32 \(4,\), strided"),
        (dict(loss=TokenLoss(ratio_level="sequence")), "the ratio of a sequence is not known here"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    vectors = dict(logprobs=torch.ones(4), old_logprobs=torch.ones(4), advantage=torch.ones(4), w=torch.ones(4))
    given = {"loss": TokenLoss(), **vectors} | change
    with pytest.raises(ValueError, match=message):
        policy_loss(**given)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(surrogate="ppo"), "surrogate must be clip, cispo, got 'ppo'"),
        (dict(kl_type="k4"), r"kl_type must be k1, k2, k3, k3\+, got 'k4'"),
    ],
)
def test_a_loss_that_does_not_exist_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TokenLoss(**change)
