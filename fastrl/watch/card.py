"""What the driver says of a GPU and torch does not: who holds its memory, energy, load, clocks and what slows them.

NVML (libnvidia-ml.so.1) comes with the driver, and nvidia-ml-py, the module `pynvml`, calls it. Where one is missing,
`open_card` says which. Units are bytes, joules, watts, MHz and fractions of 1. A figure that a card, a driver or a
partition (MIG) does not give is None.
"""

import ctypes
import os
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import torch

MIB = 2**20
LITTLE = 64 * MIB  # in use on an idle card; not worth a word
# codes of nvmlReturn_t with which a card, a partition or a driver says that it does not give a figure:
# invalid argument (of partitions), not supported, no permission, not found, no such function, no data
ABSENT = {2, 3, 4, 6, 13, 21}
# bits of nvmlDeviceGetCurrentClocksEventReasons; left out: an idle card, and clocks that a person has set
SLOWING = {
    0x4: "power_cap",
    0x8: "hw_slowdown",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "power_brake",
    0x200: "board_limit",
    0x400: "reliability",
}


class NoCard(Exception):
    """There are no readings, or no more of them; the text says why."""


@dataclass(frozen=True, slots=True)
class Process:
    """One that has memory on a card. size: bytes, None where the driver keeps it to itself."""

    pid: int
    name: str
    size: int | None

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid}) {'unknown' if self.size is None else f'{self.size / MIB:.0f} MiB'}"


@dataclass(frozen=True, slots=True)
class Held:
    """What others hold of a card. size: bytes, of processes that cannot be seen from here too."""

    size: int
    processes: tuple[Process, ...]

    def __str__(self) -> str:
        unseen = self.size - sum(process.size or 0 for process in self.processes)
        rest = [f"not seen from here {unseen / MIB:.0f} MiB"] if unseen > LITTLE else []
        names = [*map(str, self.processes), *rest]
        return f"{self.size / MIB:.0f} MiB are held by other processes: {', '.join(names)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A card at one moment."""

    used: int | None  # bytes in use, by whomever, without what the driver keeps for itself
    own: int | None  # bytes of this process; None also where it cannot be told which one this is
    joules: float | None  # of the whole card, since the driver was loaded
    watts: float | None
    busy: float | None  # fraction of the last moments (1/6 to 1 s) in which a kernel ran
    sm_mhz: float | None
    slowed: tuple[str, ...] | None  # what holds the clocks down, names of SLOWING

    @property
    def missing(self) -> list[str]:
        return [field.name for field in fields(self) if getattr(self, field.name) is None]


class Card:
    """One GPU, found by `open_card`. Its methods raise NoCard when the driver fails."""

    def __init__(self, nvml: ModuleType, handle: object):
        """nvml: the module pynvml. handle: of a card or of a partition of one."""
        self.nvml, self.handle = nvml, handle
        self.name: str = self.ask("nvmlDeviceGetName", self.handle) or "GPU"
        self.driver: str = self.ask("nvmlSystemGetDriverVersion") or "unknown"
        self.top_sm_mhz: float | None = self.ask("nvmlDeviceGetMaxClockInfo", self.handle, nvml.NVML_CLOCK_SM)

    def ask(self, function: str, *arguments: object) -> Any:
        """What an NVML function returns; None where there is no such figure."""
        call = getattr(self.nvml, function, None)  # older bindings have fewer
        if call is None:
            return None
        try:
            return call(*arguments)
        except self.nvml.NVMLError as error:
            if error.value in ABSENT:
                return None
            raise NoCard(f"{function}: {error}") from error

    def capacity(self) -> tuple[int | None, int | None]:
        """Bytes in use on the card, without what the driver keeps for itself, and bytes that it has."""
        found = self.ask("nvmlDeviceGetMemoryInfo", self.handle, self.nvml.nvmlMemory_v2)
        return (None, None) if found is None else (found.used, found.total)

    def memory(self) -> tuple[int | None, int | None]:
        """Bytes in use on the card, and of them this process's."""
        sizes = self.sizes()
        own_pid = self.own_pid(sizes)
        return self.capacity()[0], None if own_pid is None else sizes[own_pid]

    def sizes(self) -> dict[int, int | None]:
        """Bytes by process number."""
        found = self.ask("nvmlDeviceGetComputeRunningProcesses", self.handle) or []
        return {each.pid: each.usedGpuMemory for each in found}

    def own_pid(self, sizes: dict[int, int | None]) -> int | None:
        """Under which number the driver lists this process; None if it does not, or if that cannot be told.

        In a container with process numbers of its own the driver lists those of the host. Whoever has a context is
        listed, so a list of one is this process as soon as it has one.
        """
        if os.getpid() in sizes:
            return os.getpid()
        return next(iter(sizes)) if len(sizes) == 1 and torch.cuda.is_initialized() else None

    def held(self) -> Held | None:
        """What others hold; None where it is next to nothing, or cannot be told from what this process holds.

        It always can before this process has used CUDA.
        """
        sizes, used = self.sizes(), self.capacity()[0]
        own_pid = self.own_pid(sizes)
        own = (sizes[own_pid] or 0) if own_pid is not None else 0
        if torch.cuda.is_initialized() and own_pid is None:
            return None
        others = {pid: size for pid, size in sizes.items() if pid != own_pid}
        listed = sum(size or 0 for size in others.values())
        size = listed if used is None else max(listed, used - own)
        if not others and size < LITTLE:
            return None
        return Held(size, tuple(Process(pid, self.process_name(pid), held) for pid, held in sorted(others.items())))

    def process_name(self, pid: int) -> str:
        """The program, without its folder and its arguments, which may hold what is nobody's business."""
        try:
            words = (self.ask("nvmlSystemGetProcessName", pid) or "").split()
        except UnicodeDecodeError:  # of the bindings; a program may have any bytes in its name
            words = []
        return words[0].rpartition("/")[2] if words else "unknown"

    def read(self) -> Reading:
        used, own = self.memory()
        millijoules = self.ask("nvmlDeviceGetTotalEnergyConsumption", self.handle)
        milliwatts = self.ask("nvmlDeviceGetPowerUsage", self.handle)
        rates = self.ask("nvmlDeviceGetUtilizationRates", self.handle)
        bits = self.ask("nvmlDeviceGetCurrentClocksEventReasons", self.handle)
        return Reading(
            used=used,
            own=own,
            joules=None if millijoules is None else millijoules / 1e3,
            watts=None if milliwatts is None else milliwatts / 1e3,
            busy=None if rates is None else rates.gpu / 100,
            sm_mhz=self.ask("nvmlDeviceGetClockInfo", self.handle, self.nvml.NVML_CLOCK_SM),
            slowed=None if bits is None else tuple(name for bit, name in SLOWING.items() if bits & bit),
        )


def open_card(device: str) -> Card | NoCard:
    """The card that CUDA calls `device`, such as cuda:1; or why there are no readings of it. Makes no CUDA context."""
    try:
        import pynvml
    except ImportError:
        return NoCard("nvidia-ml-py is not installed; `pip install nvidia-ml-py`")
    try:
        pynvml.nvmlInit()
        return Card(pynvml, handle_of(pynvml, uuid_of(device)))
    except NoCard as error:
        return error
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            return NoCard("libnvidia-ml.so.1 is not there: no NVIDIA driver, or a container without its libraries")
        return NoCard(f"NVML: {error}")


def handle_of(nvml: ModuleType, uuid: str) -> object:
    """NVML's own name of a device of CUDA. Raises NoCard."""
    for kind in ("GPU", "MIG"):  # of a partition CUDA gives the partition's UUID
        try:
            return nvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}")
        except nvml.NVMLError as error:
            if error.value not in ABSENT:
                raise
    raise NoCard(f"NVML knows no GPU of the UUID {uuid}")


def uuid_of(device: str) -> str:
    """Of a device as CUDA counts them: NVML does not heed CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER. Raises NoCard."""
    index = torch.device(device).index
    number, raw, cuda = ctypes.c_int(), ctypes.create_string_buffer(16), driver()
    call(cuda, "cuDeviceGet", ctypes.byref(number), int(os.environ.get("LOCAL_RANK", 0)) if index is None else index)
    call(cuda, "cuDeviceGetUuid_v2", raw, number)
    text = raw.raw.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def count_cards() -> int:
    """How many devices CUDA sees; 0 without a driver."""
    number = ctypes.c_int()
    try:
        call(driver(), "cuDeviceGetCount", ctypes.byref(number))
    except NoCard:
        return 0
    return number.value


def driver() -> ctypes.CDLL:
    """CUDA's, below torch: it can be asked before torch has read its settings. Raises NoCard."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NoCard(f"the driver's libcuda.so.1 cannot be loaded: {error}") from error
    call(cuda, "cuInit", 0)
    return cuda


def call(cuda: ctypes.CDLL, name: str, *arguments: object) -> None:
    code = getattr(cuda, name)(*arguments)
    if code:
        raise NoCard(f"{name}: CUDA error {code}")
