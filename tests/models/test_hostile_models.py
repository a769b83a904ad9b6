"""Model folders that would run code or read other files: refused, and the code never runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastrl import train
from fastrl.base.exits import exit_code
from fastrl.models.loading import load_model, load_tokenizer, model_config, model_path

CODE = "from pathlib import Path\nPath({canary!r}).touch()\nclass Evil: pass\n"


@pytest.fixture
def folder(tmp_path):
    """The embedded model beside Python files that leave a canary where they are run."""
    copy = tmp_path / "model"
    shutil.copytree(model_path("embedded"), copy)
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (copy / f"{name}.py").write_text(CODE.format(canary=str(tmp_path / "canary")))
    return copy


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def load(folder: Path) -> None:
    load_model(str(folder), dtype=torch.float32, device="cpu")


def code_in_config(folder):
    names = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    change(folder / "config.json", model_type="evil", architectures=["Evil"], auto_map=names)
    return "config.json has an auto_map"


def code_in_config_of_a_known_model(folder):
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    return "config.json has an auto_map"


def code_in_tokenizer(folder):
    names = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    change(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map=names)
    return "tokenizer_config.json has an auto_map"


def code_of_another_repository(folder):
    change(folder / "config.json", text_config={"auto_map": {"AutoModel": "someone/evil--modeling_evil.Evil"}})
    return "config.json has an auto_map"


def pickles_only(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    return "only pytorch_model.bin, pickles that can run code"


def old_pickles_only(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "consolidated.00.pth")
    return "only consolidated.00.pth, pickles"


def shard_outside(folder, name="../secret.safetensors"):
    shutil.move(folder / "model.safetensors", folder.parent / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    return f"names {name!r}, expected a .safetensors file in the folder"


def absolute_shard(folder):
    return shard_outside(folder, str(folder.parent / "secret.safetensors"))


def pickled_shard(folder):
    return shard_outside(folder, "pytorch_model-00001.bin")


def missing_shard(folder):
    shard_outside(folder, "model-00001.safetensors")
    return "names 'model-00001.safetensors', which is missing"


def strange_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    return "has no weight_map from tensors to files"


def strange_config(folder):
    (folder / "config.json").write_text("[]")
    return "config.json must hold a JSON object, got list"


# the first of the acceptance list, the others beside it
ATTACKS = [
    code_in_config,
    code_in_tokenizer,
    pickles_only,
    shard_outside,
    code_in_config_of_a_known_model,
    code_of_another_repository,
    old_pickles_only,
    absolute_shard,
    pickled_shard,
    missing_shard,
    strange_index,
    strange_config,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.promise("D3", trials=1)
def test_a_hostile_folder_is_refused_and_its_code_never_runs(folder, attack):
    reason = attack(folder)
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert exit_code(caught.value) == 2
    assert str(caught.value).startswith(f"--model {folder}: ") and reason in str(caught.value)
    assert not (folder.parent / "canary").exists()


@pytest.mark.parametrize("attack", [code_in_config, code_in_tokenizer], ids=lambda attack: attack.__name__)
def test_nothing_else_that_reads_a_model_runs_its_code(folder, attack, monkeypatch, capsys):
    attack(folder)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask on a terminal
    for read in (model_config, load_tokenizer):
        with pytest.raises(ValueError, match="auto_map"):
            read(str(folder))
    assert train.main(["--model", str(folder), "--data", "arithmetic", "--out", str(folder.parent / "run")]) == 2
    assert "auto_map" in capsys.readouterr().err
    assert not (folder.parent / "canary").exists()


def test_python_files_that_nothing_asks_for_are_no_reason(folder):
    load(folder)
    assert not (folder.parent / "canary").exists()
