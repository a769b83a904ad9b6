"""The CUDA source as NVRTC compiles it, and what a launch hands to the driver, as far as there is no GPU to do it."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastrl.weights import library, nvrtc

SOURCE = nvrtc.source()
KERNELS = [
    f"fastrl_{mode}{split}_kernel" for mode in ("interpolate", "gradients", "displacements") for split in ("", "_split")
]


@pytest.fixture(scope="module")
def compiler():
    try:
        return nvrtc.compiler()
    except OSError as error:
        pytest.skip(f"{error} (pip install nvidia-cuda-nvrtc)")


@pytest.fixture(scope="module")
def nvidia():
    """The folder of NVIDIA's programs and headers that Triton brings."""
    triton = pytest.importorskip("triton", reason="cuobjdump and cuda.h come with Triton, which is not installed")
    return Path(triton.__file__).parent / "backends" / "nvidia"


@pytest.mark.slow
def test_the_source_becomes_a_cubin_without_spills(compiler, nvidia, tmp_path):
    path = tmp_path / "flat_update.cubin"
    path.write_bytes(nvrtc.compiled(SOURCE.read_text(), "sm_90", folder=SOURCE.parent))
    said = subprocess.run(
        [nvidia / "bin" / "cuobjdump", "--dump-resource-usage", path], capture_output=True, text=True, check=True
    ).stdout
    usage = dict(re.findall(r"Function (\w+):\s+(.*)", said))
    assert sorted(usage) == sorted(KERNELS)
    for name, line in usage.items():
        numbers = {what: int(count) for what, count in re.findall(r"([A-Z]+):(\d+)", line)}
        assert numbers["STACK"] == numbers["LOCAL"] == 0, (name, line)
        assert numbers["REG"] <= 64, f"{name}: two blocks of 512 threads fit with at most 64 registers"


def test_what_nvrtc_cannot_compile_is_said(compiler):
    with pytest.raises(RuntimeError, match=r"for sm_999: NVRTC_ERROR_INVALID_OPTION.*gpu-architecture"):
        nvrtc.compiled(SOURCE.read_text(), "sm_999", folder=SOURCE.parent)
    with pytest.raises(RuntimeError, match=r"for sm_90: NVRTC_ERROR_COMPILATION; flat_update.cu\(1\): error"):
        nvrtc.compiled("__device__ int x = y;", "sm_90", folder=SOURCE.parent)


@pytest.mark.slow
def test_arguments_lie_where_the_kernel_reads_them(compiler):
    """Every field of the Python structure, where the C++ one has it: the compiler says if it has not."""
    fields = library.Arguments
    places = {f"__builtin_offsetof(Arguments, {name})": getattr(fields, name).offset for name, _ in fields._fields_}
    places |= {f"sizeof(Arguments::{name})": getattr(fields, name).size for name, _ in fields._fields_}
    places |= {"sizeof(Arguments)": ctypes.sizeof(fields), "kThreads": nvrtc.THREADS}
    asserts = "".join(f"static_assert({x} == {value});\n" for x, value in places.items())
    nvrtc.compiled(SOURCE.read_text() + asserts, "sm_90", folder=SOURCE.parent)


def test_a_broken_nvrtc_is_a_reason_and_no_crash(tmp_path, monkeypatch):
    broken = tmp_path / "libnvrtc.so.13"
    broken.write_text("not a library")
    for found in ([broken], []):
        monkeypatch.setattr(nvrtc, "candidates", lambda found=found: found)
        with pytest.raises(OSError, match="no libnvrtc among site-packages" + (".*libnvrtc.so.13" if found else "")):
            nvrtc.compiler.__wrapped__()


def test_the_wheel_of_pytorchs_own_version_is_tried_first(tmp_path, monkeypatch):
    for folder, version in (("cuda_nvrtc", 12), ("cu13", 13)):
        lib = tmp_path / "nvidia" / folder / "lib"
        lib.mkdir(parents=True)
        (lib / f"libnvrtc.so.{version}").touch(), (lib / f"libnvrtc-builtins.so.{version}.5").touch()
    home = tmp_path / "cuda" / "lib64"
    home.mkdir(parents=True)
    (home / "libnvrtc.so").touch()
    monkeypatch.setenv("CUDA_HOME", str(home.parent))
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "nvidia")]})
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: spec)
    for cuda, first in (("12.8", "libnvrtc.so.12"), ("13.0", "libnvrtc.so.13"), (None, "libnvrtc.so.13")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        names = [path.name for path in nvrtc.candidates() if path.is_relative_to(tmp_path)]
        assert names[0] == first and sorted(names) == ["libnvrtc.so", "libnvrtc.so.12", "libnvrtc.so.13"]


# a driver that notes down its last launch; cuda.h checks that it has the real one's signatures
DRIVER = """
#include <cuda.h>
#include <string.h>
static struct { unsigned int grid[3], block[3], shared; void *function, *stream, *extra; char parameter[256]; } last;
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)7;
  return memcmp(image, "cubin", 5) ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "not an image"; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)(size_t)(strcmp(name, "the_kernel") ? 0 : 0x1234567890 + (size_t)module);
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx,
                        unsigned int by, unsigned int bz, unsigned int shared, CUstream stream, void **parameters,
                        void **extra) {
  unsigned int grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
  memcpy(last.grid, grid, 12), memcpy(last.block, block, 12), last.shared = shared;
  last.function = function, last.stream = stream, last.extra = extra;
  memcpy(last.parameter, parameters[0], SIZE);
  return CUDA_SUCCESS;
}
void *last_launch(void) { return &last; }
"""


class Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("function", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("parameter", library.Arguments),
    ]


@pytest.mark.slow
def test_a_launch_hands_the_driver_what_the_kernel_expects(nvidia, tmp_path, monkeypatch):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a stand-in for libcuda with")
    path = tmp_path / "libcuda.so.1"
    subprocess.run(
        [
            compiler,
            "-shared",
            "-fPIC",
            "-Werror",
            f"-I{nvidia / 'include'}",
            "-xc",
            "-",
            "-o",
            path,
            f"-DSIZE={ctypes.sizeof(library.Arguments)}",
        ],
        input=DRIVER,
        text=True,
        check=True,
    )
    loader = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: loader(str(path)) if name == "libcuda.so.1" else loader(name))
    driver = nvrtc.driver.__wrapped__()
    monkeypatch.setattr(nvrtc, "driver", lambda: driver)

    with pytest.raises(RuntimeError, match="cuModuleLoadData failed with CUDA error 200: not an image"):
        nvrtc.ask_driver("cuModuleLoadData", ctypes.byref(ctypes.c_void_p()), b"a text")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    nvrtc.ask_driver("cuModuleLoadData", ctypes.byref(module), b"cubin")
    nvrtc.ask_driver("cuModuleGetFunction", ctypes.byref(function), module, b"the_kernel")
    far = 0x7F0123456780  # pointers of a GPU need more than 32 bits
    sent = library.Arguments(theta=far, low=far + 16, n=1 << 40, alpha=0.25, scale_max=3.5, partials=far + 32)
    nvrtc.start(function, sent, 264, far + 64)
    driver.last_launch.restype = ctypes.c_void_p
    last = Launch.from_address(driver.last_launch())
    assert (list(last.grid), list(last.block), last.shared) == ([264, 1, 1], [512, 1, 1], 0)
    assert (last.function, last.stream, last.extra) == (0x1234567890 + 7, far + 64, None)
    assert bytes(last.parameter) == bytes(sent) and last.parameter.anchor is None and last.parameter.n == 1 << 40
    with pytest.raises(AssertionError):
        nvrtc.start(function, library.Arguments(n=0), 264, None)


def test_each_update_has_its_kernel():
    names = [
        nvrtc.kernel_name(library.Arguments(x0=x0, x1=x1, low=low))
        for x0, x1 in ((None, None), (16, 32), (16, None))
        for low in (None, 64)
    ]
    assert names == KERNELS
