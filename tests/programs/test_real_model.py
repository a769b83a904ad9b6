"""A real model of 135 M parameters with its own tokenizer and template; `make test-real` brings it and runs these.

pytest tests/programs/test_real_model.py --real-model FOLDER
"""

import runpy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fastrl import checkpoint
from fastrl.engine.base import Request, Sampling
from fastrl.engine.hf import HFEngine
from fastrl.models.check import check_model
from fastrl.models.loading import load_model
from support.run_folders import digest, rows, step_records

pytestmark = [pytest.mark.real, pytest.mark.slow]
SUMS = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "real_model" / "sums.py"))
QUESTIONS = [
    "What is the capital of France?", "Write a haiku about rain.", "2 + 2", "Why is the sky blue?",
    "List three fruits.", "Translate 'cat' into Spanish.", "Who wrote Hamlet?", "Say hello.",
]  # fmt: skip
TOKENS = 24
SHORT = """
    --problems-per-step 4 --group-size 4 --max-new-tokens 4 --lr 1e-5 --limit 8 --threads 2
""".split()
METHODS = {
    "grpo": [],
    "sfpo": ["--update", "sfpo"],
    "gxpo": ["--update", "gxpo"],
    "apo": ["--objective", "apo", "--allocation", "uniform", "--group-size", 1, "--num-profile-completions", 2],
}


@pytest.fixture(scope="module")
def loaded(real_model):
    return load_model(real_model, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def prompts(loaded) -> list[list[int]]:
    encode = loaded.tokenizer.apply_chat_template
    return [
        encode([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False) for text in QUESTIONS
    ]


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sums")
    SUMS["write"](folder)
    return folder


def own_greedy(loaded, prompt: list[int]) -> list[int]:
    """What transformers' generate says."""
    with torch.no_grad():
        ids = torch.tensor([prompt])
        said = loaded.model.generate(ids, do_sample=False, max_new_tokens=TOKENS, attention_mask=torch.ones_like(ids))
    return said[0, len(prompt) :].tolist()


def test_eight_greedy_completions_are_those_of_generate(loaded, prompts):
    engine = HFEngine.of(loaded, max_num_seqs=64)
    requests = [Request(prompt_ids=prompt, seeds=[0]) for prompt in prompts]
    ours = engine.sample(requests, Sampling(temperature=0.0, max_new_tokens=TOKENS))
    for prompt, (completion,) in zip(prompts, ours, strict=True):
        assert completion.token_ids == own_greedy(loaded, prompt)


def test_engine_and_trainer_are_the_model(loaded, real_model):
    assert max(check_model(loaded).values()) < 1e-4
    in_bfloat16 = check_model(load_model(real_model, dtype=torch.bfloat16, device="cpu"))
    assert 1e-3 < max(in_bfloat16.values()) < 1.0 and in_bfloat16["head"] < 0.2


@pytest.fixture
def train(run_fastrl, real_model, sums):
    """Short runs on sums, whatever their method."""
    file = Path(__file__).parents[2] / "examples" / "real_model" / "sums.py"

    def run(*flags: object, code: int = 0):
        task = ["--model", real_model, "--data", sums / "sums_train.jsonl", "--reward", f"{file}:closeness"]
        done = run_fastrl("train", *task, *SHORT, *flags)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


@pytest.mark.parametrize("method", METHODS)
def test_two_steps_of_each_method(method, train, tmp_path):
    done = train("--steps", 2, "--name", "run", *METHODS[method])
    assert "warning" not in (done.stdout + done.stderr).lower()
    steps = [row for row in rows(tmp_path / "runs" / "run") if "reward" in row]
    assert len(steps) == 2 and all(row["grad_norm"] > 0 and row["skipped"] == 0 for row in steps)
    assert all(abs(row["sampling/mismatch_kl"]) < 1e-6 for row in steps)


def test_a_run_in_bfloat16_has_nothing_to_warn_of(train, tmp_path):
    done = train("--steps", 2, "--dtype", "bfloat16", "--name", "run")
    assert "disagree" not in done.stdout + done.stderr
    steps = [row for row in rows(tmp_path / "runs" / "run") if "reward" in row]
    assert 1e-5 < steps[0]["sampling/mismatch_kl"] < 5e-3


def test_a_run_goes_on_to_the_bit_and_saves_what_the_source_has(train, real_model, tmp_path):
    train("--steps", 2, "--save-every", 1, "--name", "whole")
    train("--steps", 1, "--save-every", 1, "--name", "pieces")
    train("--steps", 2, "--save-every", 1, "--name", "pieces", "--resume", "auto")
    folders = [tmp_path / "runs" / name for name in ("whole", "pieces")]
    assert step_records(folders[0]) == step_records(folders[1])
    newest = [checkpoint.newest(folder / "checkpoints")[0] for folder in folders]
    assert digest(newest[0]) == digest(newest[1])
    found = []
    for folder in (newest[0], Path(real_model)):
        with safe_open(folder / "model.safetensors", "pt") as file:
            found.append({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})
    assert found[0] == found[1]


@pytest.mark.vllm
def test_vllm_says_the_same(real_model, prompts):
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
    from fastrl.engine.vllm import VllmConfig, VllmEngine
    from fastrl.weights.buffer import FlatParams

    loaded = load_model(real_model, dtype=torch.float32, device="cpu")
    wanted = [own_greedy(loaded, prompt) for prompt in prompts]
    flat = FlatParams(loaded.model)
    sizes = dict(max_model_len=256, max_num_seqs=8, kv_bytes=1 << 30)
    engine = VllmEngine(loaded.model, flat, VllmConfig(), eos_ids=loaded.eos_ids, num_tokens=loaded.num_tokens, **sizes)
    try:
        with engine.generate_phase():
            requests = [Request(prompt_ids=prompt, seeds=[0]) for prompt in prompts]
            ours = engine.sample(requests, Sampling(temperature=0.0, max_new_tokens=TOKENS))
        assert [completion.token_ids for (completion,) in ours] == wanted
    finally:
        engine.close()
