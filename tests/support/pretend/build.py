"""Compile device.cpp against the installed torch, once for each version of either, into build/pretend."""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
FOLDER = Path(__file__).parents[3] / "build" / "pretend"
SKIPPED = 77  # exit code, as test programs have it
MADE_FOR = "2.13.0+cpu"  # its operators, hooks and dispatch keys are no stable interface


def missing() -> str:
    """Why there can be no pretended device here; empty if there can. Imports no torch."""
    found = version("torch")
    if found != MADE_FOR:
        return f"the pretended CUDA device is made for torch {MADE_FOR}, and {found} is installed"
    if shutil.which("g++") is None:
        return "the pretended CUDA device is compiled by g++, which is not there"
    return ""


def torch_folder() -> Path:
    """Where torch lies, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def built() -> Path:
    """The compiled module; the first call takes a minute or two. Raises RuntimeError with what the compiler says."""
    text = SOURCE.read_bytes()
    key = hashlib.sha256(text + MADE_FOR.encode() + sys.version.encode()).hexdigest()[:12]
    library = FOLDER / key / "pretended.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        torch = torch_folder()
        include = [torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include"]
        part = library.with_suffix(f".{hash(sys.argv[0]) & 0xFFFF}.part")
        command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", "-DTORCH_EXTENSION_NAME=pretended", SOURCE]
        command += [f"-I{folder}" for folder in [*include, sysconfig.get_paths()["include"]]]
        command += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", "-o", part]
        ran = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"g++ does not compile {SOURCE.name}:\n{ran.stderr[-4000:]}")
        part.rename(library)
    return library


if __name__ == "__main__":
    reason = missing()
    print(f"skipped: {reason}" if reason else built())
    sys.exit(SKIPPED if reason else 0)
