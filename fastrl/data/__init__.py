"""Problems by data-set name or by path. A new data set is one object with `load` and one line in DATASETS."""

from pathlib import Path

from fastrl.base.names import nearest
from fastrl.base.types import DataError
from fastrl.data.arithmetic import Arithmetic
from fastrl.data.base import BadRow, Dataset, Generated, Loaded
from fastrl.data.files import READERS, PathDataset, missing
from fastrl.data.gsm8k import GSM8K
from fastrl.data.math import AIME24, AMC23, HMMT, MATH, MATH500, MINERVA, OLYMPIADBENCH
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


def find_dataset(name_or_path: str) -> Dataset:
    """A name of DATASETS (`./name` means the file or folder instead), or an existing path; else DataError."""
    if name_or_path in DATASETS:
        return DATASETS[name_or_path]
    path = Path(name_or_path).expanduser()
    if name_or_path and path.exists():
        return PathDataset(path=path)
    if path.suffix in READERS or path.suffix == ".gz":
        raise missing(path)
    if len(path.parts) > 1:
        raise DataError(f"{missing(path)}. Nothing is downloaded: fetch a data set of the hub to a folder first")
    near = nearest(name_or_path.lower(), DATASETS)
    hint = f"; did you mean {near!r}?" if near else "."
    raise DataError(
        f"there is no data set and no file called {name_or_path!r}{hint} Known data sets: {', '.join(DATASETS)}; "
        f"or pass the path of a file ({', '.join(READERS)}) or folder"
    )


def load_problems(name_or_path: str, *, split: str, data_dir: str = "../shared/data") -> Loaded:
    """The problems of one split. Raises DataError when they cannot be found, or when too many rows are bad."""
    return find_dataset(name_or_path).load(split, data_dir)
