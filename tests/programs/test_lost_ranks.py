"""A rank that is killed: the others are out at once and say why, and torchrun starts them again where they stopped."""

import hashlib
import json
import os
import random
import signal
import time

import pytest
import torch

from fastrl.base import ranks
from fastrl.base.types import EngineError
from support.arguments import SHORT_RUN
from support.process_trees import ProcessTree, until
from support.run_folders import rows, step_records

STEPS = 8


def digest(folder) -> dict[str, str]:
    """sha256 of weights, optimizer states and generators of the last checkpoint, of both ranks."""
    files = sorted((folder / f"checkpoints/step-{STEPS}").glob("*.safetensors"))
    assert len(files) >= 4
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def step_count(folder) -> int:
    return len([row for row in rows(folder) if "reward" in row]) if (folder / "metrics.jsonl").exists() else -1


@pytest.mark.slow
@pytest.mark.promise("E2")
def test_the_others_end_and_name_the_phase(tmp_path):
    run = ProcessTree(tmp_path, *SHORT_RUN, "--steps", STEPS, ranks=2, FASTRL_FAULT="kill@forward:rank1:10")
    folder = tmp_path / "runs/default"
    assert run.wait() != 0
    assert time.time() - (folder / "metrics.jsonl").stat().st_mtime < 60
    assert run.left() == []
    errors = run.err.read_text()
    assert "exitcode  : 5 " in errors and "exitcode  : -9 " in errors
    step = step_count(folder)
    said = "fastrl: error: rank 0 of 2 cannot reach the others any more: one of them has ended, or stands still ("
    assert said in errors and f"(step {step + 1}, phase update)" in errors
    status = json.loads((folder / "status.json").read_text())
    assert (status["reason"], status["exit_code"], status["phase"]) == ("EngineError", 5, "update")
    assert status["step"] == step and status["last_checkpoint"].endswith(f"step-{step // 2 * 2}")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The undisturbed run of two ranks."""
    folder = tmp_path_factory.mktemp("straight")
    assert ProcessTree(folder, *SHORT_RUN, "--steps", STEPS, ranks=2).wait() == 0
    return folder / "runs/default"


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.promise("E2")
@pytest.mark.parametrize("trial", range(10))
def test_torchrun_starts_them_again_and_nothing_has_changed(trial, straight, tmp_path):
    draw = random.Random(trial)
    run = ProcessTree(tmp_path, *SHORT_RUN, "--steps", STEPS, "--resume", "auto", ranks=2, restarts=3)
    folder = tmp_path / "runs/default"
    after = draw.randrange(-1, STEPS - 1)  # steps; -1: as soon as the run has a folder, before anything is saved
    began = folder / "config.json"
    assert until(began.exists) and until(lambda: step_count(folder) >= after)
    time.sleep(draw.uniform(0, 0.4))
    old = [run.rank(n) for n in (0, 1)]
    os.kill(old[1], signal.SIGKILL)
    killed = time.monotonic()
    assert until(lambda: not set(old) & set(run.living()), 60), "rank 0 outlives rank 1 by a minute"
    assert time.monotonic() - killed < 60
    assert run.wait() == 0, run.err.read_text()[-3000:]
    assert "exitcode  : 5 " not in run.err.read_text().rpartition("restart")[2]
    assert ("resume: step" in run.out.read_text()) == (
        "no checkpoint" not in run.out.read_text().rpartition("fastrl ")[2]
    )
    assert step_records(folder) == step_records(straight) and len(step_records(folder)) == STEPS
    assert digest(folder) == digest(straight)
    assert json.loads((folder / "status.json").read_text())["reason"] == "done"
    assert run.left() == []


def test_what_a_failed_collective_becomes(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    cause = RuntimeError("[/builds/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:9. This is typically ...")
    with pytest.raises(EngineError) as caught, ranks.reaching_others():
        raise cause
    assert str(caught.value) == (
        "rank 1 of 4 cannot reach the others any more: one of them has ended, or stands still (Connection closed by "
        "peer [127.0.0.1]:9)"
    )
    assert caught.value.__cause__ is cause and caught.value.exit_code == 5
    for other in (torch.OutOfMemoryError("out of memory"), ValueError("shapes")):  # these are what they are
        with pytest.raises(type(other)), ranks.reaching_others():
            raise other
