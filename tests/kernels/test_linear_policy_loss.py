"""The head and the loss of tokens in one pass: against float64, both paths, and what rivals got wrong."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl.kernels import linear_logprob as chunks
from fastrl.kernels import rows
from fastrl.kernels.linear_logprob import linear_logprob
from fastrl.kernels.linear_policy_loss import TokenVectors, linear_policy_loss, linear_policy_loss_ref
from fastrl.kernels.logit_map import LogitMap
from fastrl.kernels.policy_loss import STATS, TokenLoss
from support.device import COMPILED, DEVICE
from support.host_kernels import row_kernel

H = 16
REF = dict(ref_logprobs=True, kl=0.1)
SETTINGS = {
    "clip": {}, "dual clip off": dict(dual_clip=None), "cispo": dict(surrogate="cispo"),
    "k3": REF, "k1": REF | dict(kl_type="k1"), "k2": REF | dict(kl_type="k2"), "k3+": REF | dict(kl_type="k3+"),
    "entropy": dict(entropy=0.05), "softcap": dict(logit_map=LogitMap(0.5, 3.0), entropy=0.05, per_token=True),
    "temperature": dict(inv_temperature=1.6, entropy=0.05), "per token": dict(per_token=True, entropy=0.05),
    "on-policy": dict(on_policy=True),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks that a small vocabulary fills, more than once."""
    if not COMPILED:
        monkeypatch.setattr(rows, "BLOCK_V", 256)


KERNELS = pytest.mark.parametrize("path", ["triton", "once"], indirect=True)


@pytest.fixture(params=["torch", "triton", "once"])
def path(request):
    """The arguments that choose one."""
    return dict(triton=request.param != "torch") | (dict(row_kernel=row_kernel()) if request.param == "once" else {})


def problem(N, V, dtype, seed=0, shift=0.0):
    """hidden, weight, target, and the vectors of tokens by name; a fifth of the tokens has weight 0."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g)
    weight = torch.randn(V, H, generator=g) / 2
    hidden[:, 0], weight[:, 0] = 1.0, weight[:, 0] + shift
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    target = torch.randint(0, V, (N,), generator=g)
    logp = (hidden.float() @ weight.float().T).log_softmax(-1).gather(-1, target[:, None])[:, 0]
    vectors = dict(
        advantage=torch.randn(N, generator=g),
        w=(torch.rand(N, generator=g) > 0.2) / max(N, 1),
        old_logprobs=logp + 0.4 * torch.randn(N, generator=g),
        ref_logprobs=logp + 0.4 * torch.randn(N, generator=g),
        per_token=0.5 + torch.rand(N, generator=g),
    )
    return [x.to(DEVICE) for x in (hidden, weight, target)], {k: v.float().to(DEVICE) for k, v in vectors.items()}


def settled(vectors, settings, dtype=torch.float32):
    """The arguments that a row of SETTINGS stands for: a loss, vectors and a temperature."""
    settings, v = dict(settings), {k: v.to(dtype) for k, v in vectors.items()}
    old = None if settings.pop("on_policy", False) else v["old_logprobs"]
    ref = v["ref_logprobs"] if settings.pop("ref_logprobs", False) else None
    scale = v["per_token"] if settings.pop("per_token", False) else settings.pop("inv_temperature", 1.0)
    more = {"logit_map": settings.pop("logit_map")} if "logit_map" in settings else {}
    return more | {
        "loss": TokenLoss(**settings),
        "vectors": TokenVectors(v["advantage"], v["w"], old, ref),
        "inv_temperature": scale,
    }


def run(function, inputs, settings, **more):
    """Loss, logprobs, entropy, stats, and the gradients that backward() leaves in hidden and the weight."""
    hidden, weight, target = inputs
    hidden = hidden.detach().clone().requires_grad_()
    settings = dict(settings)
    out = function(settings.pop("loss"), hidden, weight, target, settings.pop("vectors"), **settings, **more)
    if out.loss.requires_grad:
        out.loss.backward()
        torch.testing.assert_close(hidden.grad, out.hidden_grad, rtol=0, atol=0, equal_nan=True)
    return out


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_paths_are_the_definition(path, settings, dtype, monkeypatch):
    inputs, vectors = problem(7, 1003, dtype)
    truth = run(
        linear_policy_loss_ref,
        [x.double() if x.is_floating_point() else x for x in inputs],
        settled(vectors, settings, torch.float64),
    )
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 3)  # three chunks, the last of one row
    ours = run(linear_policy_loss, inputs, settled(vectors, settings), **path)
    alive = vectors["w"] != 0
    torch.testing.assert_close(ours.logprobs.double(), truth.logprobs, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.entropy.double(), truth.entropy, rtol=0, atol=2e-5)
    assert ours.loss.item() == pytest.approx(truth.loss.item(), rel=2e-5, abs=1e-6)
    bound = 2e-6 if dtype == torch.float32 else 6e-3
    assert distance(ours.hidden_grad, truth.hidden_grad) < bound
    assert distance(ours.weight_grad, truth.weight_grad) < bound
    assert truth.hidden_grad.norm() > 1e-2 and truth.weight_grad.norm() > 1e-2
    assert ours.hidden_grad.dtype == dtype and ours.weight_grad.dtype == torch.float32
    assert not ours.hidden_grad[~alive].any() or settings.get("entropy") is None
    named = dict(zip(STATS, zip(ours.stats.tolist(), truth.stats.tolist(), strict=True), strict=True))
    for name in ("policy_kl", "kl", "clip_low", "clip_high", "capped"):
        assert named[name][0] == pytest.approx(named[name][1], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("V", [1, 2, 127, 255, 256, 257, 1025])
@pytest.mark.parametrize("N", [0, 1, 5])
def test_sizes_around_a_block(path, N, V):
    inputs, vectors = problem(N, V, torch.float32, seed=V)
    vectors["w"] = torch.ones_like(vectors["w"])
    options = settled(vectors, SETTINGS["entropy"])
    truth = run(
        linear_policy_loss_ref,
        [x.double() if x.is_floating_point() else x for x in inputs],
        settled(vectors, SETTINGS["entropy"], torch.float64),
    )
    ours = run(linear_policy_loss, inputs, options, **path)
    torch.testing.assert_close(ours.logprobs.double(), truth.logprobs, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.entropy.double(), truth.entropy, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.hidden_grad.double(), truth.hidden_grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weight_grad.double(), truth.weight_grad, rtol=1e-4, atol=1e-5)


def test_weight_gradients_add_up_in_place_in_float32(path):
    inputs, vectors = problem(8, 300, torch.bfloat16)
    buffer = torch.zeros(320, H, device=DEVICE)  # padded rows beyond the vocabulary
    buffer[300:] = 0.25
    for _ in range(64):
        run(linear_policy_loss, inputs, settled(vectors, {}), **path, weight_grad=buffer[:300])
    truth = run(
        linear_policy_loss_ref,
        [x.double() if x.is_floating_point() else x for x in inputs],
        settled(vectors, {}, torch.float64),
    )
    assert distance(buffer[:300], 64 * truth.weight_grad) < 6e-3
    assert (buffer[300:] == 0.25).all()


def test_chunks_and_order_change_nothing(path, monkeypatch):
    inputs, vectors = problem(9, 300, torch.float32)
    whole = run(linear_policy_loss, inputs, settled(vectors, SETTINGS["entropy"]), **path)
    again = run(linear_policy_loss, inputs, settled(vectors, SETTINGS["entropy"]), **path)
    for name in ("loss", "logprobs", "entropy", "hidden_grad", "weight_grad", "stats"):
        assert torch.equal(getattr(whole, name), getattr(again, name)), name
    with monkeypatch.context() as small:
        small.setattr(chunks, "CHUNK_ROWS", 2)
        cut = run(linear_policy_loss, inputs, settled(vectors, SETTINGS["entropy"]), **path)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    moved = {k: v[order] for k, v in vectors.items()}
    other = run(
        linear_policy_loss, [inputs[0][order], inputs[1], inputs[2][order]], settled(moved, SETTINGS["entropy"]), **path
    )
    for variant, take in ((cut, slice(None)), (other, order)):
        torch.testing.assert_close(variant.logprobs, whole.logprobs[take], rtol=0, atol=1e-6)
        torch.testing.assert_close(variant.hidden_grad, whole.hidden_grad[take], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(variant.weight_grad, whole.weight_grad, rtol=1e-5, atol=1e-6)


def test_one_denominator_makes_accumulation_exact(path):
    """One pass over 8 tokens is four passes over 2, with the same w: the gradient does not depend on the cut."""
    inputs, vectors = problem(8, 300, torch.float32)
    whole = run(linear_policy_loss, inputs, settled(vectors, {}), **path)
    buffer, losses, hidden = torch.zeros(300, H, device=DEVICE), 0.0, []
    for first in range(0, 8, 2):
        part = slice(first, first + 2)
        out = run(
            linear_policy_loss,
            [inputs[0][part], inputs[1], inputs[2][part]],
            settled({k: v[part] for k, v in vectors.items()}, {}),
            **path,
            weight_grad=buffer,
        )
        losses, hidden = losses + out.loss.item(), [*hidden, out.hidden_grad]
    assert losses == pytest.approx(whole.loss.item(), rel=1e-5)
    torch.testing.assert_close(torch.cat(hidden), whole.hidden_grad, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(buffer, whole.weight_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [-20.0, -120.0, 300.0])
def test_shifted_logits(path, dtype, shift):
    inputs, vectors = problem(5, 1003, dtype, shift=shift)
    truth = run(
        linear_policy_loss_ref,
        [x.double() if x.is_floating_point() else x for x in inputs],
        settled(vectors, SETTINGS["entropy"], torch.float64),
    )
    ours = run(linear_policy_loss, inputs, settled(vectors, SETTINGS["entropy"]), **path)
    allowed = 2e-5 + 1e-6 * abs(shift)
    assert (ours.logprobs.double() - truth.logprobs).abs().max() < allowed
    assert (ours.entropy.double() - truth.entropy).abs().max() < allowed
    # the column of the shift is a sum of shift * dz, of which nothing should be left
    bound = 1e-3 if dtype == torch.float32 else 6e-3
    assert distance(ours.hidden_grad[:, 1:], truth.hidden_grad[:, 1:]) < bound
    assert distance(ours.weight_grad, truth.weight_grad) < bound


def test_on_policy_the_ratio_is_one(path):
    inputs, vectors = problem(6, 1003, torch.bfloat16)
    old = linear_logprob(*inputs, triton=path["triton"])[0].detach()
    out = run(linear_policy_loss, inputs, settled(vectors | {"old_logprobs": old}, {}), **path)
    named = dict(zip(STATS, out.stats.tolist(), strict=True))
    assert abs(named["policy_kl"]) < 1e-5 and named["clip_low"] == named["clip_high"] == 0
    on_policy = run(linear_policy_loss, inputs, settled(vectors, dict(on_policy=True)), **path)
    assert distance(out.hidden_grad, on_policy.hidden_grad) < 1e-3


def test_equal_rewards_give_exactly_nothing(path):
    inputs, vectors = problem(5, 300, torch.bfloat16)
    vectors["advantage"] = torch.zeros_like(vectors["advantage"])
    out = run(linear_policy_loss, inputs, settled(vectors, {}), **path)
    assert out.loss == 0 and not out.hidden_grad.any() and not out.weight_grad.any()
    # the entropy has a gradient where the advantage has none, and two runs agree to the bit
    first, again = (run(linear_policy_loss, inputs, settled(vectors, SETTINGS["entropy"]), **path) for _ in range(2))
    assert first.hidden_grad.any() and torch.equal(first.weight_grad, again.weight_grad)


@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_a_ratio_that_overflows(path, log_ratio, advantage):
    inputs, vectors = problem(4, 300, torch.float32)
    logp = linear_logprob(*inputs, triton=path["triton"])[0].detach()
    vectors |= dict(w=torch.ones(4, device=DEVICE), advantage=torch.full((4,), advantage, device=DEVICE))
    vectors["old_logprobs"] = logp - torch.tensor([log_ratio, 0.0, 0.0, 0.0], device=DEVICE)
    out = run(linear_policy_loss, inputs, settled(vectors, {}), **path)
    assert out.hidden_grad.isfinite().all() and out.weight_grad.isfinite().all() and out.loss.isfinite()
    assert not out.hidden_grad[0].any() and (out.hidden_grad[1].any() or advantage == 0)


def test_ignored_tokens_and_an_empty_mask(path):
    inputs, vectors = problem(6, 300, torch.float32)
    hidden, weight, target = inputs
    target = target.clone()
    target[[1, 4]] = torch.tensor([-100, -1], device=DEVICE)
    kept = torch.tensor([0, 2, 3, 5], device=DEVICE)
    vectors["w"] = torch.full((6,), 0.25, device=DEVICE)
    out = run(linear_policy_loss, [hidden, weight, target], settled(vectors, SETTINGS["entropy"]), **path)
    alone = run(
        linear_policy_loss,
        [hidden[kept], weight, target[kept]],
        settled({k: v[kept] for k, v in vectors.items()}, SETTINGS["entropy"]),
        **path,
    )
    assert out.loss.item() == pytest.approx(alone.loss.item(), rel=1e-6)
    torch.testing.assert_close(out.hidden_grad[kept], alone.hidden_grad, rtol=1e-6, atol=1e-7)
    assert not out.hidden_grad[[1, 4]].any() and not out.logprobs[[1, 4]].any() and not out.entropy[[1, 4]].any()
    torch.testing.assert_close(out.weight_grad, alone.weight_grad, rtol=1e-5, atol=1e-6)
    vectors["w"] = torch.zeros(6, device=DEVICE)
    empty = run(linear_policy_loss, inputs, settled(vectors, SETTINGS["entropy"]), **path)
    assert empty.loss == 0 and not empty.hidden_grad.any() and not empty.weight_grad.any()


@KERNELS
@pytest.mark.parametrize("bad", [300, 305])
def test_a_token_beyond_the_vocabulary_is_flagged_and_gives_nothing(path, bad):
    # rows 300 to 319 exist in memory: a kernel that reads them gives a finite, wrong number
    inputs, vectors = problem(4, 320, torch.float32)
    hidden, weight, target = inputs[0], inputs[1][:300], inputs[2].clamp(max=299)
    vectors["w"] = torch.ones(4, device=DEVICE)
    target[2] = bad
    out = run(linear_policy_loss, [hidden, weight, target], settled(vectors, dict(on_policy=True)), **path)
    assert out.stats[STATS.index("nonfinite")] == 1 and out.logprobs[2].isnan()
    assert not out.hidden_grad[2].any() and out.hidden_grad[0].any() and out.loss.isfinite()


class Work(TorchDispatchMode):
    """The largest tensor made, and the types of matrix products."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point():  # the interpreter copies bytes
            self.largest = max(self.largest, out.numel())
        if function._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products.append(function)
        return out


@KERNELS
def test_three_products_a_chunk_and_nothing_of_tokens_times_vocabulary(path, monkeypatch):
    N, V, chunk = 12, 300, 4
    monkeypatch.setattr(chunks, "CHUNK_ROWS", chunk)
    inputs, vectors = problem(N, V, torch.float32)
    buffer = torch.zeros(V, H, device=DEVICE)
    with Work() as work:
        run(linear_policy_loss, inputs, settled(vectors, {}), **path, weight_grad=buffer)
    assert len(work.products) == 3 * N // chunk
    # views of one chunk of logits and of the weight, and no second [V, H]
    assert work.largest <= max(chunk * 304, V * H)


def test_a_scaled_loss_is_refused():
    inputs, vectors = problem(3, 50, torch.float32)
    out = linear_policy_loss(TokenLoss(), inputs[0].requires_grad_(), *inputs[1:], settled(vectors, {})["vectors"])
    if not COMPILED:  # on CUDA the assertion ends the process
        with pytest.raises(RuntimeError, match="the loss must not be scaled; put the factor into w"):
            (2 * out.loss).backward()


ONES = TokenVectors(torch.ones(3), torch.ones(3))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(vectors=ONES._replace(w=torch.ones(4))), r"w must be \[3\] on .*, got \(4,\)"),
        (dict(vectors=ONES._replace(advantage=torch.ones(4))), r"advantage must be .* vector as long as w, \[3\]"),
        (dict(loss=TokenLoss(ratio_level="sequence")), "the ratio of a sequence is not known here"),
        (dict(weight_grad=torch.zeros(50, H).bfloat16()), "weight_grad must be torch.float32, got torch.bfloat16"),
        (dict(weight=torch.ones(50, H).bfloat16()), "expects one dtype, got hidden torch.float32 and weight torch.bfl"),
        (dict(inv_temperature=torch.ones(2)), r"inv_temperature must be a number or \[3\] on cpu, got \(2,\) on cpu"),
        (dict(hidden=torch.ones(6, H)[::2]), r"hidden must be contiguous, got strides \(32, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    head = dict(hidden=torch.ones(3, H), weight=torch.ones(50, H), target=torch.zeros(3).long())
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**{"loss": TokenLoss(), **head, "vectors": ONES} | change)


def test_entropy_is_of_the_scaled_logits(path):
    # two words, logits 0 and ln 4 / 2: at inv_temperature 2 p = 1/5, 4/5
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [math.log(4) / 2]])
    out = linear_policy_loss(
        TokenLoss(),
        hidden.to(DEVICE),
        weight.to(DEVICE),
        torch.tensor([1], device=DEVICE),
        TokenVectors(*torch.ones(2, 1, device=DEVICE)),
        inv_temperature=2.0,
        **path,
    )
    assert out.entropy.item() == pytest.approx(-(0.2 * math.log(0.2) + 0.8 * math.log(0.8)), abs=1e-6)
    # d(-logp)/dz = p - onehot, times the inverse temperature: 2 (0.2, -0.2)
    assert out.weight_grad[:, 0].tolist() == pytest.approx([0.4, -0.4], abs=1e-6)


def test_a_chunk_has_as_many_rows_as_it_says(path, monkeypatch):
    inputs, vectors = problem(9, 300, torch.float32)
    whole = run(linear_policy_loss, inputs, settled(vectors, {}), **path)
    for chunk, products in ((1, 27), (4, 9), (100, 3)):
        monkeypatch.setattr(chunks, "CHUNK_ROWS", chunk)
        with Work() as work:
            cut = run(linear_policy_loss, inputs, settled(vectors, {}), **path)
        # torch spends its logits and makes them twice
        assert len(work.products) == products * (3 if path["triton"] else 4) // 3
        torch.testing.assert_close(cut.logprobs, whole.logprobs, rtol=0, atol=1e-6)
        torch.testing.assert_close(cut.hidden_grad, whole.hidden_grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(cut.weight_grad, whole.weight_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "V, path", [*((V, "triton") for V in (1000, 151_936, 152_064, 262_144)), (151_936, "once")], indirect=["path"]
)
def test_vocabularies_of_real_models(monkeypatch, V, path):
    """With the block of a GPU: 151936 is no multiple of 8192, and 262144 is one."""
    monkeypatch.setattr(rows, "BLOCK_V", 8192)
    inputs, vectors = problem(2, V, torch.float32, seed=1)
    vectors["w"] = torch.ones(2, device=DEVICE)
    truth = run(
        linear_policy_loss_ref,
        [x.double() if x.is_floating_point() else x for x in inputs],
        settled(vectors, SETTINGS["entropy"], torch.float64),
    )
    ours = run(linear_policy_loss, inputs, settled(vectors, SETTINGS["entropy"]), **path)
    torch.testing.assert_close(ours.logprobs.double(), truth.logprobs, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.entropy.double(), truth.entropy, rtol=0, atol=2e-5)
    assert distance(ours.hidden_grad, truth.hidden_grad) < 6e-5  # a float32 sum of up to 262144 products that cancel
    assert distance(ours.weight_grad, truth.weight_grad) < 1e-5


@pytest.mark.parametrize("entropy_coef", [0.0, 0.05])
def test_a_row_that_is_not_a_number_stays_alone_and_is_counted(path, entropy_coef):
    inputs, vectors = problem(5, 300, torch.float32)
    vectors["w"] = torch.ones(5, device=DEVICE)
    settings = settled(vectors, dict(entropy=entropy_coef))
    good = run(linear_policy_loss, inputs, settings, **path)
    inputs[0][2, 3] = math.nan
    bad = run(linear_policy_loss, inputs, settings, **path)
    others = torch.tensor([0, 1, 3, 4], device=DEVICE)
    for name in ("logprobs", "entropy", "hidden_grad"):
        assert torch.equal(getattr(bad, name)[others], getattr(good, name)[others])
    assert bad.logprobs[2].isnan() and bad.loss.isfinite() and bad.stats[STATS.index("nonfinite")] == 1


def test_tied_embeddings_get_the_gradients_of_both_ends(path):
    """The head adds to the buffer in the forward, the embedding in the backward: one buffer, one sum."""
    (_, weight, target), vectors = problem(6, 300, torch.float32)
    words = torch.arange(6, device=DEVICE) * 7
    embedding = weight.clone().requires_grad_()
    embedding.grad = torch.zeros_like(weight)
    hidden = torch.nn.functional.embedding(words, embedding).tanh()
    linear_policy_loss(
        TokenLoss(),
        hidden,
        embedding.detach(),
        target,
        settled(vectors, dict(on_policy=True))["vectors"],
        weight_grad=embedding.grad,
        **path,
    ).loss.backward()
    truth = weight.double().requires_grad_()
    logp = (truth[words].tanh() @ truth.T).log_softmax(-1).gather(-1, target[:, None])[:, 0]
    (-vectors["advantage"] * vectors["w"] * logp).sum().backward()
    assert distance(embedding.grad, truth.grad) < 2e-6
