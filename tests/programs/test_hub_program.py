"""Training by names of the hub as a user does: in an empty folder, without a network, and where a branch has moved."""

import json
import os
import subprocess
import sys

import pytest

from fastrl import evaluate, train
from fastrl.base.types import DataError
from fastrl.data import DATASETS
from support.folders import byte_model
from support.hub_server import jsonl, parquet, serve
from support.run_folders import rows

PIN = DATASETS["gsm8k"].revision
PROBLEMS = [{"question": f"What is {n} and 1?", "answer": f"It is.\n#### {n + 1}"} for n in range(8)]
SHORT = ["--steps", 1, "--problems-per-step", 2, "--group-size", 2, "--max-new-tokens", 4, "--threads", 1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return byte_model(tmp_path_factory.mktemp("model"))


def gsm8k() -> dict[str, bytes]:
    names = {"train": PROBLEMS, "test": PROBLEMS[:2]}
    return {f"main/{split}-00000-of-00001.parquet": parquet(rows) for split, rows in names.items()}


def start(folder, cache, *args, **environment):
    """`python -m fastrl.train` in `folder`; every way to a real hub is closed."""
    environment = {"HF_HOME": str(cache), "HF_HUB_ETAG_TIMEOUT": "2", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "fastrl.train", *map(str, args)]
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=200
    )


@pytest.mark.slow
def test_gsm8k_by_name_in_an_empty_folder(model, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    command = ["--model", model, "--data", "gsm8k", "--eval", "gsm8k", "--eval-k", 1, *SHORT]
    with serve() as server:
        server.push("datasets", "openai/gsm8k", gsm8k(), commit=PIN)
        lost = start(empty, tmp_path / "other", *command, HF_ENDPOINT="http://127.0.0.1:9")
        done = start(empty, tmp_path / "hf", *command, HF_ENDPOINT=server.url)
    assert lost.returncode == 3
    [line] = [line for line in lost.stderr.splitlines() if line.startswith("fastrl: error:")]
    assert line.startswith(f"fastrl: error: data set 'gsm8k': openai/gsm8k@{PIN} is not in the cache")
    assert line.endswith("run once with a network, or give the path of local files as --data")
    assert done.returncode == 0, done.stderr
    assert f"from openai/gsm8k@{PIN} main/train-00000-of-00001.parquet" in done.stdout
    assert "data: gsm8k (train): 8 problems, GSM8K: question + answer after ####" in done.stdout
    assert "<|im_start|>user\\nWhat is 0 and 1?" in done.stdout
    assert len([r for r in rows(empty / "runs/default") if "reward" in r]) == 1
    # the server is gone now
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        again = start(empty, tmp_path / "hf", *command, "--dry-run", **environment)
        assert again.returncode == 0, again.stderr
        assert "data: gsm8k (train): 8 problems" in again.stdout and "What is 0 and 1?" in again.stdout


def test_a_moved_branch_is_noticed_on_resume_and_in_evaluations(hub, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {"train.jsonl": jsonl(PROBLEMS), "test.jsonl": jsonl(PROBLEMS[:2])}
    first = hub.push("datasets", "me/sums", files)
    started = hub.push("models", "me/tiny", {path.name: path.read_bytes() for path in model.iterdir()})
    command = ["--model", "me/tiny", "--data", "me/sums", "--eval", "me/sums", "--eval-k", 1, *SHORT]
    command = [*map(str, command)]
    assert train.main(command) == 0
    config = json.loads((tmp_path / "runs/default/config.json").read_text())
    assert (config["data"], config["model"]) == (f"me/sums@{first}", f"me/tiny@{started}")
    assert config["evaluation"]["eval"] == [f"me/sums@{first}"]
    assert any("eval/me/sums/avg@1" in row for row in rows(tmp_path / "runs/default"))
    second = hub.push("datasets", "me/sums", files | {"train.jsonl": jsonl(PROBLEMS[::-1])})
    more = ["--steps", "2", "--resume", "auto"]
    capsys.readouterr()
    assert train.main([*command, *more]) == 6
    said = capsys.readouterr().err
    assert (
        f"data was me/sums@{first} and is now me/sums@{second}; start with the old one, or say --allow-change data"
        in said
    )
    at_first = [f"me/sums@{first}" if word == "me/sums" else word for word in command]
    assert train.main([*at_first, *more]) == 0
    moved = hub.push("models", "me/tiny", {path.name: path.read_bytes() for path in model.iterdir()} | {"x.txt": b""})
    capsys.readouterr()
    assert train.main([*at_first, "--steps", "3", "--resume", "auto"]) == 6
    assert f"model was me/tiny@{started} and is now me/tiny@{moved}" in capsys.readouterr().err
    evaluated = ["--model", "me/tiny", "--data", "me/sums", "--k", "1", "--max-new-tokens", "4"]
    assert evaluate.main(evaluated) == 0
    protocol = json.loads(capsys.readouterr().out.splitlines()[-1])["protocol"]
    assert (protocol["data"], protocol["model"]) == (f"me/sums@{second}", f"me/tiny@{moved}")


def test_a_dry_run_finds_what_would_end_the_run(hub, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [*map(str, ["--model", model, "--data", "gsm8k", *SHORT, "--dry-run"])]
    with pytest.raises(DataError, match="there is no data set"):
        train.main(command)
    hub.push("datasets", "openai/gsm8k", gsm8k(), commit=PIN)
    capsys.readouterr()
    assert train.main(command) == 0
    said = capsys.readouterr().out
    assert "data: gsm8k (train): 8 problems" in said and "tokens: <|im_start|>user\\nWhat is 0 and 1?" in said
    assert train.main([*command, "--log", "tensorboard"]) == 0
    monkeypatch.setitem(sys.modules, "wandb", None)
    for more, said in {
        "--log wandb": "--log wandb needs a package that is not installed",
        "--template-args enable_thinking=false": "the chat template reads nothing of this name",
        "--max-prompt-tokens 3": "none of the 8 prompts fits",
        "--split other": "has train, test but no split 'other'",
    }.items():
        with pytest.raises(ValueError, match=said):
            train.main([*command, *more.split()])
    assert not (tmp_path / "runs").exists()
