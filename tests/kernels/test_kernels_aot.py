"""Every kernel compiles for sm_90 without a GPU, and into what tests/golden/kernels_sm90.json says or better.

A change that moves the table on purpose: TRITON_INTERPRET=0 python tests/support/aot.py --golden
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
GOLDEN = json.loads((TESTS / "golden" / "kernels_sm90.json").read_text())


def complaints(name: str, found: dict[str, int], golden: dict[str, int], *, registers: bool) -> Iterator[str]:
    """registers: whether the same compiler made both."""
    if found["spilled_bytes"] or found.get("f64", 0):
        yield "it spills, or computes in float64"
    if found["programs"] < golden["programs"]:
        yield "fewer programs fit on a multiprocessor"
    if registers and (found["registers"] > golden["registers"] or found["shared_bytes"] > golden["shared_bytes"]):
        yield "it takes more registers or shared memory"
    if any(found[kind] != golden[kind] for kind in ("loads_128", "stores_128")):
        yield "it moves 16 bytes at a time elsewhere"
    if name.startswith("row_gradient") and not found["barrier"]:
        yield "a row is written over itself"
    at_bandwidth = name.startswith(("row_gradient", "flat_update", "fastrl_")) and not {"odd", "one"} & {
        *name.split("-")
    }
    if at_bandwidth and not (found["loads_128"] and found["stores_128"]):
        yield "a kernel of the bandwidth's speed does not move 16 bytes at a time"


@pytest.mark.slow
def test_kernels_compile_into_what_they_were():
    # the interpreter takes the place of the compiler in a whole process
    command, environment = [sys.executable, TESTS / "support" / "aot.py"], {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    made = json.loads(ran.stdout)
    by_nvcc = {name for name in GOLDEN["kernels"] if name.startswith("fastrl_")}
    missing = GOLDEN["kernels"].keys() - made["kernels"].keys()
    assert missing in (set(), by_nvcc), "a machine without nvcc compiles Triton's only"
    assert made["kernels"].keys() <= GOLDEN["kernels"].keys()
    said = []
    for name, found in made["kernels"].items():
        golden, same = GOLDEN["kernels"][name], name in by_nvcc or made["triton"] == GOLDEN["triton"]
        said += [f"{name}: {text}; {found}, was {golden}" for text in complaints(name, found, golden, registers=same)]
    assert not said, "\n".join(said)


def test_each_way_to_be_worse_is_seen():
    golden = GOLDEN["kernels"]["row_gradient-fp32-bf16"]
    for worse, text in [
        (dict(spilled_bytes=8), "spills"),
        (dict(f64=1), "float64"),
        (dict(programs=golden["programs"] - 1), "fewer programs"),
        (dict(registers=golden["registers"] + 1), "more registers"),
        (dict(loads_128=golden["loads_128"] + 1), "elsewhere"),
        (dict(barrier=0), "written over itself"),
        (dict(loads_128=0), "does not move 16 bytes"),
    ]:
        name = "row_gradient-fp32-bf16"
        assert any(text in said for said in complaints(name, golden | worse, golden, registers=True)), text
        assert not list(complaints(name, golden, golden, registers=True))
    more = golden | dict(registers=golden["registers"] + 1)
    assert not list(complaints("row_gradient-fp32-bf16", more, golden, registers=False))
    scalar = golden | dict(loads_128=0, stores_128=0)
    assert not list(complaints("row_gradient-fp32-bf16-odd", scalar, scalar, registers=True))
