"""csrc/flat_update.cu compiled when it is first needed, by NVRTC, for the device at hand: where no nvcc has built it.

Two libraries by ctypes, which are there wherever PyTorch runs on CUDA: NVRTC makes a cubin of the source in a few
seconds, the driver loads it and launches its kernels. Nothing is compiled or loaded on import.
"""

import ctypes
import importlib.util
import os
from ctypes.util import find_library
from functools import cache
from pathlib import Path

import torch

import fastrl

SOURCE = "flat_update.cu"
THREADS = 512  # kThreads
POINTER = ctypes.c_void_p


def source() -> Path:
    """csrc/flat_update.cu: data of the package, or beside it in a checkout. Raises FileNotFoundError."""
    folders = [*map(Path, fastrl.__path__), Path(fastrl.__file__).parent.parent]
    found = next((path for folder in folders if (path := folder / "csrc" / SOURCE).exists()), None)
    if found is None:
        raise FileNotFoundError(f"csrc/{SOURCE} is in none of {', '.join(map(str, folders))}")
    return found


def candidates() -> list[Path]:
    """NVRTC libraries in the order to try them: of wheels, of the loader's path, of CUDA_HOME.

    Of the wheels PyTorch's own major version comes first: a driver may refuse what a newer one has made.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else map(Path, spec.submodule_search_locations or ())
    wheels = sorted(path for folder in folders for path in folder.glob("*/lib/libnvrtc.so.*"))
    wheels.sort(key=lambda path: not path.name.endswith(f".so.{(torch.version.cuda or '').partition('.')[0]}"))
    loaders = [Path(name)] if (name := find_library("nvrtc")) else []
    home = os.environ.get("CUDA_HOME")
    return [*wheels, *loaders, *(sorted(Path(home).glob("lib*/libnvrtc.so*")) if home else [])]


@cache
def compiler() -> ctypes.CDLL:
    """NVRTC. Raises OSError where there is none that can be loaded, with what was tried."""
    reasons = []
    for path in candidates():
        try:
            # NVRTC opens them by name as it compiles, from a folder that the loader may not search
            for builtins in path.parent.glob("libnvrtc-builtins.so*") if path.is_absolute() else ():
                ctypes.CDLL(str(builtins))
            library = ctypes.CDLL(str(path))
        except OSError as error:
            reasons.append(str(error))
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    where = "site-packages/nvidia/*/lib, the loader's path and CUDA_HOME"
    raise OSError(f"no libnvrtc among {where}" + "".join(f"; {reason}" for reason in reasons))


def compiled(text: str, arch: str, *, folder: Path) -> bytes:
    """A CUDA source, which may include files of `folder` -> a cubin for `arch`, such as sm_90.

    Raises RuntimeError with what NVRTC says: of the source, or of an architecture that it does not know.
    """
    library = compiler()

    def call(name: str, *arguments: object) -> int:
        code = getattr(library, name)(*arguments)
        if code and name != "nvrtcCompileProgram":
            raise RuntimeError(f"{name} failed: {library.nvrtcGetErrorString(code).decode()}")
        return code

    def fetch(what: str) -> bytes:
        size = ctypes.c_size_t()
        call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    program = POINTER()
    call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), SOURCE.encode(), 0, None, None)
    try:
        options = [f"--gpu-architecture={arch}", "--std=c++17", f"--include-path={folder}"]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        code = call("nvrtcCompileProgram", program, len(options), array)
        if code:
            said = fetch("ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            reason = library.nvrtcGetErrorString(code).decode()
            raise RuntimeError(f"NVRTC does not compile {SOURCE} for {arch}: {reason}; {said}")
        return fetch("CUBIN")
    finally:
        call("nvrtcDestroyProgram", ctypes.byref(program))


@cache
def driver() -> ctypes.CDLL:
    """Raises OSError where there is none."""
    library = ctypes.CDLL("libcuda.so.1")
    library.cuModuleLoadData.argtypes = [POINTER, ctypes.c_char_p]
    library.cuModuleGetFunction.argtypes = [POINTER, POINTER, ctypes.c_char_p]
    # function, grid and block in three dimensions, bytes of shared memory, stream, parameters, extra
    library.cuLaunchKernel.argtypes = [POINTER, *[ctypes.c_uint] * 7, POINTER, POINTER, POINTER]
    return library


def ask_driver(name: str, *arguments: object) -> None:
    code = getattr(driver(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name} failed with CUDA error {code}: {(text.value or b'unknown').decode()}")


@cache
def module(device: int) -> POINTER:
    """The kernels on a device, whose context is the current one; they stay as long as the process."""
    path = source()
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    cubin = compiled(path.read_text(), arch, folder=path.parent)
    loaded = POINTER()
    ask_driver("cuModuleLoadData", ctypes.byref(loaded), cubin)
    return loaded


@cache
def kernel(device: int, name: str) -> POINTER:
    function = POINTER()
    ask_driver("cuModuleGetFunction", ctypes.byref(function), module(device), name.encode())
    return function


def kernel_name(arguments: ctypes.Structure) -> str:
    mode = "interpolate" if arguments.x0 is None else "displacements" if arguments.x1 is None else "gradients"
    return f"fastrl_{mode}{'_split' if arguments.low else ''}_kernel"


def launch(arguments: ctypes.Structure, grid: int, stream: int | None) -> None:
    """Queue the kernel that `flat_library.Arguments` ask for on a stream of the current device.

    Raises RuntimeError with what the compiler or the driver says.
    """
    start(kernel(torch.cuda.current_device(), kernel_name(arguments)), arguments, grid, stream)


def start(function: POINTER, arguments: ctypes.Structure, grid: int, stream: int | None) -> None:
    """A kernel of one parameter, by value."""
    assert grid >= 1 and arguments.n > 0 and arguments.partials, (grid, arguments.n, arguments.partials)
    parameters = (POINTER * 1)(ctypes.addressof(arguments))
    ask_driver("cuLaunchKernel", function, grid, 1, 1, THREADS, 1, 1, 0, stream, parameters, None)
