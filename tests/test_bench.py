"""The benchmarks of single operations, as far as they go without a GPU: their gates, and that a model is called one."""

import json
import subprocess
import sys
from pathlib import Path

import bench_flat_update
import bench_linear_policy_loss
import pytest
import torch

from fastrl.kernels import rows

BENCH = Path(__file__).parent.parent / "bench"
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="prints measured figures on a GPU")


@needs_no_gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bench_flat_update", "bench_linear_policy_loss"])
def test_without_a_gpu_there_are_only_figures_of_a_model(name, tmp_path):
    out = tmp_path / "result.json"
    ran = subprocess.run([sys.executable, BENCH / f"{name}.py", "--out", out], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout.splitlines()[-1])
    assert document == json.loads(out.read_text())
    assert document["measured"] is False and document["gpu"] is None
    assert all("not measured" in row["provider"] for row in document["rows"]) and document["rows"]


def test_the_model_by_hand():
    # 14 bytes times 1.5e9 over 0.9 * 3.35e12 per second; six products of N H V at 0.72 * 989e12
    assert bench_flat_update.modelled("interpolate", 1_500_000_000)["ms"] == pytest.approx(6.965, abs=1e-3)
    row = bench_linear_policy_loss.modelled(16384, 1536, 151936)
    assert row["products_ms"] == pytest.approx(32.22, abs=0.01) and row["rows_ms"] == pytest.approx(8.256, abs=1e-3)


@pytest.mark.parametrize("mode", bench_flat_update.BYTES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_gate_of_flat_updates(mode, backend, monkeypatch):
    assert bench_flat_update.gate(mode, backend, "cpu", n=4096) < 5e-6
    right = bench_flat_update.update

    def wrong(mode, shards, backend):
        right(mode, shards, backend)
        if shards["half"] is not None:
            shards["theta"] *= 1 + 2e-5

    monkeypatch.setattr(bench_flat_update, "update", wrong)
    with pytest.raises(SystemExit, match=f"{mode} on {backend} is off by .*no times"):
        bench_flat_update.gate(mode, backend, "cpu", n=4096)


def test_foreach_does_the_same_work():
    for mode in bench_flat_update.BYTES:
        ours, theirs = (bench_flat_update.shards(4096, "cpu") for _ in range(2))
        bench_flat_update.update(mode, ours, "torch")
        bench_flat_update.foreach(mode, theirs)
        moved = (ours["theta"] - ours["anchor"]).norm()
        assert (theirs["theta"] - ours["theta"]).norm() < 0.2 * moved, mode  # of displacements it takes no decay


@pytest.mark.parametrize("name", ["fastrl", "fastrl, recomputing", "fastrl, torch"])
def test_the_gate_of_the_head(name, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_V", 256)
    assert bench_linear_policy_loss.gate(name, 32, "cpu", rows=8, words=500) < 0.01
    monkeypatch.setitem(bench_linear_policy_loss.LOSS, "epsilon", (0.2, 0.28))
    monkeypatch.setattr(bench_linear_policy_loss, "providers", lambda x, g: {name: lambda: 1.2 * x["hidden"]})
    with pytest.raises(SystemExit, match="is off by .* of the gradient's norm: no times"):
        bench_linear_policy_loss.gate(name, 32, "cpu", rows=8, words=500)
