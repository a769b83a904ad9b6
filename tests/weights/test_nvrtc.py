"""The CUDA source as NVRTC compiles it, and what a launch hands to the driver, as far as there is no GPU to do it."""

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastrl.weights import library, nvrtc

SOURCE = nvrtc.source()
KERNELS = [
    f"fastrl_{mode}{split}_kernel" for mode in ("interpolate", "gradients", "displacements") for split in ("", "_split")
]
needs_bindings = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None,
    reason="needs cuda-bindings (pip install cuda-bindings)",
)


@pytest.fixture(scope="module")
def compiler():
    try:
        nvrtc.ask(nvrtc.bindings("nvrtc").nvrtcVersion)
    except RuntimeError as error:
        pytest.skip(f"{error} (pip install cuda-bindings nvidia-cuda-nvrtc)")


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
    """Fields of one order and one size each lie alike: the compiler says if not. NVRTC 13.0 has no offsetof."""
    names = [name for name, *_ in library.Arguments._fields_]
    sizes = {f"sizeof(Arguments::{name})": getattr(library.Arguments, name).size for name in names}
    sizes |= {"sizeof(Arguments)": ctypes.sizeof(library.Arguments), "kThreads": nvrtc.THREADS}
    asserts = ["constexpr Arguments laid_out{};", *(f"static_assert({x} == {value});" for x, value in sizes.items())]
    for before, after in zip(names, names[1:], strict=False):
        asserts.append(f"static_assert((const void*)&laid_out.{before} < (const void*)&laid_out.{after});")
    nvrtc.compiled("\n".join([SOURCE.read_text(), *asserts]), "sm_90", folder=SOURCE.parent)
    with pytest.raises(RuntimeError, match="static assertion failed"):
        wrong = asserts[-1].replace("<", ">")
        nvrtc.compiled("\n".join([SOURCE.read_text(), asserts[0], wrong]), "sm_90", folder=SOURCE.parent)


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.delitem(sys.modules, "cuda.bindings.nvrtc", raising=False)
    with pytest.raises(RuntimeError, match="cuda.*: run `pip install cuda-bindings`"):
        nvrtc.compiled("", "sm_90", folder=SOURCE.parent)


# a driver that notes down its last launch; cuda.h checks that it has the real one's signatures
DRIVER = """
#include <cuda.h>
#include <stdio.h>
#include <string.h>
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)7;
  return memcmp(image, "cubin", 5) ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)(size_t)(strcmp(name, "the_kernel") ? 0 : 0x1234567890 + (size_t)module);
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx,
                        unsigned int by, unsigned int bz, unsigned int shared, CUstream stream, void **parameters,
                        void **extra) {
  printf("{\\"grid\\": [%u, %u, %u], \\"block\\": [%u, %u, %u], \\"shared\\": %u, \\"function\\": %zu, "
         "\\"stream\\": %zu, \\"extra\\": %zu, \\"parameter\\": \\"", gx, gy, gz, bx, by, bz, shared, (size_t)function,
         (size_t)stream, (size_t)extra);
  for (int i = 0; i < SIZE; i++) printf("%02x", ((unsigned char *)parameters[0])[i]);
  printf("\\"}\\n");
  fflush(stdout);
  return CUDA_SUCCESS;
}
CUresult cuGetProcAddress(const char *name, void **found, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult *status) {
  *found = !strcmp(name, "cuModuleLoadData") ? (void *)cuModuleLoadData
         : !strcmp(name, "cuModuleGetFunction") ? (void *)cuModuleGetFunction
         : !strcmp(name, "cuLaunchKernel") ? (void *)cuLaunchKernel : 0;
  return CUDA_SUCCESS;
}
"""
FAR = 0x7F0123456780  # pointers of a GPU need more than 32 bits
SENT = dict(theta=FAR, low=FAR + 16, n=1 << 40, alpha=0.25, scale_max=3.5, partials=FAR + 32)
CALLS = f"""
from fastrl.weights import library, nvrtc
try:
    nvrtc.loaded(b"a text")
except RuntimeError as error:
    print(error, flush=True)
nvrtc.module = lambda device: nvrtc.loaded(b"cubin")
nvrtc.start(nvrtc.kernel(0, "the_kernel"), library.Arguments(**{SENT}), 264, {FAR + 64})
"""


@pytest.mark.slow
@needs_bindings
def test_a_launch_hands_the_driver_what_the_kernel_expects(nvidia, tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a stand-in for libcuda with")
    size = ctypes.sizeof(library.Arguments)
    command = [compiler, "-shared", "-fPIC", "-Werror", f"-I{nvidia / 'include'}", f"-DSIZE={size}"]
    subprocess.run([*command, "-xc", "-", "-o", tmp_path / "libcuda.so.1"], input=DRIVER, text=True, check=True)
    # a process of its own: in this one the driver may be there already
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    refused, launched = ran.stdout.splitlines()
    assert refused == "cuModuleLoadData failed: CUDA_ERROR_INVALID_IMAGE"
    last = json.loads(launched)
    assert (last["grid"], last["block"], last["shared"]) == ([264, 1, 1], [512, 1, 1], 0)
    assert (last["function"], last["stream"], last["extra"]) == (0x1234567890 + 7, FAR + 64, 0)
    parameter = bytes.fromhex(last["parameter"])
    assert parameter == bytes(library.Arguments(**SENT)) and len(parameter) == size


def test_nothing_is_launched_for_no_elements():
    with pytest.raises(AssertionError):
        nvrtc.start(None, library.Arguments(n=0), 264, 0)


def test_each_update_has_its_kernel():
    names = [
        nvrtc.kernel_name(library.Arguments(x0=x0, x1=x1, low=low))
        for x0, x1 in ((None, None), (16, 32), (16, None))
        for low in (None, 64)
    ]
    assert names == KERNELS
