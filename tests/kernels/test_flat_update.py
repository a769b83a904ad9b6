"""The fast paths of the moves against their definitions: the CUDA source, as far as it can be checked, and its twin."""

import math
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from fastrl.weights import backends, library
from fastrl.weights.halves import join, split
from fastrl.weights.moves import FlatStats, extrapolate_, interpolate_
from support.device import COMPILED, DEVICE

BUILT = COMPILED and library.find() is not None
BACKENDS = [
    "triton",
    pytest.param("cuda", marks=pytest.mark.skipif(not BUILT, reason="needs a GPU and nvcc")),
    pytest.param("nvrtc", marks=pytest.mark.skipif(not COMPILED, reason="needs a GPU")),
]
FAST = pytest.mark.parametrize("backend", BACKENDS)
ALL = pytest.mark.parametrize("backend", ["torch", *BACKENDS])
SOURCE = Path(__file__).parents[2] / "csrc" / "flat_update.cu"
SIZES = [0, 1, 7, 8, 1023, 1024, 1025, 4096 + 5]
NAN, INF = math.nan, math.inf


def vectors(n, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=g).to(DEVICE) for _ in range(count)]


def assert_stats(ours: FlatStats, truth: FlatStats):
    for name, value in truth.named().items():
        assert ours.named()[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


@FAST
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.5, 0.3, 0.8, 1.5, -0.2])
def test_interpolation(backend, alpha, n):
    theta, anchor = vectors(n, 2, seed=n)
    half = torch.full((n,), NAN, dtype=torch.bfloat16, device=DEVICE)
    exact, ours = theta.double(), theta.clone()
    truth = interpolate_(exact, anchor.double(), alpha, backend="torch")
    stats = interpolate_(ours, anchor, alpha, out_bf16=half, backend=backend)
    # one rounding of the difference, one of the product, one of the sum
    assert ((ours.double() - exact).abs() <= 1.2e-7 * (exact.abs() + (theta - anchor).abs())).all()
    if alpha in (0.0, 1.0):
        assert torch.equal(ours, theta if alpha else anchor)
    if COMPILED:
        assert torch.equal(half, ours.bfloat16())
    else:  # Triton's interpreter cuts the low bits off, where the device rounds to nearest
        assert ((half.float() - ours).abs() <= 2**-7 * ours.abs()).all()
    assert_stats(stats, truth)


def extrapolated(theta, anchor, x0, x1, backend, dtype=torch.float32, **options):
    theta, anchor, x0 = (x.to(dtype).clone() for x in (theta, anchor, x0))
    inputs = dict(grads=(x0, x1.to(dtype))) if x1 is not None else dict(u0=x0)
    stats = extrapolate_(theta, anchor, 10, 0.5, **inputs, backend=backend, **options)
    return theta, stats


@FAST
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("displacements", [False, True])
@pytest.mark.parametrize("limits", [False, True])
def test_extrapolation(backend, limits, displacements, n):
    anchor, x0, x1 = vectors(n, 3, seed=n)
    # displacements of two AdamW steps at lr 1e-3, whose directions are of size 1; r on both sides of both clamps
    x1 = x0 * (0.3 + 2 * x1)
    u0 = -1e-3 * x0
    theta = anchor + u0 - 1e-3 * x1
    options = dict(lr=1e-3, weight_decay=0.01) if displacements else {}
    if limits:
        blocks = -(-n // 1024)
        options["segment"] = torch.arange(blocks, device=DEVICE) // 2
        options["threshold"] = torch.linspace(0.1, 1.0, blocks // 2 + 1, device=DEVICE)
    first, second = (u0, None) if displacements else (x0, x1)
    exact, truth = extrapolated(
        theta,
        anchor,
        first,
        second,
        "torch",
        torch.float64,
        **(options | ({"threshold": options["threshold"].double()} if limits else {})),
    )
    plain, _ = extrapolated(theta, anchor, first, second, "torch", **options)
    ours, stats = extrapolated(theta, anchor, first, second, backend, **options)
    if n:
        # no worse than torch in the same precision; float32 displacements are only as exact as ulp(theta) / lr
        error, theirs = (ours.double() - exact).abs().max(), (plain.double() - exact).abs().max()
        assert error <= 2 * theirs + 4 * 1.2e-7 * exact.abs().max()
    if not displacements:
        assert_stats(stats, truth)
    got, want = stats.named(), truth.named()
    assert got["elements"] == n and got["active"] == pytest.approx(want["active"], abs=3)
    if n > 4000:
        assert want["clamped"] > 100 and 0 < want["active"] < n + 1 - limits


@FAST
def test_special_coordinates(backend):
    # r at both clamps, 1, 0, -1; not finite; inactive; a denormal
    g0 = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, NAN, 1.0, INF, 0.0, 1e-9, 1e-40], device=DEVICE)
    g1 = torch.tensor([1.0, 0.0, -1.0, -9.0, 9.0, 0.5, 1.0, NAN, 1.0, 1.0, 1.0, 1e-40], device=DEVICE)
    anchor = torch.zeros(12, device=DEVICE)
    theta = torch.ones(12, device=DEVICE)
    stats = extrapolate_(theta, anchor, 10, 1.0, grads=(g0, g1), backend=backend).named()
    # K = 10: r = 1 -> 5, 0 -> 1, -1 -> 1, -2 -> (1 + 2^10 ...) = S_10(-2) / -1 = 341 -> 6, 3 -> 6, 0.5 -> 1.332
    assert theta.tolist() == pytest.approx([5.0, 1.0, 1.0, 6.0, 6.0, 1.33203125] + [1.0] * 6, rel=1e-6)
    assert (stats["nonfinite"], stats["active"], stats["clamped"]) == (3, 5, 2)
    assert stats["scale"] == pytest.approx(5 + 1 + 1 + 6 + 6 + 1.33203125 + 6, rel=1e-6)


@FAST
def test_two_steps_are_two_steps(backend):
    theta, anchor, g0, g1 = vectors(2048, 4)
    ours = theta.clone()
    extrapolate_(ours, anchor, 2, 1.0, grads=(g0, g1), backend=backend)
    assert torch.equal(ours, theta)
    extrapolate_(ours, anchor, 9, 1.0, u0=g0, lr=0.0, backend=backend)  # lr 0 is neutral: no direction to compare
    assert torch.equal(ours, theta)


@FAST
def test_eight_shards_are_the_whole_bit_for_bit(backend):
    n = 16 * 1024
    theta, anchor, g0, g1 = vectors(n, 4)
    segment, threshold = torch.arange(16, device=DEVICE) // 3, torch.linspace(0.1, 1.0, 6, device=DEVICE)
    whole, shards = theta.clone(), theta.clone()
    options = dict(threshold=threshold, backend=backend)
    stats = extrapolate_(whole, anchor, 5, 0.5, grads=(g0, g1), segment=segment, **options)
    again = theta.clone()
    assert torch.equal(extrapolate_(again, anchor, 5, 0.5, grads=(g0, g1), segment=segment, **options).sums, stats.sums)
    total = 0
    for k in range(8):
        part, blocks = slice(2048 * k, 2048 * (k + 1)), slice(2 * k, 2 * k + 2)
        total += extrapolate_(
            shards[part], anchor[part], 5, 0.5, grads=(g0[part], g1[part]), segment=segment[blocks], **options
        ).sums
    assert torch.equal(shards, whole) and torch.equal(again, whole)
    torch.testing.assert_close(total, stats.sums, rtol=1e-6, atol=0)


@FAST
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, of inf - inf
def test_values_that_are_not_finite_stay_where_they_are(backend):
    theta, anchor = torch.tensor([INF, 1.0, NAN, 2.0], device=DEVICE), torch.zeros(4, device=DEVICE)
    interpolate_(theta, anchor, 0.5, backend=backend)
    assert theta.isfinite().tolist() == [False, True, False, True] and theta[[1, 3]].tolist() == [0.5, 1.0]


def bits(x):
    return x.view(torch.int32)


def update(mode, theta, anchor, x0, x1, alpha, **options):
    if mode == "interpolate":
        return interpolate_(theta, anchor, alpha, **options)
    if mode == "gradients":
        return extrapolate_(theta, anchor, 10, alpha, grads=(x0, x1), **options)
    return extrapolate_(theta, anchor, 10, alpha, u0=x0, lr=0.5, weight_decay=0.01, **options)


@ALL
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("mode", ["interpolate", "gradients", "displacements"])
def test_halves_move_as_the_float32_they_are(mode, n, backend):
    """Bit for bit, wherever the lower half matters: it is all that the move changes in most coordinates here."""
    anchor, x0, x1, step = vectors(n, 4, seed=n)
    whole = anchor * (1 + 1e-4 * step)
    high, low = split(whole)
    stats = update(mode, whole, anchor, x0, x1, 0.3, backend=backend)
    ours = update(mode, high, anchor, x0, x1, 0.3, low=low, backend=backend)
    assert torch.equal(bits(join(high, low)), bits(whole))
    nearest, lower = split(whole)
    assert torch.equal(high, nearest) and torch.equal(low, lower)
    assert_stats(ours, stats)


@ALL
def test_halves_by_hand(backend):
    # theta is 1 + 3 2^-8, a tie of bfloat16, anchor 1 - 2^-9; three quarters of the way: 1 + (-1 + 0.75 * 7) 2^-9
    theta, anchor = (torch.tensor([x], device=DEVICE) for x in (1 + 3 * 2**-8, 1 - 2**-9))
    high, low = split(theta)
    assert (high.item(), low.item()) == (1 + 2**-6, -0x8000)
    interpolate_(high, anchor, 0.75, low=low, backend=backend)
    # 4.25 2^-9 is 0x11000 in units of 2^-23, that of bfloat16 0x10000: 0x1000 is left
    assert (high.item(), low.item()) == (1 + 2**-7, 0x1000)


SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.00390625, -1.01171875, 3.4028234663852886e38, -3.4028234663852886e38]


@ALL
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, where numbers overflow
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("mode", ["interpolate", "displacements"])
def test_both_ends_are_exact_to_the_bit_from_anywhere(mode, halves, backend):
    """Minus zero, denormals, ties of bfloat16, the largest floats, infinities and NaNs with a payload, each to each."""
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    values = torch.cat([torch.tensor([*SPECIAL, INF, -INF]), nans]).to(DEVICE)
    theta, anchor = (x.contiguous() for x in torch.cartesian_prod(values, values).unbind(1))
    for alpha, end in ((0.0, anchor), (1.0, theta)):
        whole, low = (theta.clone(), None) if not halves else split(theta)
        # lr 0: every scale is 1
        step = torch.zeros_like(anchor)
        if mode == "interpolate":
            interpolate_(whole, anchor, alpha, low=low, backend=backend)
        else:
            extrapolate_(whole, anchor, 3, alpha, u0=step, low=low, backend=backend)
        moved = join(whole, low) if halves else whole
        number = ~end.isnan()
        assert torch.equal(bits(moved)[number], bits(end)[number])
        # the upper half on its own too: a model runs on it
        assert moved[~number].isnan().all() and whole[~number].isnan().all()


@FAST
def test_shards_that_start_between_vectors_are_refused(backend):
    """The kernels read 16 bytes at a time; nothing is written before the refusal."""
    whole, even, low = torch.zeros(2049, device=DEVICE), torch.ones(2048, device=DEVICE), torch.zeros(2049).short()
    low, odd, ok = low.to(DEVICE), whole[1:], even.clone()
    halves, shorts = split(whole)[0], low[:-1]
    calls = {
        "theta_k": lambda b: interpolate_(odd, even, 0.5, backend=b),
        "theta_2": lambda b: extrapolate_(odd, even, 3, 0.5, u0=even, backend=b),
        "anchor": lambda b: interpolate_(ok, odd, 0.5, backend=b),
        "out_bf16": lambda b: interpolate_(ok, even, 0.5, out_bf16=halves[1:], backend=b),
        "low": lambda b: interpolate_(halves[:-1], even, 0.5, low=low[1:], backend=b),
        "g0": lambda b: extrapolate_(ok, even, 3, 0.5, grads=(odd, even), backend=b),
        "g1": lambda b: extrapolate_(ok, even, 3, 0.5, grads=(even, odd), backend=b),
        "u0": lambda b: extrapolate_(ok, even, 3, 0.5, u0=odd, backend=b),
    }
    for name, call in calls.items():
        by = 2 if name in ("out_bf16", "low") else 4
        with pytest.raises(
            ValueError, match=f"^{name} must start at a multiple of 16 bytes on backend {backend}.* {by}"
        ):
            call(backend)
    assert not whole.any() and torch.equal(ok, even) and not halves.any() and not low.any()
    for call in calls.values():  # torch does not care
        call("torch")
    assert shorts.shape == even.shape and whole.any()


@ALL
def test_autograd_is_told_that_a_shard_has_changed(backend):
    theta, anchor, x = vectors(64, 3)
    product = (x.requires_grad_() * theta).sum()  # keeps theta for its backward
    interpolate_(theta, anchor, 0.5, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_what_runs_is_tried_out_first():
    """A launch that fails is a reason to take the next one, said once."""
    backends.try_out("triton", torch.device(DEVICE))
    if COMPILED:
        assert backends.backend_on(torch.device("cuda", 0)) == ("cuda" if BUILT else "nvrtc")
        return
    assert backends.backend_on(torch.device("cpu")) == "torch"
    backends.backend_on.cache_clear()  # another test may have asked
    # a pretended device launches in Triton's interpreter only; without any nothing does
    last, failing = ("triton", []) if DEVICE == "cuda" else ("torch", ["triton"])
    with pytest.warns(UserWarning) as seen:
        assert backends.backend_on(torch.device("cuda", 0)) == last
    built = ["cuda"] if library.find() else []
    for backend, warning in zip([*built, "nvrtc", *failing], seen, strict=True):
        assert re.match(rf"flat updates do not run on {backend} \(cuda:0\): .*(CUDA|NVIDIA)", str(warning.message))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert backends.backend_on(torch.device("cuda", 0)) == last


def test_thresholds_and_segments_that_do_not_fit_are_refused():
    a, one = torch.ones(2048), torch.ones(1)
    with pytest.raises(ValueError, match="threshold and segment together"):
        extrapolate_(a, a, 3, 0.5, grads=(a, a), threshold=one)
    for segment in (torch.zeros(1).long(), torch.zeros(3).long()):  # a kernel would read beyond the shorter one
        with pytest.raises(
            ValueError, match=rf"segment must be \[2\], one tensor per 1024 .*, got \({len(segment)},\)"
        ):
            extrapolate_(a, a, 3, 0.5, grads=(a, a), threshold=one, segment=segment)
    with pytest.raises(ValueError, match="threshold must be a torch.float32 vector on cpu, got torch.float64"):
        extrapolate_(a, a, 3, 0.5, grads=(a, a), threshold=one.double(), segment=torch.zeros(2).long())


@pytest.mark.parametrize("fault", ["an element", "a sum", "extrapolation"])
def test_numbers_that_are_wrong_are_a_reason_to_take_the_next_one(fault, monkeypatch):
    right = backends.run

    def wrong(backend, theta, anchor, alpha, **given):
        sums = right(backend, theta, anchor, alpha, **given)
        theta[-1] += fault == "an element" or (fault == "extrapolation" and given["x0"] is not None)
        sums[2] += fault == "a sum"
        return sums

    monkeypatch.setattr(backends, "run", wrong)
    count = 0 if fault == "a sum" else 1
    with pytest.raises(RuntimeError, match=f"^{count} of 8197 elements came out wrong, sums"):
        backends.try_out("triton", torch.device(DEVICE))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The library for sm_90, and what ptxas said of it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        # fastrl needs no CUDA toolkit: without one there is no library to check, and Triton takes its place
        pytest.skip("no nvcc on PATH, so csrc/flat_update.cu cannot be compiled")
    path = tmp_path_factory.mktemp("csrc") / library.NAME
    said = subprocess.run(
        [
            nvcc,
            "-O3",
            "-std=c++17",
            "--shared",
            "-Xcompiler",
            "-fPIC",
            "-cudart",
            "static",
            "-Xptxas",
            "-v",
            "-gencode",
            "arch=compute_90,code=sm_90",
            "-o",
            path,
            SOURCE,
            "--keep",
            "--keep-dir",
            path.parent,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return path, said.stderr


# vectors that each reads
KERNELS = {
    "fastrl_interpolate_kernel": 2,
    "fastrl_gradients_kernel": 4,
    "fastrl_displacements_kernel": 3,
    "fastrl_interpolate_split_kernel": 3,
    "fastrl_gradients_split_kernel": 5,
    "fastrl_displacements_split_kernel": 4,
}


@pytest.mark.slow
def test_the_cuda_source_compiles_without_spills(compiled):
    path, said = compiled
    assert "warning" not in said.replace("ptxas info", "")
    entries = dict(
        zip(re.findall(r"entry function '(\w+)'", said), re.split(r"Compiling entry", said)[1:], strict=True)
    )
    assert entries.keys() == KERNELS.keys()
    for name, text in entries.items():
        assert "0 bytes spill stores, 0 bytes spill loads" in text, (name, text)
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        assert registers <= 64, f"{name}: two blocks of 512 threads fit with at most 64 registers"


@pytest.mark.slow
def test_every_access_of_the_cuda_source_is_of_16_bytes(compiled):
    path, _ = compiled
    (ptx,) = path.parent.glob("*.ptx")
    bodies = re.split(r"\.visible \.entry ", ptx.read_text())[1:]
    for body in bodies:
        name = body.partition("(")[0]
        wide = 1 if name == "fastrl_gradients_kernel" else 2  # 16-byte accesses to each vector of an iteration
        halves = 2 if "split" in name else 0  # of 8 elements each in 16 bytes
        assert len(re.findall(r"ld\.global\.cs\.v4\.f32", body)) == (KERNELS[name] - halves) * wide, name
        assert len(re.findall(r"ld\.global\.cs\.v4\.u32", body)) == halves, name
        assert len(re.findall(r"st\.global\.cs\.v4\.f32", body)) == (0 if halves else wide), name
        assert len(re.findall(r"st\.global\.cs\.v4\.u32", body)) == (halves or wide - 1), name
        # double only where sums are added up, never in what moves a coordinate
        assert not re.findall(r"(mul|fma|div|sub|neg|abs|cvt\.rn)\.\w*\.?f64(?!\.f32)", body), name


@pytest.mark.slow
def test_the_library_loads_and_refuses_without_a_gpu(compiled):
    """Plain C: it needs neither torch nor a driver to be loaded, and looks at its arguments before the device."""
    loaded = library.load(compiled[0])

    def interpolate(theta=16, low=None, anchor=16, out_bf16=None, n=4, alpha=0.5, partials=16, grid=1):
        return loaded.fastrl_interpolate(theta, low, anchor, out_bf16, n, alpha, partials, grid, None)

    def extrapolate(x0=16, x1=None, threshold=None, segment=None, lookahead=3):
        vectors = (16, None, 16, x0, x1, None, threshold, segment)
        return loaded.fastrl_extrapolate(*vectors, 4, lookahead, *[0.5] * 6, 16, 1, None)

    assert interpolate(None, None, None, n=0, partials=None) == 0  # nothing to do is no error
    for odd in (dict(theta=8), dict(low=34), dict(anchor=20), dict(out_bf16=18)):
        assert interpolate(**odd) == 716  # cudaErrorMisalignedAddress
    assert extrapolate(x0=24) == extrapolate(x1=20) == 716
    for bad in (dict(partials=None), dict(grid=0), dict(n=-1), dict(low=32, out_bf16=64)):
        assert interpolate(**bad) == 1  # cudaErrorInvalidValue
    # looks ahead fewer than two steps, a threshold without segments, no first step
    assert extrapolate(lookahead=1) == extrapolate(threshold=16) == extrapolate(x0=None) == 1
    if not COMPILED:  # then the driver is missed
        assert interpolate() == interpolate(low=32) == extrapolate() == extrapolate(x1=16) == 35


def test_entry_points_are_called_as_they_are_declared():
    header = (SOURCE.parent / "flat_update.h").read_text()
    for name, order in library.ENTRIES.items():
        parameters = re.search(rf"int {name}\((.*?)\);", header, re.DOTALL)[1].split(",")
        declared = {re.split(r"[ *]+", text.strip())[-1]: "*" in text for text in parameters}
        assert list(declared) == [*order, "grid", "stream"]
        pointers = [library.TYPES[argument] is library.POINTER for argument in order]
        assert list(declared.values()) == [*pointers, False, True]


@pytest.mark.slow
def test_a_library_of_another_version_is_refused(tmp_path):
    """A package is updated and its library is not: the arguments would be taken for others."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make an old library with")
    for name, text in (
        ("none", "int fastrl_interpolate(void) { return 0; }"),
        ("old", "int fastrl_flat_abi(void) { return 1; }"),
    ):
        path = tmp_path / f"{name}.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-xc", "-", "-o", path], input=text, text=True, check=True)
        with pytest.raises(RuntimeError, match="another version of csrc/flat_update.h: install fastrl again"):
            library.load(path)
