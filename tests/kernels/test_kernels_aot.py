"""Every kernel compiles for sm_90 without a GPU, and into what tests/golden/kernels_sm90.json says or better.

A change that moves the table on purpose: TRITON_INTERPRET=0 python tests/support/aot.py --golden
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
GOLDEN = json.loads((TESTS / "golden" / "kernels_sm90.json").read_text())


@pytest.fixture(scope="module")
def compiled() -> dict:
    # the interpreter takes the place of the compiler in a whole process
    command, environment = [sys.executable, TESTS / "support" / "aot.py"], {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


@pytest.mark.slow
def test_no_kernel_is_left_out(compiled):
    by_nvcc = {name for name in GOLDEN["kernels"] if name.startswith("fastrl_")}
    missing = GOLDEN["kernels"].keys() - compiled["kernels"].keys()
    assert missing in (set(), by_nvcc), "a machine without nvcc compiles Triton's only"
    assert compiled["kernels"].keys() <= GOLDEN["kernels"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN["kernels"])
def test_a_kernel_compiles_into_what_it_was(compiled, name):
    if name not in compiled["kernels"]:
        # fastrl needs no CUDA toolkit: without one Triton takes the place of csrc/
        pytest.skip("no nvcc on PATH, so csrc/flat_update.cu cannot be compiled")
    found, golden = compiled["kernels"][name], GOLDEN["kernels"][name]
    assert found["spilled_bytes"] == 0 and found.get("f64", 0) == 0
    assert found["programs"] >= golden["programs"], "fewer programs fit on a multiprocessor"
    if name.startswith("fastrl_") or compiled["triton"] == GOLDEN["triton"]:
        assert found["registers"] <= golden["registers"] and found["shared_bytes"] <= golden["shared_bytes"]
    for accesses in ("loads_128", "stores_128"):
        assert found[accesses] == golden[accesses]
    if name.startswith("row_gradient"):
        assert found["barrier"], "a row is written over itself"
    if name.startswith(("row_gradient", "flat_update", "fastrl_")):
        assert found["loads_128"] and found["stores_128"], "a kernel of the bandwidth's speed moves 16 bytes at a time"
