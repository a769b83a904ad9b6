"""Every Triton kernel compiles for sm_90 without a GPU, and stays within its registers: no spills, no float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# registers: the highest that leaves two programs per multiprocessor (64 for 512 threads), or as found, rounded up.
# loads, stores: 16-byte accesses that must be there
BUDGET = {
    "policy_loss-clip-old": (80, 2, 2), "policy_loss-clip-old-ref": (96, 2, 2), "policy_loss-clip": (80, 2, 2),
    "policy_loss-cispo-old": (80, 2, 2), "policy_loss-cispo-old-ref": (96, 2, 2), "policy_loss-cispo": (80, 2, 2),
    "policy_loss-pg-old": (80, 2, 2), "policy_loss-pg-old-ref": (96, 2, 2), "policy_loss-pg": (80, 2, 2),
    "apo_loss": (64, 0, 0),  # completions start anywhere
    "row_forward-fp32": (64, 4, 0), "row_forward-fp32-entropy": (64, 4, 0), "row_forward-bf16": (64, 2, 0),
    "row_forward-bf16-entropy": (64, 2, 0), "row_gradient-fp32": (64, 4, 4), "row_gradient-fp32-entropy": (64, 4, 4),
    "row_gradient-bf16": (64, 4, 2), "row_gradient-bf16-entropy": (64, 4, 2), "flat_update-interpolate": (64, 4, 3),
    "flat_update-gradients": (96, 8, 3), "flat_update-displacements": (96, 6, 3),
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    script = Path(__file__).with_name("aot.py")
    # the interpreter takes the place of the compiler in a whole process
    ran = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


@pytest.mark.slow
def test_no_kernel_is_left_out(compiled):
    assert compiled.keys() == BUDGET.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", BUDGET)
def test_no_spills_no_float64_and_wide_accesses(compiled, name):
    registers, loads, stores = BUDGET[name]
    found = compiled[name]
    assert found["spilled_bytes"] == 0 and found["f64"] == 0
    assert found["registers"] <= registers
    assert (found["loads_128"], found["stores_128"]) == (loads, stores)
    assert found["barrier"] or not name.startswith("row_gradient"), "a row is written over itself"
