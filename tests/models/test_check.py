"""The check at load: a fault in each path is found there, named, and gives its figure."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastrl import checkpoint
from fastrl.base.types import CheckpointError
from fastrl.models.check import check_model, compare_with_own_forward
from fastrl.models.loading import EMBEDDED, load_model, model_path, save_model
from support.arguments import SMALL_STEPS
from support.families import make_folder
from support.run_folders import sign_again
from support.trainers import make_trainer


def embedded(**options):
    return load_model(EMBEDDED, **dict(dtype=torch.float32, device="cpu") | options)


def copied(folder: Path) -> Path:
    """The embedded model's folder, to be changed."""
    return Path(shutil.copytree(model_path(EMBEDDED), folder / "model"))


def test_a_sound_model_is_within_rounding():
    found = check_model(embedded())
    assert list(found) == ["head", "trainer", "again", "packed", "engine"] and max(found.values()) < 5e-5
    assert list(check_model(embedded(attention="eager"), sampled=False)) == ["head", "trainer", "again"]
    assert compare_with_own_forward(EMBEDDED) == max(found.values())
    assert 1e-3 < compare_with_own_forward(EMBEDDED, dtype="bfloat16") < 2.0


def test_a_head_that_does_more_is_refused_with_the_figure():
    loaded = embedded()
    loaded.model.lm_head.register_forward_hook(lambda module, args, out: out * 1.5)
    with pytest.raises(ValueError, match=r"in what it does to its logits: fastrl knows.*\([\d.]+ nats, .* docs/models"):
        check_model(loaded)


# the own forward asks the body twice for each of three rows
@pytest.mark.parametrize(
    "calls, path",
    [
        (6, "in its forward in training"),
        (7, "in a second forward in training, for something in it stays random"),
        (8, "in its forward of packed rows"),
        (9, "in its forward with a cache, token by token"),
        (15, "in its forward with a cache, token by token"),
    ],
)
def test_each_path_is_compared(calls, path):
    loaded, seen = embedded(), []

    def later(module, args, out):
        seen.append(1)
        if len(seen) > calls:
            out.last_hidden_state = out.last_hidden_state * 1.01

    loaded.model.base_model.register_forward_hook(later)
    with pytest.raises(ValueError, match=re.escape(path)):
        check_model(loaded)


def test_what_fails_inside_a_family_is_one_line():
    loaded = embedded()

    def fail(module, args, kwargs):
        if kwargs.get("use_cache"):
            raise AttributeError("'Layer' object has no attribute 'rows'\nand more")

    loaded.model.base_model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(ValueError) as caught:
        check_model(loaded)
    line = "Qwen2ForCausalLM cannot be used: its forward with a cache fails with AttributeError: 'Layer' object has no "
    assert f"{line}attribute 'rows'. See docs/models.md" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "family, attention, message",
    [
        # since transformers 5.21 the family itself says that it has none
        ("gemma2", "sdpa", r"(\(attn_logit_softcapping\)|has no SDPA attention); use --attention eager"),
        ("bloom", "sdpa", "has no SDPA attention; use --attention eager"),
        ("gptj", "eager", "GPTJForCausalLM has no plain LM head"),
        ("mamba", "eager", "in its forward with a cache, token by token"),
    ],
)
def test_a_family_that_cannot_be_used_is_refused(family, attention, message, tmp_path):
    make_folder(tmp_path, family, options=False)
    with pytest.raises(ValueError, match=message):
        compare_with_own_forward(str(tmp_path), attention=attention)


# rates in modules, in configurations, as functions within a layer that checkpoints, noise of routers
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phimoe", "qwen2_moe"])
def test_nothing_is_dropped_and_nothing_random_stays(family, tmp_path):
    assert "dropout" in make_folder(tmp_path, family, options=True)
    loaded = load_model(str(tmp_path), dtype=torch.float32, device="cpu", checkpoint="full")
    assert any(module.training for module in loaded.model.modules())
    ids = torch.randint(3, 12, (2, 24), generator=torch.Generator().manual_seed(0))
    hidden = [loaded.model.base_model(ids, use_cache=False).last_hidden_state for _ in range(2)]
    assert torch.equal(*hidden) and hidden[0].requires_grad
    own = load_model(str(tmp_path), dtype=torch.float32, device="cpu").model.eval()
    torch.testing.assert_close(own.base_model(ids, use_cache=False).last_hidden_state, hidden[0])
    assert max(check_model(loaded).values()) < 1e-3


def test_a_run_of_a_model_with_dropout_is_that_of_one_without(tmp_path):
    folder = copied(tmp_path)
    config = (folder / "config.json").read_text()
    assert '"attention_dropout": 0.0' in config
    (folder / "config.json").write_text(config.replace('"attention_dropout": 0.0', '"attention_dropout": 0.1'))
    records = []
    for name, model in (("with", folder), ("without", EMBEDDED)):
        trainer = make_trainer(tmp_path / name, *SMALL_STEPS, "--kl", 0.05, "--model", model)
        for _ in range(2):
            trainer.step()
        records.append(trainer.learner.policy.flat.weights.clone())
    assert torch.equal(*records)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    folder = copied(tmp_path)
    for bad in (torch.nan, torch.inf, -torch.inf):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][3] = bad
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="model.norm.weight has weights that are not finite"):
            load_model(str(folder), dtype=torch.float32, device="cpu")
        shutil.rmtree(folder)
        folder = copied(tmp_path)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with a model in it, as a run writes it."""
    loaded = embedded()
    checkpoint.save(
        tmp_path,
        3,
        write_model=lambda path: save_model(loaded, path),
        tensors=[("master", torch.zeros(8))],
        state={"step": 3},
        keep=2,
    )
    return tmp_path / "step-3"


def test_a_checkpoint_that_is_used_as_a_model_is_verified(saved):
    load_model(str(saved), dtype=torch.float32, device="cpu")
    data = bytearray((saved / "model.safetensors").read_bytes())
    data[len(data) // 2 + 3 - len(data) // 2 % 4] ^= 0x40  # the exponent of one weight
    (saved / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model.safetensors has changed since it was written"):
        load_model(str(saved), dtype=torch.float32, device="cpu")
    sign_again(saved)
    load_model(str(saved), dtype=torch.float32, device="cpu")


def test_a_checkpoint_that_is_used_as_a_model_needs_only_the_model(saved):
    for name in ("optim-rank0.safetensors", "state.json"):
        (saved / name).unlink()
    (saved / "README.md").write_text("mine")
    load_model(str(saved), dtype=torch.float32, device="cpu")
    (saved / "tokenizer.json").write_text((saved / "tokenizer.json").read_text() + " ")
    with pytest.raises(CheckpointError, match="tokenizer.json has changed"):
        load_model(str(saved), dtype=torch.float32, device="cpu")


def test_saved_weights_are_those_of_the_source(saved):
    assert (
        load_file(saved / "model.safetensors").keys() == load_file(model_path(EMBEDDED) + "/model.safetensors").keys()
    )


def test_a_gguf_file_says_what_to_do(tmp_path):
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "weights.Q4_1.gguf").write_bytes(b"GGUF")
    for name in ("somewhere/weights.gguf", "W.GGUF", tmp_path / "only", tmp_path / "only" / "weights.Q4_1.gguf"):
        with pytest.raises(ValueError, match="GGUF is for inference.*Use the model that the file was made of"):
            load_model(str(name), dtype=torch.float32, device="cpu")
