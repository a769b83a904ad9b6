"""Models by name from a hub on this machine: which files, at which commit, and what is said without."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastrl.models.fetching import pinned_model
from fastrl.models.loading import load_model, load_tokenizer, model_config, model_path
from fastrl.models.shapes import find_config
from fastrl.passrates.key import model_digest

EMBEDDED = Path(model_path("embedded"))


def files_of(folder: Path = EMBEDDED) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def load(name):
    return load_model(name, dtype=torch.float32, device="cpu")


def test_a_model_is_fetched_once_and_weights_only_where_they_are_read(hub, offline, tmp_path):
    others = {
        "pytorch_model.bin": b"pickle",
        "modeling_x.py": b"raise SystemExit",
        "model.gguf": b"g",
        "a/b.json": b"{}",
    }
    commit = hub.push("models", "me/tiny", files_of() | others)
    assert model_config("me/tiny").model_type == "qwen2" and load_tokenizer("me/tiny").eos_token
    assert not any("safetensors" in path for path in hub.asked)
    loaded = load("me/tiny")
    assert Path(loaded.path).name == commit
    one, own = loaded.model.state_dict(), load("embedded").model.state_dict()
    assert all(torch.equal(one[name], own[name]) for name in own)
    fetched = {path.split("/")[-1] for path in hub.asked if path.startswith("GET /me/")}
    assert "model.safetensors" in fetched and not fetched & {
        "pytorch_model.bin",
        "modeling_x.py",
        "model.gguf",
        "b.json",
    }
    assert pinned_model("me/tiny") == f"me/tiny@{commit}" == model_digest("me/tiny")
    asked = len(hub.asked)
    load(f"me/tiny@{commit}")
    assert len(hub.asked) == asked
    offline()
    load("me/tiny"), load(f"me/tiny@{commit}")


def test_a_moved_branch_is_another_commit(hub):
    first = hub.push("models", "me/tiny", files_of())
    assert pinned_model("me/tiny") == f"me/tiny@{first}"
    second = hub.push("models", "me/tiny", files_of() | {"chat_template.jinja": b"{{ messages[0].content }}"})
    assert pinned_model("me/tiny") == f"me/tiny@{second}"
    assert load_tokenizer(f"me/tiny@{first}").chat_template != load_tokenizer("me/tiny").chat_template


@pytest.mark.parametrize(
    "name", ["tiny", "gpt2", "Qwen3-999B", "a/b/c", "./runs/x", "/no/where", "~/none", "me/ti ny", "a/b@"]
)
def test_a_name_of_another_form_is_refused_without_a_request(name, hub):
    for read in (model_config, load_tokenizer, load):
        with pytest.raises(ValueError, match=r"--model .*: no such folder.*owner/name\[@revision\]") as caught:
            read(name)
        assert "\n" not in str(caught.value)
    assert not hub.asked
    with pytest.raises(ValueError, match="no such folder.*known by name: qwen2.5-0.5b"):
        find_config(name)


def test_what_cannot_be_had_is_said_in_one_line(hub, offline):
    hub.push(
        "models",
        "me/pickled",
        {name: b for name, b in files_of().items() if "safetensors" not in name} | {"x.bin": b""},
    )
    hub.push("models", "me/code", files_of() | {"config.json": b'{"auto_map": {"AutoConfig": "x.Y"}}'})
    hub.push("models", "me/nothing", {"README.md": b""})
    hub.push("models", "me/gated", files_of())
    hub.gated.add("me/gated")
    for name, said in {
        "me/none": "there is no model http.*/me/none, or it is private: .*, and there is no such folder",
        "me/gated": "access to http.*/me/gated is restricted: ask for it there, and set HF_TOKEN",
        "me/code": "config.json has an auto_map",
        "me/pickled": "only x.bin, pickles",
        "me/nothing": "has no config.json",
        "me/pickled@v3": "has no revision 'v3'",
    }.items():
        with pytest.raises(ValueError, match=f"--model {name}: .*{said}") as caught:
            load(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="config.json has an auto_map"):
        model_path("me/code", weights=True)
    assert not any("safetensors" in path for path in hub.asked if "me/code" in path)
    hub.status, asked = 503, len(hub.asked)
    with pytest.raises(
        ValueError, match=r"--model me/other: .*answers 503\); run once with a network, or give a local folder"
    ):
        load("me/other")
    assert len(hub.asked) == asked + 1  # and no second try
    offline()
    with pytest.raises(
        ValueError, match="HF_HUB_OFFLINE is set; run once with a network, or give a local folder as --model"
    ):
        load("me/other")


def test_a_folder_of_that_name_comes_first(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EMBEDDED, tmp_path / "me" / "tiny")
    assert load("me/tiny").path == "me/tiny" and pinned_model("me/tiny") == "me/tiny" and not hub.asked


def test_shards_are_fetched_by_their_names(hub):
    from safetensors.torch import load_file, save

    tensors = load_file(EMBEDDED / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    files = {name: content for name, content in files_of().items() if name != "model.safetensors"}
    files |= {shard: save({n: tensors[n] for n in held}, {"format": "pt"}) for shard, held in shards.items()}
    hub.push("models", "me/shards", files | {"model.safetensors.index.json": json.dumps(index).encode()})
    one, own = load("me/shards").model.state_dict(), load("embedded").model.state_dict()
    assert all(torch.equal(one[name], own[name]) for name in own)
