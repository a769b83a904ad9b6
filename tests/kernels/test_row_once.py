"""The kernel that reads a row of logits once against those that read it twice, on rows that are no ordinary ones."""

import math
import re
import shutil

import pytest
import torch

from fastrl.kernels import rows
from fastrl.kernels.linear_policy_loss import TokenVectors, linear_policy_loss, of_tokens
from fastrl.kernels.logit_map import PLAIN, LogitMap
from fastrl.kernels.policy_loss import TokenLoss, policy_loss
from fastrl.kernels.row_once import BLOCKS, THREADS, VECTOR, row_once
from fastrl.kernels.rows import row_forward, row_gradient
from support import aot
from support.host_kernels import HostRowKernel, row_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = math.inf, math.nan
V, WIDTH = 301, 304
# what a row of random logits becomes before the kernel sees it; word 7 is the target
ROWS = {
    "as it is": lambda z: z,
    "equal": lambda z: z.fill_(2.5),
    "certain": lambda z: z.index_fill_(0, torch.tensor(7), 1e4),
    "never": lambda z: z.index_fill_(0, torch.tensor(7), -1e4),
    "some -inf": lambda z: z.index_fill_(0, torch.arange(20, 290), -INF),
    "a target of -inf": lambda z: z.index_fill_(0, torch.tensor(7), -INF),
    "nothing but -inf": lambda z: z.fill_(-INF),
    "NaN": lambda z: z.index_fill_(0, torch.tensor(100), NAN),
    "a target of NaN": lambda z: z.index_fill_(0, torch.tensor(7), NAN),
    "inf": lambda z: z.index_fill_(0, torch.tensor(100), INF),
    "far below": lambda z: z.sub_(3e4),
    "far above": lambda z: z.add_(3e4),
    "huge": lambda z: z.mul_(1e36),
}
MAPS = {"plain": PLAIN, "softcap": LogitMap(softcap=4.0), "scale": LogitMap(scale=0.25)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(rows, "BLOCK_V", 256)


def made(name, seed=0):
    z = torch.full((3, WIDTH), NAN)  # what lies beyond the vocabulary is never looked at
    z[:, :V] = 3 * torch.randn(3, V, generator=torch.Generator().manual_seed(seed))
    ROWS[name](z[1, :V])
    return z.to(DEVICE)[:, :V]


def tokens(w=1.0):
    g = torch.Generator().manual_seed(1)
    old, ref = -4 + torch.randn(2, 3, generator=g)
    return TokenVectors(*(x.to(DEVICE) for x in (torch.tensor([1.5, -0.5, 2.0]), torch.full((3,), w), old, ref)))


def twice(loss, z, vectors, dtype, logit_map, inv_temperature=0.8):
    target = torch.full((3,), 7, device=DEVICE)
    logprobs, lse, entropy = torch.empty(3, 3, device=DEVICE)
    row_forward(z, target, inv_temperature, logprobs, lse, entropy, logit_map=logit_map)
    token = of_tokens(policy_loss, loss, logprobs, vectors, triton=True)
    dentropy = -loss.entropy * vectors.w if loss.entropy else None
    dz = row_gradient(
        z, target, inv_temperature, lse, entropy, token.coef, None, dentropy, dtype=dtype, logit_map=logit_map
    )
    return logprobs, entropy, token.stats, dz.float()


def once(loss, z, vectors, dtype, logit_map, inv_temperature=0.8, kernel=None):
    target = torch.full((3,), 7, device=DEVICE)
    logprobs, entropy = torch.full((2, 3), NAN, device=DEVICE)
    dz, stats = row_once(
        kernel or row_kernel(), loss, z, target, inv_temperature, vectors, logprobs, entropy, dtype=dtype,
        logit_map=logit_map,
    )  # fmt: skip
    return logprobs, entropy, stats.sum(dim=0), dz.float()


@pytest.mark.parametrize("logit_map", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("name", ROWS)
def test_it_gives_what_two_readings_give(name, logit_map):
    for loss, dtype in (
        (TokenLoss(entropy=0.05, kl=0.1), torch.float32),
        (TokenLoss(surrogate="cispo", dual_clip=None), torch.bfloat16),
    ):
        expected = twice(loss, made(name), tokens(), dtype, logit_map)
        found = once(loss, made(name), tokens(), dtype, logit_map)
        size = 3e4 if name.startswith("far") else 1.0  # a logit there has no digits behind the point but two
        for what, ours, theirs in zip(("logprobs", "entropy", "stats"), found, expected, strict=False):
            scale = 1 + theirs.nan_to_num(0, 0, 0).abs().max().item()
            torch.testing.assert_close(
                ours, theirs, rtol=2e-5, atol=2e-5 + 2e-7 * size * scale, equal_nan=True, msg=f"{what} {ours} {theirs}"
            )
        bound = 2**-7 if dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(found[3], expected[3], rtol=bound + 1e-6 * size, atol=1e-6 * size, equal_nan=True)
        assert found[3][[0, 2]].isfinite().all(), "a row's numbers stay in it"


def test_a_token_of_no_weight_may_hold_anything():
    vectors = tokens(w=0.0)._replace(old_logprobs=torch.full((3,), NAN, device=DEVICE))
    logprobs, _, stats, dz = once(TokenLoss(entropy=0.1, kl=0.1), made("as it is"), vectors, torch.float32, PLAIN)
    assert logprobs.isfinite().all() and not stats.any() and not dz.any()


def test_ratios_beyond_the_cap_and_infinite_ones():
    old = torch.tensor([-INF, 200.0, NAN], device=DEVICE)
    for loss in (TokenLoss(), TokenLoss(surrogate="cispo", clip_low=10.0)):
        vectors = tokens()._replace(old_logprobs=old, ref_logprobs=None)
        expected = twice(loss, made("as it is"), vectors, torch.float32, PLAIN)
        found = once(loss, made("as it is"), vectors, torch.float32, PLAIN)
        torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(found[3], expected[3], rtol=1e-5, atol=1e-6)
        assert found[2][5] == 2 and found[2][6] == 1  # capped, not finite


@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
def test_a_reference_that_is_no_number_gives_nothing_and_is_counted(kl_type):
    vectors = tokens()._replace(ref_logprobs=torch.tensor([NAN, -4.0, INF], device=DEVICE))
    loss = TokenLoss(kl=0.1, kl_type=kl_type)
    expected = twice(loss, made("as it is"), vectors, torch.float32, PLAIN)
    found = once(loss, made("as it is"), vectors, torch.float32, PLAIN)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-5)
    assert found[2][6] == 2 and not found[3][[0, 2]].any() and found[3][1].any()


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's cluster has one size")
@pytest.mark.parametrize("threads, blocks", [(32, 1), (32, 8), (128, 2)])
def test_any_cluster_gives_the_same(threads, blocks):
    loss = TokenLoss(entropy=0.05, kl=0.1)
    expected = once(loss, made("as it is"), tokens(), torch.float32, PLAIN)
    found = once(loss, made("as it is"), tokens(), torch.float32, PLAIN, kernel=HostRowKernel(threads, blocks))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled as it is for a GPU already")
def test_a_cluster_of_the_size_of_a_gpu():
    """Three rows over 2048 threads; a group of words is more than the vocabulary."""
    kernel = HostRowKernel(THREADS, BLOCKS)
    assert kernel.group == THREADS * BLOCKS * VECTOR == 16384
    loss = TokenLoss(entropy=0.05, kl=0.1)
    expected = once(loss, made("as it is"), tokens(), torch.float32, PLAIN)
    for ours, theirs in zip(
        once(loss, made("as it is"), tokens(), torch.float32, PLAIN, kernel=kernel), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_it_does_not_take():
    ones = TokenVectors(*torch.ones(2, 3, device=DEVICE))
    head = [torch.ones(3, 16, device=DEVICE), torch.ones(50, 16, device=DEVICE), torch.zeros(3, device=DEVICE).long()]
    kernel = row_kernel()
    with pytest.raises(ValueError, match="row_kernel takes the logits of the Triton path; use triton=True"):
        linear_policy_loss(TokenLoss(), *head, ones, triton=False, row_kernel=kernel)
    halves = [head[0].half(), head[1].half(), head[2]]
    with pytest.raises(ValueError, match="hidden must be torch.bfloat16 or torch.float32, got torch.float16"):
        linear_policy_loss(TokenLoss(), *halves, ones, triton=True, row_kernel=kernel)
    kernel.most_words = 49
    with pytest.raises(ValueError, match="at most 49 words, got 50; leave row_kernel out"):
        linear_policy_loss(TokenLoss(), *head, ones, triton=True, row_kernel=kernel)


@pytest.mark.slow
def test_every_logit_is_read_once_and_before_any_is_written():
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH, so csrc/row_once.cu cannot be compiled")
    text, _ = aot.cuda_sources()["row_once"]
    _, ptx = aot.made_by_nvcc("row_once", text)
    for name, code in ptx.items():
        groups = int(name.split("_")[3])
        *before, after = code.split("barrier.cluster.wait")
        logits = r"ld\.global\.cs\.v4"
        assert len(re.findall(logits, "".join(before))) == 2 * groups and not re.search(logits, after), name
        assert "st.global.v4" in after and not re.search(r"st\.global", "".join(before)), name
