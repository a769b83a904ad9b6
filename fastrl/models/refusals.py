"""What a model folder may ask for: numbers and tables, never code, and no file outside of itself.

`auto_map` in one of its JSON files names Python files of the model's author. fastrl never runs them, and there is no
flag for it: the layout of the weights is that of the architectures transformers has. Weights in .bin or .pt files are
pickles, which can run code when they are read.
"""

import json
from collections.abc import Iterable
from pathlib import Path

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def refuse_code(name: str, folder: Path) -> None:
    """Raise ValueError where the configuration of model, tokenizer or processor asks for code of its own."""
    for path in sorted(folder.glob("*config.json")):
        refuse_auto_map(name, path.name, read(name, path))


def refuse_gguf(name: str, folder: Path) -> None:
    """Raise ValueError for a GGUF file, or for a folder that holds one and no model."""
    files = sorted(folder.glob("*.gguf")) if folder.is_dir() and not (folder / "config.json").exists() else []
    if name.lower().endswith(".gguf") or files:
        raise ValueError(
            f"--model {name}: GGUF is for inference, with weights that are rounded; fastrl trains a Hugging Face "
            "folder with safetensors. Use the model that the file was made of, or convert the file as "
            "docs/real_model.md does"
        )


def refuse_auto_map(name: str, file: str, value: object) -> None:
    """Raise ValueError if a value out of a JSON file holds `auto_map` anywhere."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if value.get("auto_map"):
                raise ValueError(
                    f"--model {name}: {file} has an auto_map, which asks for Python code that comes with the model; "
                    "fastrl never runs it. If transformers has this architecture itself, take auto_map out of a local "
                    "copy; otherwise use another model"
                )
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def refuse_pickles(name: str, folder: Path) -> None:
    """Raise ValueError unless the weights are safetensors files in the folder itself."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = read(name, index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"--model {name}: {index.name} has no weight_map from tensors to files")
        for shard in sorted(set(shards.values())):
            if shard != Path(shard).name or not shard.endswith(".safetensors") or "\0" in shard:
                raise ValueError(
                    f"--model {name}: {index.name} names {shard!r:.100}, expected a .safetensors file in the folder"
                )
            if not (folder / shard).is_file():
                raise ValueError(f"--model {name}: {index.name} names {shard!r:.100}, which is missing")
    elif not (folder / "model.safetensors").is_file():
        refuse_pickled(name, [path.name for path in folder.iterdir()])


def refuse_pickled(name: str, files: Iterable[str]) -> None:
    """Raise ValueError for a model without safetensors, of which these are the files."""
    found = sorted(file for file in files if file.endswith(PICKLES))
    got = f"only {', '.join(found[:3])}, pickles that can run code when they are read" if found else "none"
    raise ValueError(
        f"--model {name}: weights must be in model.safetensors or its shards, and there are {got}; save the model "
        "with save_pretrained of transformers, where you trust it"
    )


def refuse_ends(name: str, eos_ids: Iterable[int], num_tokens: int) -> None:
    """Raise ValueError where an end of text can never be sampled: no completion would end by it."""
    beyond = [id for id in eos_ids if not 0 <= id < num_tokens]
    if beyond:
        raise ValueError(
            f"--model {name}: the end-of-text id {beyond[0]} cannot be sampled, for model and tokenizer have the ids 0 "
            f"to {num_tokens - 1} in common; use the tokenizer that belongs to the model, or correct eos_token_id in "
            "its generation_config.json"
        )


def read(name: str, path: Path) -> dict:
    """Raises ValueError unless the file is one JSON object."""
    try:
        value = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"--model {name}: {path.name} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"--model {name}: {path.name} must hold a JSON object, got {type(value).__name__}")
    return value
