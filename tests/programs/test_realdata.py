"""A Hugging Face model with a byte-level tokenizer on real problems, by the commands of the README."""

import json

import pytest

from support.folders import byte_model
from support.run_folders import rows

pytestmark = [pytest.mark.realdata, pytest.mark.slow]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """A tiny Qwen2 with random weights and a tokenizer of single bytes with a chat template."""
    return byte_model(tmp_path_factory.mktemp("random-qwen2"))


def test_training_on_gsm8k(run_fastrl, random_model, data_dir, tmp_path):
    done = run_fastrl(
        "train",
        "--model",
        random_model,
        "--data",
        data_dir / "gsm8k/train.jsonl",
        "--steps",
        3,
        "--problems-per-step",
        4,
        "--group-size",
        4,
        "--max-new-tokens",
        32,
        "--kl",
        0.01,
        "--minibatches",
        2,
    )
    assert done.returncode == 0, done.stderr
    assert "7473 problems" in done.stdout and "<|im_start|>assistant" in done.stdout
    steps = [r for r in rows(tmp_path / "runs/default") if "reward" in r]
    assert len(steps) == 3 and all(0 <= r["completions/clipped_ratio"] <= 1 for r in steps)
    # an untrained model boxes nothing and is cut off; every completion is accounted for by class
    assert all(sum(v for k, v in r.items() if k.startswith("rewards/status/")) == 16 for r in steps)


@pytest.mark.parametrize("name", ["gsm8k", "math500", "minerva"])
def test_evaluation_on_real_sets(name, run_fastrl, random_model, data_dir):
    done = run_fastrl(
        "evaluate",
        "--model",
        random_model,
        "--data",
        data_dir / name / "test.jsonl",
        "--k",
        2,
        "--limit",
        20,
        "--max-new-tokens",
        16,
        "--max-prompt-tokens",
        3000,
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])
    assert 18 <= scores["num_problems"] <= 20  # some golds of Minerva cannot be read, and are listed
    assert scores["avg@2"] == 0 and scores["avg@2/ci95_high"] > 0.05
