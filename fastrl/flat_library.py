"""csrc/flat_update.cu from Python: the library that was built with the package, by ctypes, on the current stream."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import fastrl

NAME = "libflat_update.so"
NUM_STATS = 9  # FASTRL_FLAT_STATS
PROGRAMS_PER_MULTIPROCESSOR = 2

POINTER, FLOAT = ctypes.c_void_p, ctypes.c_float
SIGNATURES = {
    "fastrl_interpolate": [POINTER] * 3 + [ctypes.c_int64, FLOAT, POINTER, ctypes.c_int, POINTER],
    "fastrl_extrapolate": [POINTER] * 7
    + [ctypes.c_int64, ctypes.c_int]
    + [FLOAT] * 6
    + [POINTER, ctypes.c_int, POINTER],
}


def find() -> Path | None:
    """The library beside the package; an editable install has it in another folder than the sources."""
    return next((path for folder in fastrl.__path__ if (path := Path(folder) / NAME).exists()), None)


@cache
def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, types in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, ctypes.c_int
    return library


def run(name: str, theta: Tensor, *arguments: object) -> Tensor:
    """Run one entry point on a shard; `arguments` are those between theta and partials. -> the sums, float64 [9].

    Raises RuntimeError with the CUDA error.
    """
    path = find()
    assert path is not None, f"{NAME} was not built"
    grid = PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(theta.device).multi_processor_count
    partials = torch.zeros(grid, NUM_STATS, dtype=torch.float64, device=theta.device)
    stream = torch.cuda.current_stream(theta.device).cuda_stream
    raw = [a.data_ptr() if isinstance(a, Tensor) else a for a in (theta, *arguments)]
    with torch.cuda.device(theta.device):
        code = getattr(load(path), name)(*raw, partials.data_ptr(), grid, stream)
    if code:
        raise RuntimeError(f"{name} on {len(theta)} elements failed with CUDA error {code}")
    return partials.sum(dim=0)
