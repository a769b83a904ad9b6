"""What only a GPU can show of the kernels: sizes beyond int32, long batches, races, and runs that agree to the bit."""

import pytest
import torch

from fastrl.kernels.linear_logprob import linear_logprob
from fastrl.kernels.linear_policy_loss import TokenVectors, linear_policy_loss
from fastrl.kernels.policy_loss import TokenLoss, policy_loss, policy_loss_ref
from fastrl.kernels.rows import row_forward, row_gradient
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
