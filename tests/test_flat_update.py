"""The fast paths of fastrl.ops against its definitions: the CUDA source, as far as it can be checked, and its twin."""

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastrl import flat_library
from fastrl.ops import FlatStats, extrapolate_, interpolate_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUILT = DEVICE == "cuda" and flat_library.find() is not None
FAST = pytest.mark.parametrize(
    "backend", ["triton", pytest.param("cuda", marks=pytest.mark.skipif(not BUILT, reason="needs a GPU and nvcc"))]
)
SOURCE = Path(__file__).parent.parent / "csrc" / "flat_update.cu"
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
    if DEVICE == "cuda":
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
    exact, truth = extrapolated(theta, anchor, first, second, "torch", torch.float64, **(
        options | ({"threshold": options["threshold"].double()} if limits else {})))  # fmt: skip
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
def test_values_that_are_not_finite_stay_where_they_are(backend):
    theta, anchor = torch.tensor([INF, 1.0, NAN, 2.0], device=DEVICE), torch.zeros(4, device=DEVICE)
    interpolate_(theta, anchor, 0.5, backend=backend)
    assert theta.isfinite().tolist() == [False, True, False, True] and theta[[1, 3]].tolist() == [0.5, 1.0]


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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The library for sm_90, and what ptxas said of it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        # fastrl needs no CUDA toolkit: without one there is no library to check, and Triton takes its place
        pytest.skip("no nvcc on PATH, so csrc/flat_update.cu cannot be compiled")
    path = tmp_path_factory.mktemp("csrc") / flat_library.NAME
    said = subprocess.run(
        [nvcc, "-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC", "-cudart", "static", "-Xptxas", "-v", "-gencode",
         "arch=compute_90,code=sm_90", "-o", path, SOURCE, "--keep", "--keep-dir", path.parent],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return path, said.stderr


KERNELS = {"fastrl_interpolate_kernel": 64, "fastrl_gradients_kernel": 64, "fastrl_displacements_kernel": 64}


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
        assert registers <= KERNELS[name], f"{name}: two blocks of 512 threads fit with at most 64 registers"


@pytest.mark.slow
def test_every_access_of_the_cuda_source_is_of_16_bytes(compiled):
    path, _ = compiled
    (ptx,) = path.parent.glob("*.ptx")
    bodies = re.split(r"\.visible \.entry ", ptx.read_text())[1:]
    inputs = {"fastrl_interpolate_kernel": 2, "fastrl_gradients_kernel": 4, "fastrl_displacements_kernel": 3}
    for body in bodies:
        name = body.partition("(")[0]
        wide = 1 if name == "fastrl_gradients_kernel" else 2  # 16-byte accesses to each vector of an iteration
        assert len(re.findall(r"ld\.global\.cs\.v4\.f32", body)) == inputs[name] * wide, name
        assert len(re.findall(r"st\.global\.cs\.v4\.f32", body)) == wide, name
        # double only where sums are added up, never in what moves a coordinate
        assert not re.findall(r"(mul|fma|div|sub|neg|abs|cvt\.rn)\.\w*\.?f64(?!\.f32)", body), name


@pytest.mark.slow
def test_the_library_loads_and_refuses_without_a_gpu(compiled):
    """Plain C: it needs neither torch nor a driver to be loaded, and looks at its arguments before the device."""
    library = flat_library.load(compiled[0])
    assert library.fastrl_interpolate(None, None, None, 0, 0.5, None, 1, None) == 0  # nothing to do is no error
    assert library.fastrl_interpolate(8, 16, None, 4, 0.5, 16, 1, None) == 716  # cudaErrorMisalignedAddress
    assert library.fastrl_interpolate(16, 16, None, 4, 0.5, None, 1, None) == 1  # cudaErrorInvalidValue: no partials
    few = library.fastrl_extrapolate(16, 16, 16, None, None, None, None, 4, 1, *[0.5] * 6, 16, 1, None)
    assert few == 1  # looks ahead fewer than two steps
    one = library.fastrl_extrapolate(16, 16, 16, None, None, 16, None, 4, 3, *[0.5] * 6, 16, 1, None)
    assert one == 1  # a threshold without segments
