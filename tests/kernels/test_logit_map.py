"""Scale and soft cap of logits, in every operation on the head: by hand, against float64, and at their edges."""

import math

import pytest
import torch

from fastrl.kernels import linear_logprob as module
from fastrl.kernels import rows as kernels
from fastrl.kernels.linear_logprob import linear_logprob, linear_logprob_ref
from fastrl.kernels.linear_policy_loss import TokenVectors, linear_policy_loss, linear_policy_loss_ref
from fastrl.kernels.logit_map import PLAIN, LogitMap
from fastrl.kernels.parity import head_fault
from fastrl.kernels.policy_loss import TokenLoss
from support.device import COMPILED, DEVICE

PATHS = pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
MAPS = {"scale": LogitMap(scale=1 / 8), "softcap": LogitMap(softcap=5.0), "both": LogitMap(scale=2.0, softcap=3.0)}
EACH = pytest.mark.parametrize("logit_map", MAPS.values(), ids=MAPS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks that a small vocabulary fills, more than once."""
    if not COMPILED:
        monkeypatch.setattr(kernels, "BLOCK_V", 256)


def inputs(N, V, dtype, seed=0):
    """hidden [N, 16], weight [V, 16], target [N], upstream [3, N]."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, 16, generator=g).to(dtype), torch.randn(V, 16, generator=g).to(dtype)
    target, upstream = torch.randint(0, V, (N,), generator=g), torch.randn(3, N, generator=g)
    return [x.to(DEVICE) for x in (hidden, weight, target, upstream)]


def run(function, hidden, weight, target, upstream, **how):
    """Outputs and gradients of a weighted sum of all three."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    outputs = function(hidden, weight, target, need_entropy=True, **how)
    sum((x * up.to(x.dtype)).sum() for x, up in zip(outputs, upstream, strict=True)).backward()
    return [*(x.detach() for x in outputs), hidden.grad, weight.grad]


def test_two_words_by_hand():
    # raw logits 0 and 4; capped at 2: 2 tanh(2); at temperature 1/2 they count twice
    z = torch.tensor([0.0, 4.0], dtype=torch.float64)
    assert LogitMap(scale=0.25)(z).tolist() == [0.0, 1.0]
    assert LogitMap(softcap=2.0)(z).tolist() == pytest.approx([0.0, 2 * math.tanh(2)])
    assert LogitMap(scale=0.5, softcap=2.0)(z).tolist() == pytest.approx([0.0, 2 * math.tanh(1)])
    hidden, weight, target = torch.ones(1, 1).double(), z[:, None], torch.tensor([1])
    for function in (linear_logprob, linear_logprob_ref):
        logprobs, _, _ = function(hidden, weight, target, inv_temperature=2.0, logit_map=LogitMap(softcap=2.0))
        assert logprobs.item() == pytest.approx(-math.log1p(math.exp(-4 * math.tanh(2))))


@EACH
def test_slope_is_the_derivative(logit_map):
    z = torch.linspace(-30, 30, 41, dtype=torch.float64, requires_grad=True)
    logit_map(z).sum().backward()
    slope = logit_map.slope(logit_map(z.detach()))
    torch.testing.assert_close(z.grad, slope * torch.ones_like(z.detach()), rtol=1e-12, atol=1e-15)
    assert torch.equal(logit_map.over(z.detach().clone()), logit_map(z.detach()))


@EACH
def test_gradients_are_finite_differences(logit_map):
    hidden, weight, target, _ = inputs(3, 7, torch.float64)

    def outputs(h, w):
        return linear_logprob(h, w, target, inv_temperature=0.8, need_entropy=True, logit_map=logit_map)

    assert torch.autograd.gradcheck(outputs, (hidden.requires_grad_(), weight.requires_grad_()))


@PATHS
@EACH
@pytest.mark.parametrize("per_token", [False, True], ids=["one", "per token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_the_definition(triton, logit_map, dtype, per_token):
    hidden, weight, target, upstream = inputs(5, 1003, dtype)
    scale = torch.linspace(0.5, 2.0, 5, device=DEVICE) if per_token else 0.75
    how = dict(logit_map=logit_map, inv_temperature=scale)
    exact = how | ({"inv_temperature": scale.double()} if per_token else {})
    truth = run(linear_logprob_ref, hidden.double(), weight.double(), target, upstream, **exact)
    ours = run(linear_logprob, hidden, weight, target, upstream, **how, triton=triton)
    for found, true in zip(ours[:3], truth[:3], strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-6, atol=2e-5)
    for found, true in zip(ours[3:], truth[3:], strict=True):
        assert (found.double() - true).norm() < (2e-5 if dtype == torch.float32 else 6e-3) * true.norm()


@EACH
def test_slabs_and_chunks_change_nothing(logit_map, monkeypatch):
    hidden, weight, target, upstream = inputs(7, 1003, torch.float32)
    for triton in (False, True):
        whole = run(linear_logprob, hidden, weight, target, upstream, logit_map=logit_map, triton=triton)
        with monkeypatch.context() as small:
            for name, value in (("SLAB_ROWS", 3), ("SLAB_WORDS", 64), ("SLAB_ELEMENTS", 3 * 64)):
                small.setattr(kernels, name, value)
            small.setattr(module, "CHUNK_ROWS", 2)
            small.setattr(module, "CHUNK_ELEMENTS", 2 * 1003)
            cut = run(linear_logprob, hidden, weight, target, upstream, logit_map=logit_map, triton=triton)
        for a, b in zip(cut, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@PATHS
@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_loss_is_the_definition(triton, logit_map, dtype, monkeypatch):
    hidden, weight, target, upstream = inputs(7, 1003, dtype)
    vectors = TokenVectors(upstream[0], torch.full((7,), 1 / 7, device=DEVICE), -6 + upstream[1] / 4)
    loss, how = TokenLoss(entropy=0.05), dict(inv_temperature=1.6, logit_map=logit_map)
    exact = TokenVectors(*(None if x is None else x.double() for x in vectors))
    truth = linear_policy_loss_ref(loss, hidden.double(), weight.double(), target, exact, **how)
    monkeypatch.setattr(module, "CHUNK_ROWS", 3)
    ours = linear_policy_loss(loss, hidden, weight, target, vectors, **how, triton=triton)
    torch.testing.assert_close(ours.logprobs.double(), truth.logprobs, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.entropy.double(), truth.entropy, rtol=0, atol=2e-5)
    for found, true in ((ours.hidden_grad, truth.hidden_grad), (ours.weight_grad, truth.weight_grad)):
        assert (found.double() - true).norm() < (2e-5 if dtype == torch.float32 else 6e-3) * true.norm()
    assert truth.weight_grad.norm() > 1e-3


@PATHS
def test_capped_logits_stay_finite(triton):
    # raw logits of 1e4 and -1e4 are at the cap: the word is drawn with p = 1 / (1 + exp(-2 cap)), and gets no gradient
    hidden = torch.tensor([[1.0, 0.0]], device=DEVICE)
    weight = torch.tensor([[1e4, 0.0], [-1e4, 0.0]], device=DEVICE)
    target, upstream = torch.tensor([1], device=DEVICE), torch.ones(3, 1, device=DEVICE)
    ours = run(linear_logprob, hidden, weight, target, upstream, logit_map=LogitMap(softcap=2.0), triton=triton)
    assert ours[0].item() == pytest.approx(-4 - math.log1p(math.exp(-4)), rel=1e-6)
    assert not ours[3].any() and not ours[4].any()


@EACH
def test_the_check_before_a_run_covers_it(logit_map, monkeypatch):
    from fastrl.kernels import parity

    if not COMPILED:
        monkeypatch.setattr(parity, "NUM_ROWS", 8)
    weight = inputs(1, 700, torch.float32)[1]
    assert head_fault(weight, logit_map) == ""
    monkeypatch.setattr(kernels, "factors", lambda inv_temperature, logit_map: (inv_temperature, 1.0))
    assert "off by" in head_fault(weight, logit_map)


@pytest.mark.parametrize("name, wrong", [("scale", 0.0), ("scale", -0.5), ("scale", math.nan), ("softcap", -1.0)])
def test_what_is_no_map_is_refused(name, wrong):
    with pytest.raises(ValueError, match="scale must be above 0, softcap at least 0"):
        LogitMap(**{name: wrong})


def test_most_models_do_nothing():
    z = torch.randn(3)
    assert PLAIN(z) is z and PLAIN.over(z) is z and PLAIN.slope(z) == 1.0
