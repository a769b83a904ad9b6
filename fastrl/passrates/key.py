"""What the rewards of a profile depend on, by digests: nothing is loaded."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from fastrl.base.types import Problem
from fastrl.engine.base import Sampling
from fastrl.models.fetching import pinned_model
from fastrl.models.loading import EMBEDDED, model_path
from fastrl.rewards import split_weight

# key field -> what a user may have changed
CHANGED_BY = {
    "model": "--model",
    "prompts": "--data, --split, --limit, --template, --instruction, --max-prompt-tokens or the tokenizer",
    "verifier": "--reward or the file of its function",
    "sampling": "--temperature, --max-new-tokens or --grade-truncated",
    "seed": "--seed",
    "num_completions": "--num-profile-completions",
}


@dataclass(frozen=True, kw_only=True)
class ProfileKey:
    """What the rewards of a profile depend on."""

    model: str
    prompts: str
    verifier: dict[str, float]  # weight of each reward
    sampling: dict[str, float]
    seed: int
    num_completions: int  # per problem

    @classmethod
    def of(
        cls,
        *,
        model: str,
        problems: Sequence[Problem],
        rewards: Sequence[str],
        sampling: Sampling,
        grade_truncated: bool,
        seed: int,
        num_completions: int,
    ) -> "ProfileKey":
        """model: as in --model; rewards: specs. Reads the weight files, loads nothing."""
        return cls(
            model=model_digest(model),
            prompts=digest([p.id, p.prompt_ids, p.answer] for p in problems),
            verifier=verifier_key(rewards),
            sampling={
                "temperature": float(sampling.temperature),
                "max_new_tokens": sampling.max_new_tokens,
                "grade_truncated": grade_truncated,
            },
            seed=seed,
            num_completions=num_completions,
        )

    @property
    def digest(self) -> str:
        return digest([asdict(self)])

    def refuse_other(self, stored: "ProfileKey", path: Path) -> None:
        """Raise ValueError, naming the field, unless a profile with the key `stored` can be used for this one."""
        for name in (f.name for f in fields(self)):
            then, now = getattr(stored, name), getattr(self, name)
            if then != now and not (name == "num_completions" and then > now):
                raise ValueError(
                    f"{path}: this profile is of another run: {name} was {then} and is now {now} ({CHANGED_BY[name]}); "
                    "undo that, name another file, or leave --profile out to have the right one found or made"
                )


def digest(items: Iterable) -> str:
    hashed = hashlib.blake2b(digest_size=8)
    for item in items:
        hashed.update(json.dumps(item, sort_keys=True).encode() + b"\n")
    return hashed.hexdigest()


def model_digest(name: str) -> str:
    """Of the weight files and configuration in a model's folder; a hub name gives its commit. Loads nothing."""
    path = Path(name).expanduser() if name != EMBEDDED else Path(model_path(name))
    if not path.is_dir():
        return pinned_model(name)
    # generation_config.json has the tokens that end a completion; a checkpoint's optimizer files are no weights
    files = [path / "config.json", path / "generation_config.json", *sorted(path.glob("model*.safetensors"))]
    return digest([file.name, file_digest(file)] for file in files if file.exists())


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def weights_digest(weights: torch.Tensor) -> str:
    """Of a flat buffer of weights, wherever it lies."""
    hashed = hashlib.blake2b(digest_size=8)
    for piece in weights.detach().view(torch.uint8).split(1 << 26):
        hashed.update(piece.cpu().numpy().data)
    return hashed.hexdigest()


def verifier_key(specs: Sequence[str]) -> dict[str, float]:
    """Reward specs -> weight by name; a user's function counts as another one when its file has changed."""
    weights = {}
    for spec in specs:
        source, weight = split_weight(spec)
        file, colon, function = source.rpartition(":")
        name = f"{function} of {file_digest(Path(file).expanduser())[:16]}" if colon else source
        weights[name] = weight
    return weights
