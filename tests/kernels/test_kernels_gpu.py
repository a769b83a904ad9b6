"""What only a GPU can show of the kernels: sizes beyond int32, long batches, races, and runs that agree to the bit."""

import math

import pytest
import torch

from fastrl.kernels.linear_logprob import linear_logprob
from fastrl.kernels.linear_policy_loss import TokenVectors, linear_policy_loss
from fastrl.kernels.logit_map import LogitMap
from fastrl.kernels.policy_loss import TokenLoss, policy_loss, policy_loss_ref
from fastrl.kernels.row_once import row_once
from fastrl.kernels.rows import row_forward, row_gradient
from fastrl.models.row_once import CompiledRowKernel, has_clusters
from support.device import COMPILED

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not COMPILED, reason="needs a GPU")]


@pytest.fixture(autouse=True)
def on_the_gpu():
    torch.use_deterministic_algorithms(False)  # filling gigabytes with NaN takes longer than the tests
    with torch.device("cuda"):
        yield


def test_more_logits_than_int32_counts():
    N, V = 14_400, 151_936
    assert N * V > 2**31
    logits = torch.zeros(N, V)
    target = torch.randint(0, V, (N,))
    logits[torch.arange(N), target] = 8.0
    logprobs, lse = torch.empty(2, N)
    row_forward(logits, target, 1.0, logprobs, lse, None)
    expected = torch.logsumexp(torch.cat([torch.zeros(V - 1), torch.tensor([8.0])]).double(), 0).item()
    torch.testing.assert_close(lse, torch.full((N,), expected), rtol=1e-6, atol=2e-5)
    last = row_gradient(logits, target, 1.0, lse, None, torch.ones(N), None, None, dtype=torch.bfloat16)[-1].float()
    p = torch.exp(torch.tensor(8.0 - expected))
    assert last[target[-1]].item() == pytest.approx(1 - p.item(), rel=1e-2)
    assert (last.sum() - last[target[-1]]).item() == pytest.approx(p.item() - 1, rel=1e-2)


@pytest.mark.parametrize("N", [65_536, 70_000])
def test_batches_longer_than_a_grid_dimension(N):
    hidden, weight = torch.randn(N, 64).bfloat16(), torch.randn(1000, 64).bfloat16()
    target = torch.randint(0, 1000, (N,))
    ours = linear_logprob(hidden, weight, target)[0]
    torch.testing.assert_close(ours, linear_logprob(hidden, weight, target, triton=False)[0], rtol=0, atol=1e-4)
    w = torch.full((N,), 1 / N)
    found = policy_loss(TokenLoss(), ours, ours - 0.1, torch.randn(N), w)
    assert found.named()["policy_kl"].item() == pytest.approx(-0.1 * N, rel=1e-3)


def test_the_gradient_over_its_own_logits_has_no_race():
    """Written over what is read, half as wide: many rows, many times, against a gradient beside it."""
    N, V = 528, 151_936
    logits, target = 4 * torch.randn(N, V), torch.randint(0, V, (N,))
    logprobs, lse = torch.empty(2, N)
    row_forward(logits, target, 1.0, logprobs, lse, None)
    dlogprobs = torch.randn(N)
    expected = (torch.nn.functional.one_hot(target, V) - (logits - lse[:, None]).exp()) * dlogprobs[:, None]
    for _ in range(50):
        z = logits.clone()
        dz = row_gradient(z, target, 1.0, lse, None, dlogprobs, None, None, dtype=torch.bfloat16)
        torch.testing.assert_close(dz.float(), expected, rtol=2**-7, atol=1e-6)


@pytest.fixture
def row_kernel():
    if not has_clusters():
        pytest.skip("a row of logits is read once by a cluster of blocks, which needs compute capability 9.0")
    return CompiledRowKernel()


@pytest.mark.parametrize("V", [32_000, 128_256, 151_936, 262_144])
def test_a_row_that_is_read_once_has_no_race_and_gives_what_two_readings_give(V, row_kernel):
    """Blocks of a cluster write where others have read: many rows, many times."""
    N = 1056
    logits, target = 4 * torch.randn(N, V), torch.randint(0, V, (N,))
    vectors = TokenVectors(torch.randn(N), torch.full((N,), 1 / N), -9 + torch.randn(N), None)
    logprobs, entropy, lse = torch.empty(3, N)
    row_forward(logits, target, 1.0, logprobs, lse, entropy)
    token = policy_loss(TokenLoss(), logprobs, vectors.old_logprobs, vectors.advantage, vectors.w)
    expected = (torch.nn.functional.one_hot(target, V) - (logits - lse[:, None]).exp_()) * token.coef[:, None]
    how = dict(dtype=torch.bfloat16, logit_map=LogitMap())
    for _ in range(20):
        z, own = logits.clone(), torch.empty(2, N)
        dz, stats = row_once(row_kernel, TokenLoss(), z, target, 1.0, vectors, *own, **how)
        torch.testing.assert_close(own[0], logprobs, rtol=0, atol=2e-5)
        torch.testing.assert_close(own[1], entropy, rtol=0, atol=2e-5)
        torch.testing.assert_close(stats.sum(dim=0), token.stats, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dz.float(), expected, rtol=2**-7, atol=1e-9)


def test_rows_read_once_beyond_what_int32_counts(row_kernel):
    N, V = 14_400, 151_936
    logits, target = torch.zeros(N, V), torch.randint(0, V, (N,))
    logits[torch.arange(N), target] = 8.0
    own, vectors = torch.empty(2, N), TokenVectors(torch.ones(N), torch.ones(N))
    how = dict(dtype=torch.bfloat16, logit_map=LogitMap())
    dz, _ = row_once(row_kernel, TokenLoss(), logits, target, 1.0, vectors, *own, **how)
    lse = torch.logsumexp(torch.cat([torch.zeros(V - 1), torch.tensor([8.0])]).double(), 0).item()
    torch.testing.assert_close(own[0], torch.full((N,), 8.0 - lse), rtol=1e-6, atol=2e-5)
    last, p = dz[-1].float(), math.exp(8.0 - lse)  # on-policy with A = 1: minus the gradient of the log-probability
    assert last[target[-1]].item() == pytest.approx(p - 1, rel=1e-2)
    assert (last.sum() - last[target[-1]]).item() == pytest.approx(1 - p, rel=1e-2)


def test_two_runs_agree_to_the_bit():
    N, H, V = 5000, 1536, 151_936
    hidden, weight = torch.randn(N, H).bfloat16(), (torch.randn(V, H) * 2 * H**-0.5).bfloat16()
    target = torch.randint(0, V, (N,))
    old = linear_logprob(hidden, weight, target)[0] + 0.1 * torch.randn(N)
    vectors = TokenVectors(torch.randn(N), torch.full((N,), 1 / N), old)
    first, again = (linear_policy_loss(TokenLoss(entropy=0.01), hidden, weight, target, vectors) for _ in range(2))
    for name in ("loss", "logprobs", "entropy", "hidden_grad", "stats", "weight_grad"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name


@pytest.mark.parametrize("N", [1, 1000, 16_384, 1_000_000])
def test_losses_of_tokens_at_every_length(N):
    logp, old, advantage = -torch.rand(N), -torch.rand(N), torch.randn(N)
    w = (torch.rand(N) > 0.2) / N
    ours = policy_loss(TokenLoss(), logp, old, advantage, w)
    truth = policy_loss_ref(TokenLoss(), logp.double(), old.double(), advantage, w)
    assert ours.loss.item() == pytest.approx(truth.loss.item(), rel=1e-4, abs=1e-7)
