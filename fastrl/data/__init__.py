"""Problems by data-set name or by path. A new data set is one object with `load` and one line in DATASETS."""

import re
from pathlib import Path

from fastrl.base.hub import COMMIT, REVISION
from fastrl.base.names import nearest
from fastrl.base.types import DataError
from fastrl.data.arithmetic import Arithmetic
from fastrl.data.base import BadRow, Dataset, Generated, Loaded
from fastrl.data.files import READERS, PathDataset, missing
from fastrl.data.gsm8k import GSM8K
from fastrl.data.hub import HubDataset, hub_dataset
from fastrl.data.math import AIME24, AMC23, HMMT, MATH, MATH500, MINERVA, OLYMPIADBENCH
from fastrl.data.named import NamedDataset
from fastrl.data.prompts import describe_prompt, encode_prompts

__all__ = [
    "DATASETS",
    "BadRow",
    "Dataset",
    "Generated",
    "Loaded",
    "PathDataset",
    "describe_prompt",
    "encode_prompts",
    "find_dataset",
    "load_problems",
    "pinned_data",
]

DATASETS: dict[str, Dataset] = {
    "arithmetic": Generated(source=Arithmetic(), default_reward="last_character"),
    "gsm8k": GSM8K,
    "math": MATH,
    "math500": MATH500,
    "aime24": AIME24,
    "amc23": AMC23,
    "minerva": MINERVA,
    "olympiadbench": OLYMPIADBENCH,
    "hmmt": HMMT,
}


def find_dataset(typed: str) -> Dataset:
    """What --data names: DATASETS, with @REVISION too, an existing path, or owner/name[:config][@revision] of the hub.

    `./name` is a file or folder, whatever else is called so. Asks nobody. Raises DataError for anything else.
    """
    if typed in DATASETS:
        return DATASETS[typed]
    path = Path(typed).expanduser()
    if typed and path.exists():
        return PathDataset(path=path)
    name, at, revision = typed.partition("@")
    named = DATASETS.get(name)
    if isinstance(named, NamedDataset) and re.fullmatch(REVISION, revision):
        return named.at(revision)
    if path.suffix in READERS or path.suffix == ".gz":
        raise missing(path)
    if found := hub_dataset(typed):
        return found
    if len(path.parts) > 1:
        raise missing(path)
    near = nearest(name.lower(), DATASETS)
    hint = f"; did you mean {near!r}?" if near else "."
    raise DataError(
        f"there is no data set and no file called {typed!r}{hint} Known data sets: {', '.join(DATASETS)}; "
        f"or pass the path of a file ({', '.join(READERS)}) or folder, or owner/name of the hub"
    )


def pinned_data(typed: str, data_dir: str) -> str:
    """The same with the commit that a branch of the hub is now, so that a run, its evaluation and its continuation read
    the same. Asks the hub where it has to; raises DataError."""
    dataset = find_dataset(typed)
    if isinstance(dataset, NamedDataset) and dataset.repo and not data_dir:
        dataset = dataset.hub
    if not isinstance(dataset, HubDataset) or COMMIT.fullmatch(dataset.repo.revision):
        return typed
    return f"{dataset.name}@{dataset.snapshot().commit}"


def load_problems(name_or_path: str, *, split: str, data_dir: str = "") -> Loaded:
    """The problems of one split. Raises DataError when they cannot be found, or when too many rows are bad."""
    return find_dataset(name_or_path).load(split, data_dir)
