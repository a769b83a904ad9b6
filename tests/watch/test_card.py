"""What the driver says of a card, read from a stand-in of its libraries."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import nvml

pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return nvml.build(tmp_path_factory.mktemp("driver"))


READ = """
from fastrl.watch.card import Card, NoCard, Process, open_card
card = open_card("cuda:0")
readings(f"name 4711 /opt/venv/bin/python3 serve.py --key 12", used=3 * 2**30, reasons=0x1 | 0x4 | 0x40, busy=75)
assert (card.name, card.driver, card.top_sm_mhz) == ("Stand-in 0", "580.95.05", 1980)
now = card.read()
assert (now.used, now.own, now.joules, now.watts, now.busy, now.sm_mhz) == (3 * 2**30, None, 5000, 300, 0.75, 1410)
assert now.slowed == ("power_cap", "hw_thermal")  # 0x1 is an idle card
assert card.capacity() == (3 * 2**30, 80 * 2**30) and card.memory() == (3 * 2**30, None)

# in a card's or driver's place that does not tell: None, and the name of what is missing
readings("nvmlDeviceGetPowerUsage fails 4", millijoules=None, reasons=None, total=None, busy=None)
now = card.read()
assert now.missing == ["used", "own", "joules", "watts", "busy", "slowed"] and now.sm_mhz == 1410
readings("nvmlDeviceGetPowerUsage fails 15")
try:
    card.read()
except NoCard as error:
    assert str(error) == "nvmlDeviceGetPowerUsage: GPU is lost", error
else:
    assert False

# bindings without a function are as a driver without it
import pynvml
del pynvml.nvmlDeviceGetCurrentClocksEventReasons
readings(reasons=4)
assert card.read().slowed is None
"""


def test_readings_by_hand(tmp_path, driver):
    nvml.run_script(tmp_path, driver, READ)


HELD = """
import torch
from fastrl.watch.card import Held, Process, open_card
readings(f"0 process 0 {2 * 2**30}", used=2 * 2**30 + 2**20)
card = open_card("cuda:0")
assert card.memory() == (2 * 2**30 + 2**20, 2 * 2**30) and card.held() is None

# another one, one that has ended since and has no name, and 1 GiB of who knows whom
three = [f"0 process 0 {2 * 2**30}", f"0 process 4711 {2**30}", f"0 process 99 {300 * 2**20}"]
readings(*three, "name 4711 /opt/venv/bin/python3 serve.py --key 12", used=4 * 2**30 + 300 * 2**20)
held = card.held()
assert held.size == 2 * 2**30 + 300 * 2**20
assert held.processes == (Process(99, "unknown", 300 * 2**20), Process(4711, "python3", 2**30))
assert str(held) == ("2348 MiB are held by other processes: unknown (pid 99) 300 MiB, python3 (pid 4711) 1024 MiB, "
                     "not seen from here 1024 MiB"), held

# names that are none
readings(f"0 process 4711 {2**30}", f"0 process 4712 {2**30}", "name 4711 \\udcff", "name 4712  ", used=2**31)
assert [process.name for process in card.held().processes] == ["unknown", "unknown"]

# the driver lists the host's numbers: before this process has a context none of them is its own
host = [f"0 process {10**7} {2**30}"]
readings(*host, used=2**30)
assert card.memory() == (2**30, None) and card.held().size == 2**30

# afterwards one alone can only be this process, and of two nobody knows; no figure is better than a wrong one
torch.cuda.is_initialized = lambda: True
assert card.memory() == (2**30, 2**30) and card.held() is None
readings(*host, f"0 process {10**7 + 1} {2**30}", used=2**31)
assert card.memory() == (2**31, None) and card.held() is None

# memory of the process that the driver keeps to itself
readings(f"0 process 0 {2**64 - 1}", used=2**30)
assert card.memory() == (2**30, None)
"""


def test_whose_memory_it_is(tmp_path, driver):
    nvml.run_script(tmp_path, driver, HELD)


WHICH = """
from fastrl.watch.card import NoCard, count_cards, open_card
readings(cards=3, card=1, used=1)
readings(card=2, used=2, partition=1)
assert count_cards() == 3 and [open_card(f"cuda:{i}").memory()[0] for i in range(3)] == [2**30, 1, 2]
os.environ["CUDA_VISIBLE_DEVICES"] = "2,1"
assert count_cards() == 2 and [open_card(f"cuda:{i}").memory()[0] for i in range(2)] == [2, 1]
assert str(open_card("cuda:2")) == "cuDeviceGet: CUDA error 101"
os.environ["LOCAL_RANK"] = "1"
assert open_card("cuda").memory()[0] == 1
os.environ["CUDA_VISIBLE_DEVICES"] = "7"
assert str(open_card("cuda:0")) == "NVML knows no GPU of the UUID 00000000-0000-0000-0000-000000000007"
readings("nvmlInitWithFlags fails 9")
assert str(open_card("cuda:0")) == "NVML: Driver Not Loaded"
import sys
sys.modules["pynvml"] = None
assert str(open_card("cuda:0")) == "nvidia-ml-py is not installed; `pip install nvidia-ml-py`"
assert isinstance(open_card("cuda:0"), NoCard)
"""


def test_a_device_of_cuda_is_found_among_those_of_the_driver(tmp_path, driver):
    nvml.run_script(tmp_path, driver, WHICH)


def doctor(driver: Path, **more: str) -> str:
    """The lines on the GPU, with the loader's path as the only difference from a user's call."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(driver), "NVML_STANDIN": str(driver / "doctor.txt"), **more}
    done = subprocess.run(
        [sys.executable, "-m", "fastrl.doctor"], capture_output=True, text=True, env=environment, cwd=driver
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout[done.stdout.index("gpu ") : done.stdout.index("machine ")]


def test_the_doctor_says_who_else_is_there_and_what_slows_the_card(driver):
    (driver / "doctor.txt").write_text(
        "cards 2\ndriver 580.95.05\n0 total 85899345920\n0 used 2147483648\n0 busy 100\n0 milliwatts 345600\n"
        "0 sm_mhz 1200\n0 top_sm_mhz 1980\n0 reasons 64\n0 millijoules 1\n0 process 4711 1073741824\n"
        "name 4711 /usr/bin/python3 -m vllm\n1 partition 1\n1 total 10737418240\n1 used 0\n"
    )
    lines = [line.strip() for line in doctor(driver).splitlines()]
    assert lines[:4] == [
        "gpu        cuda:0 Stand-in 0, driver 580.95.05: 2048 of 81920 MiB in use, busy 100%, 346 W, "
        "SM 1200 of 1980 MHz, clocks held down by hw_thermal",
        "cuda:0 2048 MiB are held by other processes: python3 (pid 4711) 1024 MiB, not seen from here 1024 MiB",
        "cuda:1 Stand-in 1, driver 580.95.05: 0 of 10240 MiB in use",
        "cuda:1 does not tell: joules, watts, busy, sm_mhz, slowed",
    ]
    assert "install its build for CUDA" in lines[4] and len(lines) == 5


def test_the_doctor_says_what_is_missing(driver, tmp_path):
    for name in nvml.LIBRARIES:
        (tmp_path / name).write_bytes(b"")  # found before those of a driver, and no library
    assert " ".join(doctor(driver, LD_LIBRARY_PATH=str(tmp_path)).split()) == (
        "gpu cuda:0 cannot be read: libnvidia-ml.so.1 is not there: no NVIDIA driver, "
        "or a container without its libraries"
    )
