"""Numbers that are not finite, put into the real program: no rank takes the step, and a person can see what it was."""

import json
import math
import os
import subprocess
import sys

import pytest

from fastrl.base.faults import from_environment
from fastrl.base.types import NumericsError
from support.cases import mostly_later
from support.run_folders import rows
from support.trainers import make_trainer

# no evaluation and one microbatch: step n is visit n of every point, but for logits
RECIPE = """
model = "embedded"
data = "arithmetic"
problems_per_step = 8
max_new_tokens = 10
save_every = 1
keep = 99
threads = 1
reward_workers = 1
[task]
max_prompt_tokens = 32
[objective]
kl = 0.01
is_correction = "{correction}"
[allocation]
group_size = 4
[optim]
lr = 1e-4
"""
# point -> what is named in bad/step-N.json, besides what follows from it
POINTS = {
    "loss": "loss",
    "grad": "policy gradient",
    "logits": "logprobs",
    "reward": "reward",
    "credit": "credit",
    "ref_logprobs": "ref_logprobs",
}
ENGINE = ("nan", "none", "-inf")  # what it gives as a log-probability
RUNS = {
    "nan, where they are used": ("tis", dict.fromkeys(POINTS, "nan")),
    "inf, where they are not": ("none", dict.fromkeys(POINTS, "inf") | {"grad": "-inf", "credit": "-inf"}),
}


def injections(values: dict[str, str], rank: int, forwards: int) -> list[tuple[int, str, str]]:
    """(step, what is to be named, FASTRL_FAULT) of every second step."""
    parts = [(POINTS[point], value, point) for point, value in values.items()]
    parts += [("rollout_logprobs", value, "rollout_logprobs") for value in ENGINE]
    return [
        (step, named, f"{value}@{point}:rank{rank}:{step * (forwards if point == 'logits' else 1)}")
        for step, (named, value, point) in zip(range(2, 2 * len(parts) + 1, 2), parts, strict=True)
    ]


def digests(folder, step: int) -> list[int]:
    """Checksums of the weights and of both ranks' masters and optimizer states."""
    files = json.loads((folder / f"checkpoints/step-{step}/MANIFEST.json").read_text())["files"]
    return [
        files[name]["crc32"] for name in ("model.safetensors", "optim-rank0.safetensors", "optim-rank1.safetensors")
    ]


@pytest.mark.slow
@pytest.mark.promise("B1", trials=9)
@pytest.mark.parametrize(
    "name, rank", mostly_later([(name, rank) for name in RUNS for rank in (0, 1)], ("nan, where they are used", 1))
)
def test_no_rank_takes_a_step_on_a_number_that_is_none(name, rank, tmp_path):
    correction, values = RUNS[name]
    (tmp_path / "run.toml").write_text(RECIPE.format(correction=correction))
    # logits are made for the reference and for the loss, and with a correction for the old policy
    planned = injections(values, rank, forwards=3 if correction == "tis" else 2)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "fastrl.train",
        tmp_path / "run.toml",
        "--out",
        tmp_path / "run",
        "--steps",
        "19",
    ]
    environment = {**os.environ, "FASTRL_FAULT": ",".join(fault for *_, fault in planned)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    folder, bad = tmp_path / "run", {step: named for step, named, _ in planned}
    steps = [row for row in rows(folder) if "reward" in row]
    assert len(steps) == 19 and len(bad) == 9
    for row in steps:
        step = row["step"]
        assert row["skipped"] == float(step in bad) and row["skipped_total"] == len([n for n in bad if n <= step])
        if step > 1:
            now, before = digests(folder, step), digests(folder, step - 1)
            assert now == before if step in bad else all(a != b for a, b in zip(now, before, strict=True))
        if step in bad:
            assert not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"])
            found = json.loads((folder / f"bad/step-{step}.json").read_text())
            assert bad[step] in found["not_finite"][f"rank {rank}"], (step, found["not_finite"])
            assert found["not_finite"][f"rank {1 - rank}"] == {}, (step, found["not_finite"])
            assert found["refused"]["policy"] and len(found["rows"]) == 32
    assert {path.name for path in (folder / "bad").iterdir()} == {f"step-{step}.json" for step in bad}


@pytest.mark.slow
@pytest.mark.promise("B2")
def test_a_run_that_stays_broken_ends_with_the_weights_from_before(run_fastrl, tmp_path):
    done = run_fastrl(
        "train",
        "--problems-per-step",
        4,
        "--eval-limit",
        4,
        "--steps",
        20,
        "--save-every",
        4,
        "--out",
        "run",
        FASTRL_FAULT="nan@grad:5+",
    )
    assert done.returncode == 4
    assert "3 steps in a row were refused, the last because grad_norm is nan" in done.stderr
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["exit_code"], status["step"], status["last_checkpoint"]) == (4, 7, "run/checkpoints/step-4")
    steps = [row for row in rows(tmp_path / "run") if "reward" in row]
    assert [row["skipped_total"] for row in steps] == [0, 0, 0, 0, 1, 2, 3]
    assert [math.isnan(row["grad_norm"]) for row in steps] == [False] * 4 + [True] * 3
    assert sorted(p.name for p in (tmp_path / "run/bad").iterdir()) == [f"step-{n}.json" for n in (5, 6, 7)]


RULES = {
    "sfpo": (["--update", "sfpo"], "nan@loss:9+", 5),  # four passes a step
    "gxpo": (["--update", "gxpo"], "inf@credit:3+", 5),
    "critic": (["--objective", "ppo", "--critic.optim.lr", 1e-3], "nan@reward:4+", 5),  # the first visit is evaluation
    "one in three": ([], ",".join(f"nan@grad:{n}" for n in range(3, 50, 3)), 33),
}


@pytest.mark.promise("B2")
@pytest.mark.parametrize("name", mostly_later(list(RULES), "gxpo"))
def test_every_rule_gives_up_after_as_many_training_steps(name, tmp_path, planned):
    flags, fault, last = RULES[name]
    planned(fault)
    trainer = make_trainer(
        tmp_path, "--problems-per-step", 2, "--group-size", 4, "--eval-limit", 1, "--eval-k", 1, "--steps", 50, *flags
    )
    with pytest.raises(NumericsError, match="11 of the last 1000" if last == 33 else "3 steps in a row"):
        trainer.run()
    assert trainer.completed == last and trainer.learner.policy.flat.weights.isfinite().all()
    assert all(tensor.isfinite().all() for _, tensor in trainer.learner.state_tensors() if tensor.is_floating_point())


def test_what_is_kept_of_a_bad_step_is_what_a_person_needs(tmp_path, planned):
    planned("nan@reward:2")  # of the second step: nothing has been evaluated
    trainer = make_trainer(tmp_path, "--problems-per-step", 4, "--group-size", 4, "--eval-limit", 2)
    trainer.step()
    before = {name: tensor.clone() for name, tensor in trainer.learner.state_tensors()}
    metrics = trainer.step()
    assert metrics["skipped"] == 1 and math.isnan(metrics["loss"]) and math.isnan(metrics["reward"])
    assert all((before[name] == tensor).all() for name, tensor in trainer.learner.state_tensors())
    found = json.loads((tmp_path / "bad/step-2.json").read_text())
    assert found["step"] == 2 and found["refused"] == {"policy": ["loss is nan"]} and found["completions"] == 16
    assert found["not_finite"]["rank 0"]["reward"] == 1 and found["not_finite"]["rank 0"]["credit"] == 4  # its group
    first = found["rows"][0]
    assert not math.isfinite(first["credit"]) and len(found["rows"]) == 16
    assert first["id"].startswith("arithmetic/train/") and first["prompt"].endswith("=") and first["tokens"] > 0
    assert first["rollout_logprobs"]["not_finite"] == 0 and first["rollout_logprobs"]["mean"] < 0
    assert set(first) >= {"completion", "finish_reason", "rewards", "reward", "rank", "old_logprobs"}
    trainer.step()
    assert len(list((tmp_path / "bad").iterdir())) == 1


def test_a_bad_step_of_long_texts_is_bounded(tmp_path):
    from fastrl.watch.bad_step import CHARACTERS, short

    text = short("x" * 10 * CHARACTERS)
    assert text == "x" * CHARACTERS + f"... ({10 * CHARACTERS} characters)"
    assert from_environment().planned == []
