"""A stand-in for the driver's libraries, built by a C compiler: a machine with GPUs whose readings a test writes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support.programs import together

LIBRARIES = ("libnvidia-ml.so.1", "libcuda.so.1")
# the loader takes a library that is loaded already for the one of that name
LOAD = f"""
import ctypes, os
from support.nvml import Readings
for name in {LIBRARIES}:
    ctypes.CDLL(os.path.join({{folder!r}}, name))
readings = Readings({{folder!r}})
"""
USUAL = {
    "total": 80 * 2**30,
    "used": 2**30,
    "millijoules": 5_000_000,
    "milliwatts": 300_000,
    "busy": 75,
    "sm_mhz": 1410,
    "top_sm_mhz": 1980,
    "reasons": 0,
}


def build(folder: Path) -> Path:
    """The libraries, in a folder for LD_LIBRARY_PATH. Skips where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a stand-in for the driver with")
    source = Path(__file__).with_name("nvml.c")
    for name in LIBRARIES:
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
        subprocess.run(command, check=True)
    return folder


def run_script(folder: Path, driver: Path, script: str, count: int = 1) -> str:
    """What the text of a script says that has the stand-in of `build` loaded, and its `readings`; on `count` ranks."""
    return together(folder, LOAD.format(folder=str(driver)) + script, count=count)


class Readings:
    """What the stand-in answers from now on, in this process and in those that it starts."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / f"readings{os.getpid()}.txt"
        os.environ["NVML_STANDIN"] = str(self.path)
        self.cards: list[dict] = []
        self.more: list[str] = []
        self()

    def __call__(self, *more: str, card: int = 0, cards: int | None = None, **values: int | None) -> None:
        """values: of the card; None takes one away. more: further lines, in the place of those before."""
        if cards is not None or not self.cards:
            self.cards = [dict(USUAL) for _ in range(cards or 1)]
        self.cards[card] |= values
        self.more = list(more)
        lines = [f"cards {len(self.cards)}", "driver 580.95.05", *self.more]
        for number, own in enumerate(self.cards):
            lines += [f"{number} {key} {value}" for key, value in own.items() if value is not None]
        new = self.path.with_suffix(".new")
        new.write_text("".join(line + "\n" for line in lines), "utf-8", "surrogateescape")
        os.replace(new, self.path)
