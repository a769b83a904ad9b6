"""The benchmarks of single operations, as far as they go without a GPU: their gates, and that a model is called one."""

import dataclasses
import importlib.metadata
import json
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import bench_apo_loss
import bench_attention
import bench_flat_update
import bench_linear_logprob
import bench_linear_policy_loss
import bench_policy_loss
import bench_split_adamw
import peak_memory
import pytest
import timing
import torch

from fastrl.kernels import rows

ROOT = Path(__file__).parents[2]
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="prints measured figures on a GPU")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEAD = (16, 32, 500)  # rows, hidden, words: two blocks of words

# benchmark and mode -> providers over fresh inputs
FRESH = {
    "linear_policy_loss": partial(bench_linear_policy_loss.fresh, *HEAD, DEVICE),
    **{f"linear_logprob, {mode}": partial(bench_linear_logprob.fresh, mode, *HEAD, DEVICE)
       for mode in bench_linear_logprob.MODES},
    **{f"policy_loss, {mode}": partial(bench_policy_loss.fresh, 1030, mode, DEVICE)
       for mode in bench_policy_loss.BYTES},
    "apo_loss": partial(bench_apo_loss.fresh, 1500, 6, DEVICE),
    "attention": partial(bench_attention.fresh, *bench_attention.GATE, DEVICE),
    **{f"flat_update, {mode}": partial(bench_flat_update.fresh, mode, 4096, DEVICE)
       for mode in bench_flat_update.BYTES},
    **{f"split_adamw, {mode}": partial(bench_split_adamw.fresh, mode, 4096, DEVICE)
       for mode in bench_split_adamw.MODES},
}  # fmt: skip
RIVALS = {"trl": "TRL", "liger_kernel": "Liger"}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_V", 256)


def worse(result):
    """The result with its first part off by a fifth, or with weights moved as far."""
    if isinstance(result, dict):
        return result | {"theta": result["theta"] * 1.2}
    return (result[0] * 1.2, *result[1:]) if isinstance(result, tuple) else result * 1.2


def refused(case: str, name: str, change=worse) -> None:
    """Whether a changed result of a provider gets no number: nothing of ours does, and a rival says how wrong it is."""
    provider = FRESH[case]()[name]
    wrong = dataclasses.replace(provider, call=lambda: change(provider.call()))
    ours = name.startswith("fastrl")
    with pytest.raises(SystemExit if ours else timing.Wrong, match="off by .*allowed" + (".*no times" if ours else "")):
        timing.gate(case, name, wrong)


@pytest.mark.parametrize("case", FRESH)
def test_the_gates_let_right_results_pass_and_refuse_wrong_ones(case):
    others = (*RIVALS.values(), "torch.compile")
    names = [name for name, made in FRESH[case]().items() if made.error and not name.startswith(others)]
    assert len(names) >= 2
    for name in names:
        assert timing.gate(case, name, FRESH[case]()[name]) < 0.05
        refused(case, name)


@pytest.mark.parametrize("package", RIVALS)
def test_rivals_are_right_and_would_be_refused(package):
    pytest.importorskip(package, reason=f"{package} is not installed")
    tried = 0
    for case, fresh in FRESH.items():
        for name in fresh():
            if name.startswith(RIVALS[package]):
                timing.gate(case, name, fresh()[name])
                refused(case, name)
                tried += 1
    assert tried >= 5


def test_a_wrong_weight_gradient_entropy_or_rounding_is_refused():
    refused("linear_policy_loss", "fastrl", lambda found: (found[0], found[1] * 1.2))
    refused("linear_logprob, gradient", "fastrl", lambda found: (found[0], found[1] * 1.2))
    refused("flat_update, interpolate", "foreach", lambda found: found | {"half": found["half"] * 1.01})


def test_another_loss_is_set_against_its_own():
    made = FRESH["linear_policy_loss"]()
    N, H, V = HEAD
    other = made["F.linear_cross_entropy (no RL loss)"]
    assert made["fastrl"].flop == other.flop == 6 * N * H * V
    assert made["fastrl"].error(other.call()) > 0.5 > 0.02 > other.error(other.call())


def test_the_model_by_hand():
    bench = [bench_linear_policy_loss, bench_linear_logprob, bench_policy_loss]
    loss, logprob, tokens = (
        b.modelled(*shape) for b, shape in zip(bench, [(16384, 1536, 151936)] * 2 + [(10**6,)], strict=True)
    )
    # 2 N H V = 7.648e12 at 0.72 * 989e12 per second is 10.74 ms; N V = 2.489e9 bytes over 0.9 * 3.35e12 are 0.8256 ms
    assert loss[0]["products_ms"] == pytest.approx(3 * 10.74, abs=0.01)
    assert loss[0]["memory_ms"] == pytest.approx(8.256, abs=1e-3)
    assert loss[0]["of_bare"] == pytest.approx(1 + 8.256 / 32.22, abs=1e-3)
    assert loss[0]["workspace_mib"] == 4096 * 151936 * 4 / 2**20
    assert [row["logits_read"] for row in loss] == ["twice", "once"]
    assert loss[1]["of_bare"] == pytest.approx(1 + 6 * 0.8256 / 32.22, abs=1e-3)
    assert logprob[0]["ms"] == pytest.approx(10.74 + 4 * 0.8256, abs=0.01)
    assert logprob[1]["ms"] == pytest.approx(4 * 10.74 + 14 * 0.8256, abs=0.02)
    assert logprob[1]["of_bare"] == pytest.approx((4 * 10.74 + 14 * 0.8256) / (3 * 10.74), abs=1e-3)
    assert [row["ms"] for row in tokens] == pytest.approx([20e6 / 3.015e9, 24e6 / 3.015e9])
    assert bench_apo_loss.modelled(10**6, 1024)[0]["ms"] == pytest.approx((14e6 + 16 * 1024) / 3.015e9)
    # 14, 12, 18 and 22 bytes times 1.5e9
    flat = [row["ms"] for row in bench_flat_update.modelled(1_500_000_000)]
    assert flat == pytest.approx([6.965, 5.970, 8.955, 10.945], abs=1e-3)
    assert loss[0]["ms_at_peak"] == pytest.approx(3 * 10.74 * 0.72 + 8.256 * 0.9, abs=0.02)


def test_rates_by_hand():
    bare = timing.Provider(lambda: None, flop=6e12, moved=3e9)
    head = timing.rates(timing.Provider(lambda: None, flop=6e12), 20.0, bare, 10.0)
    assert head == {"useful_tflops": pytest.approx(300.0), "of_bare": 2.0}
    # 2e9 bytes in 2 ms are 1000 GB/s, and the copy makes 3e9 in 1 ms
    assert timing.rates(timing.Provider(lambda: None, moved=2e9), 2.0, bare, 1.0) == {
        "gb_per_s": pytest.approx(1000.0),
        "of_copy": pytest.approx(1 / 3),
    }


def test_every_provider_has_a_row_and_only_what_is_right_a_time(monkeypatch):
    sampled = []

    def stand_in(calls, warmup, seconds):  # for what needs a GPU
        sampled.extend(calls)
        return {name: {"ms": 2.0, "ms_20": 1.0, "ms_80": 3.0, "issue_ms": 0.1} for name in calls}

    monkeypatch.setattr(timing, "sample", stand_in)
    monkeypatch.setattr(timing, "peak_mib", lambda call: call() and 5.0)

    def fails():
        raise RuntimeError("another GPU\nis needed")

    def runs_out():
        raise torch.OutOfMemoryError("of memory")

    def made(off: float = 0.0) -> dict[str, timing.Provider]:
        say = {"call": lambda: 1.0, "allowed": 0.1, "flop": 4e9}
        return {
            "fastrl": timing.Provider(error=lambda found: off, **say),
            "fastrl, large": timing.Provider(error=lambda found: 0.0, **{**say, "call": runs_out}),
            "rival": timing.Provider(error=lambda found: 0.05, **say),
            "wrong rival": timing.Provider(error=lambda found: 0.25, **say),
            "NaN rival": timing.Provider(error=lambda found: float("nan"), **say),
            "failing rival": timing.Provider(error=lambda found: 0.0, **{**say, "call": fails}),
            "bare": timing.Provider(lambda: 1.0, flop=4e9),
        }

    rows = {row["provider"]: row for row in timing.measure("b", made, made, yardstick="bare", case={"N": 3})}
    assert list(rows) == list(made()) and all(row["N"] == 3 for row in rows.values())
    assert sampled == ["fastrl", "rival", "bare"]
    assert {name: row["note"] for name, row in rows.items() if "note" in row} == {
        "fastrl, large": "out of memory",
        "wrong rival": "Wrong: off by 2.50e-01, allowed 1e-01",
        "NaN rival": "Wrong: off by nan, allowed 1e-01",
        "failing rival": "RuntimeError: another GPU",
    }
    assert all(("ms" in row) != ("note" in row) for row in rows.values())
    assert rows["rival"] | {"useful_tflops": 0} == {
        "N": 3,
        "provider": "rival",
        "error": 0.05,
        "peak_mib": 5.0,
        "ms": 2.0,
        "ms_20": 1.0,
        "ms_80": 3.0,
        "issue_ms": 0.1,
        "useful_tflops": 0,
        "of_bare": 1.0,
    }
    with pytest.raises(SystemExit, match="b: fastrl is off by 2.00e-01, allowed 1e-01: no times"):
        timing.measure("b", partial(made, off=0.2), made, yardstick="bare", case={})
    broken = {"fastrl": timing.Provider(fails, error=lambda found: 0.0)}
    with pytest.raises(RuntimeError, match="another GPU"):
        timing.measure("b", lambda: broken, lambda: broken, yardstick="fastrl", case={})


def operations() -> list[str]:
    """The benchmarks of single operations: all but those of whole parts of a run."""
    names = {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")}
    return sorted(names - {"step", "engine", "grading"})


@needs_no_gpu
@pytest.mark.parametrize("name", operations())
def test_without_a_gpu_there_are_only_figures_of_a_model(name, tmp_path, monkeypatch, capsys):
    out = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(out)])
    runpy.run_path(str(ROOT / "bench" / f"bench_{name}.py"), run_name="__main__")
    table, _, line = capsys.readouterr().out.strip().rpartition("\n")
    document = json.loads(line)
    assert document == json.loads(out.read_text())
    assert document["bench"] == name and document["measured"] is False and document["gpu"] is None
    assert {"torch", "triton", "cuda"} <= document["versions"].keys()
    assert document["rows"] and all(row["provider"] == timing.MODEL for row in document["rows"])
    assert table.count("not measured") == len(document["rows"])


KILLED = """
import os, sys
sys.path[:0] = {folders}
import timing

def modelled(n):
    yield {{"n": n, "ms": 1.0, "provider": "fastrl", "of_copy": 0.5}}
    if n == 2:
        os.kill(os.getpid(), 9)

sys.argv = ["bench", "--shape", "1", "--shape", "2", "--out", {out!r}]
timing.run("b", "", ["1"], modelled, modelled)
"""


def test_a_benchmark_that_is_killed_keeps_its_rows(tmp_path):
    out = tmp_path / "new" / "result.json"
    code = KILLED.format(folders=[str(ROOT / "bench"), str(ROOT)], out=str(out))
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    document = json.loads(out.read_text())
    assert [row["n"] for row in document["rows"]] == [1, 2] and document["complete"] is False
    assert document["says"] == "fastrl of_copy 0.50; fastrl of_copy 0.50" and "torch" in document["versions"]
    assert [path.name for path in out.parent.iterdir()] == ["result.json"]


def test_each_mode_of_a_benchmark_is_known_before_the_next_begins(monkeypatch):
    begun = []

    def stand_in(bench, small, large, *, case, **more):  # for what needs a GPU
        begun.append(case["mode"])
        return [case]

    for bench, shape, modes in [
        (bench_linear_logprob, HEAD, bench_linear_logprob.MODES),
        (bench_policy_loss, (8,), bench_policy_loss.BYTES),
        (bench_flat_update, (8,), bench_flat_update.BYTES),
        (bench_split_adamw, (8,), bench_split_adamw.MODES),
    ]:
        begun.clear()
        monkeypatch.setattr(bench, "measure", stand_in)
        for number, row in enumerate(bench.measured(*shape)):
            assert row["mode"] == begun[-1] and len(begun) == number + 1
        assert begun == list(modes)


def test_what_the_machine_lacks_costs_no_result(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("PATH", "")  # neither git nor nvidia-smi
    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(timing, "version", missing)
    found = timing.Report("b").document["versions"]
    assert found.keys() == {"python", "torch", "cuda"}


def test_peak_memory_without_a_gpu_is_planned(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peak_memory.py", "--case", "GRPO", "--case", "A*-PO", "--case", "GRPO, all"])
    peak_memory.main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["measured"] is False and document["note"] == "planned, not measured"
    grpo, apo, small = document["rows"]
    assert grpo["planned_backward_mib"] == pytest.approx(38266, rel=0.01)
    assert grpo["published_over_apo"] == pytest.approx(42.2 / 41.6) and apo["over_apo"] == 1
    assert small["over_apo"] < 0.6 and grpo["fits"]
    assert not any("measured" in key for row in document["rows"] for key in row)


@pytest.mark.slow
def test_peak_memory_runs_the_program_on_random_weights(tmp_path):
    """As on a GPU, which alone has measurements: a model in a known shape, its tokenizer, two steps."""
    config = dict(
        model_type="qwen2",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=1000,
        tie_word_embeddings=True,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    peak_memory.make_model(str(tmp_path / "config.json"), tmp_path / "model", "cpu")
    peak_memory.make_problems(tmp_path / "problems.jsonl", 16, 8)
    cpu = [
        "--engine",
        "hf",
        "--dtype",
        "float32",
        "--max-prompt-tokens",
        "8",
        "--max-new-tokens",
        "4",
        "--reward-workers",
        "1",
    ]
    arguments = (tmp_path / "model", tmp_path / "problems.jsonl", peak_memory.SETTINGS["math"])
    row = peak_memory.measured_row("GRPO", *arguments, tmp_path / "run", cpu)
    assert row.get("note") is None and row["step_s"] > 0
    broken = peak_memory.measured_row("GRPO", *arguments, tmp_path / "other", [*cpu, "--no-such-flag"])
    assert "there is no option --no-such-flag" in broken["note"]
