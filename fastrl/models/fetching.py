"""Models of the Hugging Face hub as folders in its cache: owner/name[@revision]."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from fastrl.base.hub import COMMIT, NAME, REVISION, HubError, Repo, Snapshot, fetch, snapshot_of
from fastrl.models.refusals import refuse_code, refuse_pickled

TYPED = re.compile(rf"(?P<name>{NAME})(?:@(?P<revision>{REVISION}))?")
SMALL = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "chat_templates/*.jinja")  # configuration and tokenizer
WEIGHTS = ("model.safetensors", "model-*.safetensors")


def fetched(name: str, *, weights: bool) -> Path:
    """The folder of a model of the hub, with its configuration and tokenizer, and its weights if they are asked for.

    Raises ValueError for a name of another form, at once; for a model that is not there, that asks for code, or whose
    weights are pickles, before any weights are fetched.
    """
    try:
        snapshot = snapshot_of(repo_of(name))
        if "config.json" not in snapshot.files:
            raise HubError(f"{snapshot.repo.page} has no config.json, so it is no model that transformers can load")
        folder = fetch(snapshot, matching(snapshot, SMALL))
        refuse_code(name, folder)
        if not weights:
            return folder
        tensors = matching(snapshot, WEIGHTS)
        if not tensors:
            refuse_pickled(name, snapshot.files)
        return fetch(snapshot, tensors)
    except HubError as error:
        raise not_had(name, error) from error


def pinned_model(name: str) -> str:
    """The same with the commit that a branch of the hub is now; a folder or `embedded` as it is. Raises ValueError."""
    found = TYPED.fullmatch(name)
    if not found or Path(name).expanduser().is_dir() or COMMIT.fullmatch(found["revision"] or ""):
        return name
    try:
        return f"{found['name']}@{snapshot_of(repo_of(name)).commit}"
    except HubError as error:
        raise not_had(name, error) from error


def not_had(name: str, error: HubError) -> ValueError:
    return ValueError(f"--model {name}: {error}, and there is no such folder")


def repo_of(name: str) -> Repo:
    found = TYPED.fullmatch(name)
    if not found or name.startswith((".", "~")):
        raise ValueError(
            f"--model {name}: no such folder. Give a Hugging Face model folder, owner/name[@revision] of the "
            "hub, or 'embedded'"
        )
    return Repo(kind="model", name=found["name"], revision=found["revision"] or "main")


def matching(snapshot: Snapshot, patterns: Sequence[str]) -> list[str]:
    return [
        file
        for file in snapshot.files
        if any(fnmatchcase(file, p) and file.count("/") == p.count("/") for p in patterns)
    ]
