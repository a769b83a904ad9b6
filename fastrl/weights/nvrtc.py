"""csrc/flat_update.cu compiled when it is first needed, by NVRTC, for the device at hand: where no nvcc has built it.

NVRTC makes a cubin of the source in a few seconds, the driver loads it and launches its kernels. Both are called by way
of cuda-bindings, which PyTorch for CUDA brings and which finds them. Nothing is compiled or loaded on import.
"""

import ctypes
import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fastrl

SOURCE = "flat_update.cu"
THREADS = 512  # kThreads


def source() -> Path:
    """csrc/flat_update.cu: data of the package, or beside it in a checkout. Raises FileNotFoundError."""
    folders = [*map(Path, fastrl.__path__), Path(fastrl.__file__).parent.parent]
    found = next((path for folder in folders if (path := folder / "csrc" / SOURCE).exists()), None)
    if found is None:
        raise FileNotFoundError(f"csrc/{SOURCE} is in none of {', '.join(map(str, folders))}")
    return found


def bindings(name: str) -> Any:
    """The calls of 'nvrtc' | 'driver'. Raises RuntimeError where cuda-bindings is not installed."""
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise RuntimeError(f"{error}: run `pip install cuda-bindings`, in PyTorch's version of CUDA") from error


def ask(call: Callable, *arguments: object) -> Any:
    """What a call gives besides its error. Raises RuntimeError with that, or where its library cannot be found."""
    error, *values = call(*arguments)
    if error:
        raise RuntimeError(f"{call.__name__} failed: {error.name}")
    return values[0] if values else None


def compiled(text: str, arch: str, *, folder: Path, name: str = SOURCE) -> bytes:
    """A CUDA source, which may include files of `folder` -> a cubin for `arch`, such as sm_90. name: for messages.

    Raises RuntimeError with what NVRTC says: of the source, or of an architecture that it does not know.
    """
    nvrtc = bindings("nvrtc")
    program = ask(nvrtc.nvrtcCreateProgram, text.encode(), name.encode(), 0, [], [])
    try:
        options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", f"--include-path={folder}".encode()]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if error:
            said = bytes(ask(nvrtc.nvrtcGetProgramLogSize, program))
            ask(nvrtc.nvrtcGetProgramLog, program, said)
            log = said.rstrip(b"\0").decode(errors="replace").strip()
            raise RuntimeError(f"NVRTC does not compile {name} for {arch}: {error.name}; {log}")
        cubin = bytes(ask(nvrtc.nvrtcGetCUBINSize, program))
        ask(nvrtc.nvrtcGetCUBIN, program, cubin)  # writes into it
        return cubin
    finally:
        ask(nvrtc.nvrtcDestroyProgram, program)


@cache
def module(device: int) -> Any:
    """The kernels on a device, whose context is the current one; they stay as long as the process."""
    path = source()
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return loaded(compiled(path.read_text(), arch, folder=path.parent))


def loaded(cubin: bytes) -> Any:
    return ask(bindings("driver").cuModuleLoadData, cubin)


@cache
def kernel(device: int, name: str) -> Any:
    return ask(bindings("driver").cuModuleGetFunction, module(device), name.encode())


def kernel_name(arguments: ctypes.Structure) -> str:
    mode = "interpolate" if arguments.x0 is None else "displacements" if arguments.x1 is None else "gradients"
    return f"fastrl_{mode}{'_split' if arguments.low else ''}_kernel"


def launch(arguments: ctypes.Structure, grid: int, stream: int) -> None:
    """Queue the kernel that `flat_library.Arguments` ask for on a stream of the current device.

    Raises RuntimeError with what the compiler or the driver says.
    """
    start(kernel(torch.cuda.current_device(), kernel_name(arguments)), arguments, grid, stream)


def start(function: Any, arguments: ctypes.Structure, grid: int, stream: int) -> None:
    """A kernel of one parameter, by value."""
    assert grid >= 1 and arguments.n > 0 and arguments.partials, (grid, arguments.n, arguments.partials)
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    launch = bindings("driver").cuLaunchKernel
    ask(launch, function, grid, 1, 1, THREADS, 1, 1, 0, stream, ctypes.addressof(parameters), 0)
