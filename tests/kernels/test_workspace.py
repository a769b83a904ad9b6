"""One workspace for call after call: its memory, and that no call reads what another has left in it."""

import pytest
import torch

from fastrl.kernels import linear_logprob as chunks
from fastrl.kernels import rows
from fastrl.kernels.linear_logprob import linear_logprob
from fastrl.kernels.linear_policy_loss import TokenVectors, linear_policy_loss
from fastrl.kernels.policy_loss import TokenLoss
from fastrl.kernels.workspace import Workspace

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H, V = 16, 300
WIDTH = 304  # a row of logits, a multiple of 16 floats
CHUNK = 4


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ROWS", CHUNK)
    monkeypatch.setattr(rows, "SLAB_ROWS", CHUNK)  # a slab is no larger than a chunk
    if DEVICE == "cpu":
        monkeypatch.setattr(rows, "BLOCK_V", 256)


def head(N, seed):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, target = torch.randn(N, H, generator=g), torch.randn(V, H, generator=g), torch.arange(N) * 7
    return [x.to(DEVICE) for x in (hidden, weight, target)]


def fused(N, seed, workspace):
    hidden, weight, target = head(N, seed)
    out = linear_policy_loss(
        TokenLoss(), hidden, weight, target, TokenVectors(*torch.ones(2, N, device=DEVICE)), triton=True,
        workspace=workspace,
    )  # fmt: skip
    return out.loss, out.logprobs, out.hidden_grad, out.weight_grad


def forward(N, seed, workspace):
    """-> log-probabilities whose backward is still to come, and the leaves."""
    hidden, weight, target = head(N, seed)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    return linear_logprob(*leaves, target, triton=True, workspace=workspace)[0], leaves


def backward(logprobs, leaves):
    logprobs.sum().backward()
    return logprobs.detach(), *(leaf.grad for leaf in leaves)


def equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_every_microbatch_takes_the_memory_of_the_first():
    workspace = Workspace()
    first = fused(9, 0, workspace)
    memory = workspace.memory
    assert memory.numel() == CHUNK * WIDTH and memory.dtype == torch.float32
    for N, seed in ((9, 1), (1, 2), (3, 3)):
        memory.fill_(float("nan"))
        assert equal(fused(N, seed, workspace), fused(N, seed, None))
        assert equal(backward(*forward(N, seed, workspace)), backward(*forward(N, seed, None)))
    assert workspace.memory is memory and equal(first, fused(9, 0, None))


def test_a_backward_takes_it_after_others_did():
    workspace = Workspace()
    one, two = forward(9, 0, workspace), forward(6, 1, workspace)
    fused(9, 2, workspace)
    assert equal(backward(*one), backward(*forward(9, 0, None)))
    assert equal(backward(*two), backward(*forward(6, 1, None)))


def test_it_grows_with_one_memory_at_a_time_and_is_gone_when_released(monkeypatch):
    workspace = Workspace()
    fused(2, 0, workspace)
    assert workspace.memory.numel() == 2 * WIDTH
    empty, held = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *a, **k: held.append(workspace.memory) or empty(*a, **k))
    fused(4, 0, workspace)
    monkeypatch.undo()
    assert None in held, "the smaller one was still there when the larger one was made"
    assert workspace.memory.numel() == 4 * WIDTH
    workspace.release()
    assert workspace.memory is None
    assert equal(fused(4, 0, workspace), fused(4, 0, None)) and workspace.memory is not None
