"""Log-probabilities from hidden states and the head: against float64, by hand, and at the edges of chunks and ids."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl.kernels import linear_logprob as module
from fastrl.kernels import rows as kernels
from fastrl.kernels.linear_logprob import linear_logprob, linear_logprob_ref
from support.device import COMPILED, DEVICE

H = 16
NAMES = ("logprobs", "entropy", "lse")
UPSTREAMS = [("logprobs",), ("entropy",), ("lse",), NAMES]
PATHS = pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks that a small vocabulary fills, more than once; and every tensor on the GPU, where there is one."""
    if not COMPILED:
        monkeypatch.setattr(kernels, "BLOCK_V", 256)
    with torch.device(DEVICE):
        yield


def inputs(N, V, dtype=torch.float64, seed=0):
    """hidden [N, H], weight [V, H], target [N], one upstream gradient [N] per output; logits are of size 1 to 10."""
    g = torch.Generator("cpu").manual_seed(seed)
    with torch.device("cpu"):
        hidden = torch.randn(N, H, generator=g, dtype=torch.float64).to(dtype)
        weight = torch.randn(V, H, generator=g, dtype=torch.float64).to(dtype)
        target = torch.randint(0, V, (N,), generator=g)
        upstream = {name: torch.randn(N, generator=g, dtype=torch.float64).to(DEVICE) for name in NAMES}
    return hidden.to(DEVICE), weight.to(DEVICE), target.to(DEVICE), upstream


def run(function, hidden, weight, target, upstream, **options):
    """Outputs, then gradients to hidden and weight, of sum over outputs of (output * upstream)."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    outputs = dict(zip(NAMES, function(hidden, weight, target, **options), strict=True))
    outputs = {name: value for name, value in outputs.items() if value is not None}
    loss = sum((outputs[name] * up.to(outputs[name].dtype)).sum() for name, up in upstream.items())
    loss.backward()
    return {name: value.detach() for name, value in outputs.items()} | {"dhidden": hidden.grad, "dweight": weight.grad}


def plain(hidden, weight, target, *, inv_temperature=1.0, need_entropy=False):
    """What one writes in torch: logits in the dtype of the model."""
    logits = (hidden @ weight.T * inv_temperature).to(torch.promote_types(hidden.dtype, torch.float32))
    logp = logits.log_softmax(dim=-1)
    entropy = -(logp.exp() * logp).sum(dim=-1) if need_entropy else None
    return logp.gather(-1, target[:, None]).squeeze(-1), entropy, logits.logsumexp(dim=-1)


def ulp(value, dtype):
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(value)) if value else 0.0


def assert_as_good(ours, theirs, truth):
    """|ours - truth| <= 2 |theirs - truth| + 4 ulp(max), max of the tensor and of the log-probabilities behind it."""
    largest = truth["logprobs"].abs().max().item() if len(truth["logprobs"]) else 0.0
    for name, true in truth.items():
        if true.numel() == 0:
            assert ours[name].shape == true.shape
            continue
        allowed = 4 * ulp(max(true.abs().max().item(), largest), ours[name].dtype)
        allowed += 2 * (theirs[name].double() - true).abs().max().item()
        error = (ours[name].double() - true).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [0, 1, 5])
@pytest.mark.parametrize("V", [1, 7, 256, 1003, 1025])
def test_is_as_exact_as_torch(V, N, dtype, triton):
    hidden, weight, target, upstream = inputs(N, V, dtype, seed=V + N)
    for names in UPSTREAMS:
        some = {name: upstream[name] for name in names}
        options = dict(inv_temperature=0.75, need_entropy="entropy" in names)
        truth = run(linear_logprob_ref, hidden.double(), weight.double(), target, some, **options)
        ours = run(linear_logprob, hidden, weight, target, some, **options, triton=triton)
        assert_as_good(ours, run(plain, hidden, weight, target, some, **options), truth)
        assert ("entropy" in ours) == ("entropy" in names)
        assert {ours[name].dtype for name in names} == {torch.float32}
        assert ours["dhidden"].dtype == ours["dweight"].dtype == dtype


@PATHS
def test_bfloat16_products_are_not_rounded(triton):
    # bfloat16 logits of size 10 are off by up to 2^-5; the 8 bits of the inputs are no error
    hidden, weight, target, upstream = inputs(5, 1003, torch.bfloat16)
    truth = run(linear_logprob_ref, hidden.double(), weight.double(), target, upstream, need_entropy=True)
    ours = run(linear_logprob, hidden, weight, target, upstream, need_entropy=True, triton=triton)
    for name in NAMES:
        assert (ours[name].double() - truth[name]).abs().max() < 2e-5
    for name in ("dhidden", "dweight"):
        assert (ours[name].double() - truth[name]).norm() < 6e-3 * truth[name].norm()


def test_definition_is_log_softmax():
    hidden, weight, target, _ = inputs(5, 7)
    logprobs, entropy, lse = linear_logprob_ref(hidden, weight, target, inv_temperature=0.5, need_entropy=True)
    logits = [[sum(h * w for h, w in zip(x, y, strict=True)) / 2 for y in weight.tolist()] for x in hidden.tolist()]
    for n, z in enumerate(logits):
        total = sum(math.exp(v) for v in z)
        p = [math.exp(v) / total for v in z]
        assert lse[n].item() == pytest.approx(math.log(total), rel=1e-12)
        assert logprobs[n].item() == pytest.approx(math.log(p[target[n]]), rel=1e-12)
        assert entropy[n].item() == pytest.approx(-sum(q * math.log(q) for q in p), rel=1e-12)


@pytest.mark.parametrize("function", [linear_logprob, linear_logprob_ref])
def test_three_words_by_hand(function):
    # logits 0, ln 2, ln 5: p = 1/8, 2/8, 5/8, lse = ln 8
    ln2, ln5 = math.log(2), math.log(5)
    hidden, weight = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[0.0], [ln2], [ln5]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    ours = run(function, hidden, weight, torch.tensor([2]), {"logprobs": one}, need_entropy=True)
    assert ours["lse"].item() == pytest.approx(3 * ln2)
    assert ours["logprobs"].item() == pytest.approx(ln5 - 3 * ln2)
    assert ours["entropy"].item() == pytest.approx(3 * ln2 - (2 * ln2 + 5 * ln5) / 8)
    # dz = 1[target] - p
    assert ours["dweight"].flatten().tolist() == pytest.approx([-1 / 8, -2 / 8, 3 / 8])
    assert ours["dhidden"].item() == pytest.approx(-2 / 8 * ln2 + 3 / 8 * ln5)
    dlse = run(function, hidden, weight, torch.tensor([2]), {"lse": one})
    assert dlse["dweight"].flatten().tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    # dH = -p (log p + H)
    dentropy = run(function, hidden, weight, torch.tensor([2]), {"entropy": one}, need_entropy=True)
    H_, p = ours["entropy"].item(), (1 / 8, 2 / 8, 5 / 8)
    assert dentropy["dweight"].flatten().tolist() == pytest.approx([-q * (math.log(q) + H_) for q in p])


@pytest.mark.parametrize("need_entropy", [False, True])
def test_gradients_are_finite_differences(need_entropy):
    hidden, weight, target, _ = inputs(3, 7)

    def outputs(h, w):
        values = linear_logprob(h, w, target, inv_temperature=0.8, need_entropy=need_entropy)
        return tuple(v for v in values if v is not None)

    assert torch.autograd.gradcheck(outputs, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing(monkeypatch, rows, dtype):
    hidden, weight, target, upstream = inputs(5, 7, dtype)
    whole = run(linear_logprob, hidden, weight, target, upstream, need_entropy=True)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", rows * 7 + 6)  # 6 spare elements are no row
    bounds = {1: [0, 1, 2, 3, 4], 2: [0, 2, 4], 3: [0, 3]}[rows]
    assert [(s.start, s.stop) for s in module.TorchChunks(hidden, weight)] == [(b, min(b + rows, 5)) for b in bounds]
    cut = run(linear_logprob, hidden, weight, target, upstream, need_entropy=True)
    for name, value in whole.items():
        close = 1e-6 if value.dtype == torch.float32 else 2**-7  # one rounding to bfloat16
        torch.testing.assert_close(cut[name], value, rtol=close, atol=close)


def test_a_row_larger_than_a_chunk_is_a_chunk(monkeypatch):
    hidden, weight, target, _ = inputs(2, 7, torch.float32)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 3)
    expected = linear_logprob_ref(hidden, weight, target)[0]
    torch.testing.assert_close(linear_logprob(hidden, weight, target)[0], expected)


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor) and value.is_floating_point():  # the interpreter copies bytes
                self.numel = max(self.numel, value.numel())
        return out


def test_no_tensor_of_tokens_times_vocabulary(monkeypatch):
    N, V, rows = 40, 64, 20
    hidden, weight, target, upstream = inputs(N, V, torch.float32)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", rows * V)
    with Largest() as ours:
        run(linear_logprob, hidden, weight, target, upstream, need_entropy=True, triton=False)
    with Largest() as reference:
        run(linear_logprob_ref, hidden, weight, target, upstream, need_entropy=True)
    assert (ours.numel, reference.numel) == (rows * V, N * V)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [-120.0, -20.0, 120.0, 300.0])
def test_shifted_logits(shift, dtype, triton):
    # one more hidden unit of 1 whose weight is the shift: exp(120) overflows float32 and exp(-120) underflows
    hidden, weight, target, upstream = inputs(5, 1003, dtype)
    shifted = (
        torch.cat([hidden, torch.ones(5, 1, dtype=dtype)], 1),
        torch.cat([weight, torch.full((1003, 1), shift, dtype=dtype)], 1),
    )
    upstream.pop("lse")
    base = run(linear_logprob_ref, hidden.double(), weight.double(), target, upstream, need_entropy=True)
    ours = run(linear_logprob, *shifted, target, upstream, need_entropy=True, triton=triton)
    base["lse"] += shift
    for name in NAMES:
        assert (ours[name].double() - base[name]).abs().max() < 16 * ulp(max(120, shift), torch.float32)
    for name, rel in (("dhidden", 3e-5), ("dweight", 3e-5)):
        got, want = ours[name][:, :H].double(), base[name]
        assert (got - want).norm() < (rel if dtype == torch.float32 else 6e-3) * want.norm()


def test_temperature():
    hidden, weight, target, upstream = inputs(5, 7, torch.float32)
    half = run(linear_logprob, hidden, weight, target, upstream, need_entropy=True, inv_temperature=2.0)
    twice = run(linear_logprob, 2 * hidden, weight, target, upstream, need_entropy=True)
    for name in (*NAMES, "dweight"):  # powers of two are exact
        assert torch.equal(half[name], twice[name])
    assert torch.equal(half["dhidden"], 2 * twice["dhidden"])
    for temperature in (0.3, 1.7):
        options = dict(inv_temperature=1 / temperature, need_entropy=True)
        truth = run(plain, hidden.double(), weight.double(), target, upstream, **options)
        theirs = run(plain, hidden, weight, target, upstream, **options)
        assert_as_good(run(linear_logprob, hidden, weight, target, upstream, **options), theirs, truth)


@PATHS
def test_extreme_distributions(triton):
    # equal logits: entropy ln V, and its gradient is zero
    up = {"entropy": torch.tensor([1.5])}
    equal = run(
        linear_logprob,
        torch.ones(1, 2),
        torch.full((7, 2), 3.0),
        torch.tensor([4]),
        up,
        need_entropy=True,
        triton=triton,
    )
    assert equal["entropy"].item() == pytest.approx(math.log(7), rel=1e-6)
    assert equal["logprobs"].item() == pytest.approx(-math.log(7), rel=1e-6)
    assert equal["dhidden"].abs().max() < 1e-5  # 7 terms of size 1.5 * 3 that cancel
    # one logit 1e4 above the rest: certain, no gradient
    sure = run(
        linear_logprob,
        torch.ones(1, 2),
        torch.tensor([[0.0, 0.0], [1e4, 0.0], [-1.0, 0.5]]),
        torch.tensor([1]),
        {name: torch.tensor([1.5]) for name in ("logprobs", "entropy")},
        need_entropy=True,
        triton=triton,
    )
    assert (sure["logprobs"].item(), sure["entropy"].item(), sure["lse"].item()) == (0.0, 0.0, 1e4)
    assert not sure["dhidden"].any() and not sure["dweight"].any()


@PATHS
def test_a_broken_row_stays_alone(triton):
    hidden, weight, target, upstream = inputs(5, 7, torch.float32)
    good = run(linear_logprob, hidden, weight, target, upstream, need_entropy=True, triton=triton)
    hidden[2, 3] = math.nan
    bad = run(linear_logprob, hidden, weight, target, upstream, need_entropy=True, triton=triton)
    others = torch.tensor([0, 1, 3, 4])
    for name in (*NAMES, "dhidden"):
        assert torch.equal(bad[name][others], good[name][others])
        assert bad[name][2].isnan().all()


def test_order_of_rows_changes_nothing():
    hidden, weight, target, upstream = inputs(5, 7, torch.float32)
    order = torch.tensor([3, 0, 4, 2, 1])
    given = run(linear_logprob, hidden, weight, target, upstream, need_entropy=True)
    moved = run(
        linear_logprob,
        hidden[order],
        weight,
        target[order],
        {name: up[order] for name, up in upstream.items()},
        need_entropy=True,
    )
    for name in (*NAMES, "dhidden"):
        torch.testing.assert_close(moved[name], given[name][order], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved["dweight"], given["dweight"], rtol=1e-5, atol=1e-6)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_grad_is_added_to_in_place(dtype, triton):
    hidden, weight, target, upstream = inputs(5, 7, dtype)
    truth = run(linear_logprob_ref, hidden.double(), weight.double(), target, upstream, need_entropy=True)
    padded = torch.cat([weight, torch.full((3, H), 9.0, dtype=dtype)]).requires_grad_()  # padding would dominate
    buffer = torch.cat([torch.zeros(7, H), torch.full((3, H), 0.25)])
    for times in (1, 2):
        h = hidden.clone().requires_grad_()
        outputs = linear_logprob(h, padded[:7], target, need_entropy=True, weight_grad=buffer[:7], triton=triton)
        sum((o * up.float()).sum() for o, up in zip(outputs, upstream.values(), strict=True)).backward()
        # the sum is float32; of bfloat16 weights only dz is rounded, by the kernel and where the product needs it
        rounds = dtype == torch.bfloat16 and (triton or DEVICE == "cuda")
        bound = 6e-3 * times if rounds else 1e-5
        assert (buffer[:7].double() - times * truth["dweight"]).norm() < bound * truth["dweight"].norm()
        assert (h.grad.double() - truth["dhidden"]).norm() < 6e-3 * truth["dhidden"].norm()
    assert (buffer[7:] == 0.25).all()
    assert padded.grad is None or not padded.grad.any()  # nothing travelled through autograd


@pytest.mark.parametrize("bad", [7, 12, -1, -100])
@pytest.mark.skipif(COMPILED, reason="torch's device assertion ends the process")
def test_target_outside_the_vocabulary_is_never_a_number(bad):
    weight = inputs(5, 16, torch.float32)[1][:7]  # a slice of a padded head: row 12 exists in memory
    hidden = inputs(5, 7, torch.float32)[0]
    with pytest.raises((IndexError, RuntimeError), match=f"{bad} is out of bounds"):
        linear_logprob(hidden, weight, torch.tensor([0, 1, bad, 2, 3]), triton=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: {"hidden": torch.ones(2, 3, 4)}, r"expects hidden \[N, H\].*got \(2, 3, 4\), \(7, 4\) and \(2,\)"),
        (lambda: {"weight": torch.ones(7, 5)}, r"got \(2, 4\), \(7, 5\) and \(2,\)"),
        (lambda: {"target": torch.tensor([1])}, r"got \(2, 4\), \(7, 4\) and \(1,\)"),
        (lambda: {"target": torch.tensor([[1], [2]])}, r"and \(2, 1\)"),
        (
            lambda: {"weight": torch.ones(7, 4).bfloat16()},
            r"one dtype, got hidden torch.float32 and weight torch.bfloat16",
        ),
        (lambda: {"weight_grad": torch.ones(6, 4)}, r"weight_grad is \(6, 4\) on [\w:]+ but weight is \(7, 4\)"),
        (lambda: {"target": torch.ones(2)}, "target must be int32 or int64, got torch.float32"),
        (lambda: {"hidden": torch.ones(4, 4)[::2]}, r"hidden must be contiguous, got strides \(8, 1\) of \(2, 4\)"),
        (lambda: {"weight": torch.ones(4, 7).T}, r"weight must be contiguous, got strides \(1, 7\) of \(7, 4\)"),
        (lambda: {"weight_grad": torch.ones(4, 7).T}, r"weight_grad must be contiguous, got strides \(1, 7\)"),
        (lambda: {"inv_temperature": torch.ones(3)}, r"inv_temperature must be a number or \[2\] on .*, got \(3,\)"),
        (
            lambda: {"weight": torch.ones(29)[1:].view(7, 4), "triton": True},
            "weight must start at a multiple of 16 bytes, got 4",
        ),
        (
            lambda: {"hidden": torch.ones(9)[1:].view(2, 4), "triton": True},
            "hidden must start at a multiple of 16 bytes, got 4",
        ),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    good = {"hidden": torch.ones(2, 4), "weight": torch.ones(7, 4), "target": torch.tensor([1, 2])}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**(good | change()))


@PATHS
def test_temperature_of_each_token(triton):
    hidden, weight, target, upstream = inputs(5, 300, torch.float32)
    inv_temperature = torch.tensor([1 / 0.3, 1.0, 0.5, 2.0, 0.7])
    truth = run(
        linear_logprob_ref,
        hidden.double(),
        weight.double(),
        target,
        upstream,
        need_entropy=True,
        inv_temperature=inv_temperature.double(),
    )
    ours = run(
        linear_logprob,
        hidden,
        weight,
        target,
        upstream,
        need_entropy=True,
        inv_temperature=inv_temperature,
        triton=triton,
    )
    for name in NAMES:
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=1e-6, atol=2e-5)
    for name in ("dhidden", "dweight"):
        assert (ours[name].double() - truth[name]).norm() < 2e-6 * truth[name].norm()
    alone = run(
        linear_logprob,
        hidden[2:3],
        weight,
        target[2:3],
        {n: u[2:3] for n, u in upstream.items()},
        need_entropy=True,
        inv_temperature=0.5,
        triton=triton,
    )
    torch.testing.assert_close(ours["dhidden"][2:3], alone["dhidden"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [7, 12, 17, -1])  # 12: its own padding; 17: the next row
def test_the_kernel_has_nan_for_an_id_that_is_no_word(bad):
    weight = inputs(5, 16, torch.float32)[1][:7]  # a slice of a padded head: row 12 exists in memory
    hidden = inputs(5, 7, torch.float32)[0]
    logprobs, _, lse = linear_logprob(hidden, weight, torch.tensor([0, 1, bad, 2, 3]), triton=True)
    assert logprobs.isnan().tolist() == [False, False, True, False, False] and lse.isfinite().all()


def test_chunks_of_the_kernels_change_nothing(monkeypatch):
    hidden, weight, target, upstream = inputs(5, 300, torch.bfloat16)
    whole = run(linear_logprob, hidden, weight, target, upstream, need_entropy=True, triton=True)
    for rows in (1, 2, 5, 9):
        monkeypatch.setattr(module, "CHUNK_ROWS", rows)
        cut = run(linear_logprob, hidden, weight, target, upstream, need_entropy=True, triton=True)
        for name in NAMES:
            torch.testing.assert_close(cut[name], whole[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(cut["dhidden"], whole["dhidden"], rtol=2**-7, atol=2**-7)


@pytest.fixture
def slabs(monkeypatch):
    """Slabs of 64 words, for three rows at a time."""
    for name, value in (("SLAB_ROWS", 3), ("SLAB_WORDS", 64), ("SLAB_ELEMENTS", 3 * 64)):
        monkeypatch.setattr(kernels, name, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N, V", [(1, 64), (3, 65), (7, 1003), (8, 1024)])
def test_a_vocabulary_in_slabs_is_one(slabs, N, V, dtype):
    hidden, weight, target, _ = inputs(N, V, dtype, seed=V)
    inv_temperature = torch.linspace(0.5, 3.0, N)
    truth = linear_logprob_ref(
        hidden.double(), weight.double(), target, inv_temperature=inv_temperature.double(), need_entropy=True
    )
    some = dict(inv_temperature=inv_temperature, triton=True)
    ours = linear_logprob(hidden, weight, target, need_entropy=True, **some)
    for found, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-6, atol=2e-5)
    plain = linear_logprob(hidden, weight, target.int(), **some)
    assert torch.equal(plain[0], ours[0]) and torch.equal(plain[2], ours[2]) and plain[1] is None


def test_slabs_of_nothing_but_minus_infinity(slabs):
    """Words that cannot be, in the first slab, in the last, and in all but one."""
    hidden, weight, target, _ = inputs(3, 200, torch.float32)
    hidden, target = hidden.abs() + 0.1, target.clamp(max=63)
    for dead in (slice(64, 128), slice(128, 200), slice(64, 200), slice(0, 64)):
        some = weight.clone()
        some[dead] = -math.inf
        want = linear_logprob_ref(hidden.double(), some.double(), target)[2]
        logprobs, entropy, lse = linear_logprob(hidden, some, target, need_entropy=True, triton=True)
        torch.testing.assert_close(lse.double(), want, rtol=1e-6, atol=2e-5)
        assert entropy.isfinite().all() and (entropy > 0).all()
        assert (logprobs == -math.inf).all() if dead.start == 0 else logprobs.isfinite().all()
    hidden[1, 0] = math.nan
    found = linear_logprob(hidden, weight, target, need_entropy=True, triton=True)
    assert all(x.isnan().tolist() == [False, True, False] for x in found)
    bad = torch.tensor([200, -1, 1 << 20])
    assert linear_logprob(hidden, weight, bad, triton=True)[0].isnan().all()


def test_slabs_take_little_memory(slabs):
    hidden, weight, target, _ = inputs(7, 1000, torch.float32)
    with Largest() as made:
        linear_logprob(hidden, weight, target, triton=True)
    assert made.numel <= 192 * H  # a view of the weight: the last row alone takes 192 words; of logits there are 192


def test_few_rows_take_wide_slabs(monkeypatch):
    hidden, weight, target, _ = inputs(2, 1000, torch.float32)
    widths = []
    forward = kernels.row_forward
    monkeypatch.setattr(kernels, "row_forward", lambda z, *a, **k: widths.append(z.shape[1]) or forward(z, *a, **k))
    monkeypatch.setattr(kernels, "SLAB_WORDS", 64)
    for elements, wanted in ((10**9, [1000]), (2 * 650, [640, 360]), (1, [64] * 15 + [40])):
        widths.clear()
        monkeypatch.setattr(kernels, "SLAB_ELEMENTS", elements)
        linear_logprob(hidden, weight, target, triton=True)
        assert widths == wanted
