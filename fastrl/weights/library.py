"""csrc/flat_update.cu from Python: the library that was built with the package, by ctypes."""

import ctypes
from functools import cache
from pathlib import Path

import fastrl

NAME = "libflat_update.so"
ABI = 2  # FASTRL_FLAT_ABI
POINTER, FLOAT = ctypes.c_void_p, ctypes.c_float


class Arguments(ctypes.Structure):
    """`struct Arguments` of csrc/flat_update.cu: what a kernel is given, pointers as addresses or None."""

    _fields_ = [
        ("theta", POINTER),  # float32 [n], or with low bfloat16 [n]
        ("low", POINTER),  # int16 [n]
        ("anchor", POINTER),  # float32 [n], like x0 and x1
        ("x0", POINTER),  # None: interpolation
        ("x1", POINTER),  # None: x0 is a displacement
        ("out_bf16", POINTER),
        ("threshold", POINTER),  # float32 [tensors]
        ("segment", POINTER),  # int32 [n / 1024, rounded up]
        ("n", ctypes.c_int64),
        ("lookahead", ctypes.c_int),
        ("alpha", FLOAT),
        ("lr", FLOAT),
        ("weight_decay", FLOAT),
        ("ratio_min", FLOAT),
        ("ratio_max", FLOAT),
        ("scale_max", FLOAT),
        ("partials", POINTER),  # float64 [grid, 9]
    ]


TYPES = {name: kind for name, kind, *_ in Arguments._fields_}
LAUNCH = [ctypes.c_int, POINTER]  # grid, stream
# the arguments of each entry point, in order; those of extrapolation are all of the kernel's
ENTRIES = {
    "fastrl_interpolate": ["theta", "low", "anchor", "out_bf16", "n", "alpha", "partials"],
    "fastrl_extrapolate": list(TYPES),
}


def find() -> Path | None:
    """The library beside the package; an editable install has it in another folder than the sources."""
    return next((path for folder in fastrl.__path__ if (path := Path(folder) / NAME).exists()), None)


@cache
def load(path: Path) -> ctypes.CDLL:
    """Raises OSError where it cannot be loaded, RuntimeError where it was built from other sources than these."""
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "fastrl_flat_abi") or library.fastrl_flat_abi() != ABI:
        raise RuntimeError(f"{path} was built from another version of csrc/flat_update.h: install fastrl again")
    for name, order in ENTRIES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [*(TYPES[argument] for argument in order), *LAUNCH], ctypes.c_int
    return library


def launch(arguments: Arguments, grid: int, stream: int) -> None:
    """Queue the kernel that the arguments ask for on a stream of the current device.

    Raises RuntimeError with the CUDA error.
    """
    path = find()
    assert path is not None, f"{NAME} was not built"
    name = "fastrl_interpolate" if arguments.x0 is None else "fastrl_extrapolate"
    code = getattr(load(path), name)(*(getattr(arguments, field) for field in ENTRIES[name]), grid, stream)
    if code:
        raise RuntimeError(f"{name} on {arguments.n} elements failed with CUDA error {code}")
