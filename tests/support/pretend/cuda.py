"""A CUDA device `cuda:0` whose kernels are the CPU's (device.cpp). Import it before torch.

    pytest -p support.pretend.cuda tests/...        tests as on a machine with a GPU
    with cuda.watched() as watch: ...               what waited for the device, and from which line

What it does not see: streams, launches of compiled kernels (Triton's run in its interpreter), limits of cuBLAS and
cuDNN, TF32, speed.
"""

import ctypes
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from support.pretend import build

ROOT = Path(__file__).parents[3]
TOTAL = 141 << 30  # bytes of the card
os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

assert "torch" not in sys.modules, "the pretended device must be there before torch, which asks for its hooks once"
assert not build.missing(), build.missing()
library = build.built()
for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so", "libtorch.so", "libtorch_python.so"):
    ctypes.CDLL(str(build.torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402

sys.path.insert(0, str(library.parent))
import pretended  # noqa: E402  # pyright: ignore[reportMissingImports]

from support.pretend import attention, collectives  # noqa: E402


class Properties(NamedTuple):
    name: str = "pretended H200"
    multi_processor_count: int = 132
    total_memory: int = TOTAL
    major: int = 9
    minor: int = 0


class Stream:
    cuda_stream = 0

    def wait_stream(self, other) -> None: ...

    def synchronize(self) -> None: ...


class on_device:
    """torch.cuda.device: there is one."""

    def __init__(self, device):
        index(device)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


class Runtime:
    """Of torch.cuda.cudart(): host memory that is locked, address -> bytes."""

    def __init__(self):
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        overlaps = any(address < other + n and other < address + size for other, n in self.locked.items())
        if not overlaps:
            self.locked[address] = size
        return 712 if overlaps else 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.locked.pop(address, None) else 713


runtime = Runtime()


def index(device: object, needed: bool = False) -> int:
    """As torch has it: some functions take a bare `cuda`, others ask for an index."""
    from torch.cuda._utils import _get_device_index

    return _get_device_index(device, optional=not needed)


# ---------------------------------------------------------------------------------------------- waits


@dataclass(eq=False)
class Watch:
    """Events in order: (wait | upload | download | synchronize, operator, bytes, where in our code).

    A transfer waits, unless it is asked not to: only then it is an upload or a download.
    """

    events: list[tuple[str, str, int, str]] = field(default_factory=list)
    launches: Counter = field(default_factory=Counter)  # operators

    @property
    def waits(self) -> list[str]:
        return [f"{op} at {where}" for what, op, _, where in self.events if not what.endswith("load")]

    def from_files(self, *folders: str) -> list[str]:
        """Waits that a line in one of these folders asked for itself."""
        return [wait for wait in self.waits if wait.partition(" at ")[2].startswith(folders)]


watches: list[Watch] = []


@contextmanager
def watched() -> Iterator[Watch]:
    watch, before = Watch(), Counter(pretended.launches())
    watches.append(watch)
    try:
        yield watch
    finally:
        watches.remove(watch)
        watch.launches = Counter(pretended.launches()) - before


def where() -> str:
    """The line of ours, or of transformers, that asked, and what called it."""
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < 4:
        file = frame.f_code.co_filename
        if "triton/runtime/interpreter" in file:
            return ""  # the interpreter's own, which no GPU sees
        own = file.startswith((str(ROOT / "fastrl"), str(ROOT / "kernels")))
        if own or "/transformers/" in file or "/torch/optim/" in file:
            name = file.removeprefix(f"{ROOT}/").rpartition("site-packages/")[2]
            found.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(found)


def listen(what: str, op: str, size: int) -> None:
    if watches and (place := where()):
        for watch in watches:
            watch.events.append((what, op, size, place))


pretended.listen(listen)

# ---------------------------------------------------------------------------------------------- torch.cuda

cuda = torch.cuda
cuda._lazy_init = lambda: None
cuda.is_available = cuda.is_initialized = lambda: True
cuda._is_in_bad_fork = cuda.is_current_stream_capturing = lambda: False
cuda.device_count = lambda: 1
cuda.current_device = lambda: 0
cuda.set_device = lambda device: index(device, needed=True)
cuda.device = on_device
cuda.synchronize = lambda device=None: listen("synchronize", "synchronize", 0)
cuda.empty_cache = lambda: None
cuda.mem_get_info = lambda device=None: (index(device), (TOTAL - pretended.allocated(), TOTAL))[1]
cuda.memory_allocated = lambda device=None: (index(device), pretended.allocated())[1]
cuda.memory_reserved = lambda device=None: (index(device), pretended.allocated())[1]
cuda.max_memory_allocated = lambda device=None: (index(device), pretended.peak())[1]
cuda.reset_peak_memory_stats = lambda device=None: (index(device), pretended.reset_peak())[1]
cuda.current_stream = cuda.default_stream = lambda device=None: Stream()
cuda.get_device_properties = lambda device=None: Properties()
cuda.get_device_capability = lambda device=None: (9, 0)
cuda.get_device_name = lambda device=None: Properties().name
cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()  # its generator is the CPU's
cuda.get_rng_state_all = lambda: []
cuda.set_rng_state = lambda state, device="cuda": None
cuda.manual_seed = cuda.manual_seed_all = lambda seed: None
cuda.cudart = lambda: runtime
torch.Tensor.pin_memory = lambda self, device=None: self.clone()

resize_on_host = torch.UntypedStorage.resize_


def resize_(self: torch.UntypedStorage, size: int):
    return pretended.resize_storage(self, size) if self.device.type == "cuda" else resize_on_host(self, size)


torch.UntypedStorage.resize_ = resize_

# ---------------------------------------------------------------------------------------------- operators of CUDA alone

operators = torch.library.Library("aten", "IMPL")
HALVES = (torch.float16, torch.bfloat16)


def check_product(a, b, out_dtype, out=None, bias=None) -> None:
    """What at::native::_mm_dtype_out_cuda and _addmm_dtype_out_cuda ask for."""
    given = [x for x in (a, b, out, bias) if x is not None]
    assert all(x.is_cuda for x in given), f"a product of tensors on {[str(x.device) for x in given]}"
    if a.dtype != b.dtype or not (out_dtype == a.dtype or out_dtype == torch.float32 and a.dtype in HALVES):
        raise RuntimeError(
            f"out_dtype must be the inputs' or float32 for half ones, got {a.dtype}, {b.dtype} -> {out_dtype}"
        )
    if any(x is not None and x.dtype != out_dtype for x in (out, bias)):
        raise RuntimeError(f"out and self must be {out_dtype}")


def mm(a, b, out_dtype):
    check_product(a, b, out_dtype)
    return mm_out(a, b, out_dtype, out=a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype))


def mm_out(a, b, out_dtype, *, out):
    check_product(a, b, out_dtype, out)
    x, y, into = map(pretended.host_view, (a, b, out))
    into.copy_(x.to(out_dtype) @ y.to(out_dtype))
    return out


def addmm_out(bias, a, b, out_dtype, *, beta=1, alpha=1, out):
    check_product(a, b, out_dtype, out, bias)
    given, x, y, into = map(pretended.host_view, (bias, a, b, out))
    into.copy_(torch.addmm(given, x.to(out_dtype), y.to(out_dtype), beta=beta, alpha=alpha))
    return out


def elementwise(operator, *given):
    """An operator that CUDA has a kernel for and a CPU build would put together from others, temporaries and all."""
    out = torch.empty_like(given[0])
    pretended.host_view(out).copy_(operator(*map(pretended.host_view, given)))
    return out


ON_CUDA = {
    "silu_backward": partial(elementwise, torch.ops.aten.silu_backward),
    "mish_backward": partial(elementwise, torch.ops.aten.mish_backward),
    "mm.dtype": mm,
    "mm.dtype_out": mm_out,
    "addmm.dtype_out": addmm_out,
    "_scaled_dot_product_efficient_attention": partial(attention.efficient, pretended.host_view),
    "_scaled_dot_product_efficient_attention_backward": partial(attention.efficient_backward, pretended.host_view),
    "_flash_attention_forward": partial(attention.ragged, pretended.host_view),
    "_flash_attention_backward": partial(attention.ragged_backward, pretended.host_view),
}
for name, function in ON_CUDA.items():
    operators.impl(name, function, "CUDA")

collectives.install(pretended.host_view)
