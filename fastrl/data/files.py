"""Data sets that lie in files: any file or folder by its path.

A folder is one of
    saved      state.json + *.arrow, or dataset_dict.json with such a folder per split     (datasets: save_to_disk)
    plain      train.jsonl, test.jsonl, train-00000-of-00002.parquet, ..., also below data/, or a folder per split
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastrl.base.names import nearest
from fastrl.base.types import DataError
from fastrl.data.base import BOXED_INSTRUCTION, Loaded, problems_from_rows
from fastrl.data.columnar import read_arrow, read_parquet
from fastrl.data.jsonl import read_json, read_jsonl

READERS = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}


@dataclass(frozen=True, kw_only=True)
class PathDataset:
    """A file, or a folder with one or several splits. All its good rows are problems; no id is excluded."""

    path: Path
    default_reward: str = "math"
    default_instruction: str = BOXED_INSTRUCTION

    @property
    def name(self) -> str:
        return str(self.path)

    def load(self, split: str, data_dir: str = "") -> Loaded:
        """All of a file; `split` chooses among the files of a folder."""
        return problems_from_rows(read_rows(self.path, split), source=self.name)


def read_rows(path: Path, split: str) -> Iterator[tuple[str, int, object]]:
    """(file name, line or row number from 1, row or DataError) of a file, or of the split's files in a folder.

    Raises DataError when there is nothing to read,"""
    if not path.exists():
        raise missing(path)
    for file in split_files(path, split) if path.is_dir() else [path]:
        suffix = suffix_of(file)
        if suffix is None:
            raise DataError(f"{file}: cannot read this kind of file; known are {', '.join(READERS)}")
        for line, row in READERS[suffix](file):
            yield file.name, line, row


def split_files(folder: Path, split: str) -> list[Path]:
    """The data files of a split in their order. Raises DataError when there are none, or they are ambiguous."""
    if (folder / "dataset_dict.json").is_file():
        splits = read_meta(folder / "dataset_dict.json", "splits")
        if split not in splits:
            raise DataError(f"{folder} has the splits {', '.join(map(str, splits))}, got {split!r}; use --split")
    if (folder / "state.json").is_file():
        files = [folder / Path(part["filename"]).name for part in read_meta(folder / "state.json", "_data_files")]
        for file in files:
            if not file.is_file():
                raise DataError(f"{folder / 'state.json'}: {missing(file)}. Save or copy the data set again")
        return files
    listed = data_files(folder) + data_files(folder / "data")
    # train.jsonl is the split, not also the train_small.jsonl beside it
    found = [file for file in listed if stem(file) == split]
    found = found or [file for file in listed if file.name.startswith((split + "-", split + "_", split + "."))]
    if not found and split and (folder / split).is_dir():
        inner = folder / split
        return split_files(inner, split) if (inner / "state.json").is_file() else data_files(inner)
    if len({suffix_of(file) for file in found}) > 1:
        raise DataError(f"{folder}: split {split!r} exists as {named(found)}; pass the path of one of them")
    if not found:
        raise DataError(
            f"{folder}: no file of split {split!r}; expected names such as {split}.jsonl or "
            f"{split}-00000-of-00001.parquet, found {named(listed)}. Use --split, or pass the path of one file"
        )
    return found


def missing(path: Path) -> DataError:
    """The error for a path that does not exist, naming what comes nearest to it."""
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    wanted = path.absolute().relative_to(parent).parts[0]
    near = nearest(wanted, sorted(file.name for file in parent.iterdir()), cutoff=0.3)  # it is there, meant or not
    hint = f"the nearest name there is {near!r}" if near else f"nothing there is called like {wanted!r}"
    return DataError(f"{path} does not exist; the folder {parent} does, and {hint}")


def read_meta(path: Path, key: str) -> list:
    value = read_object(path).get(key)
    if not isinstance(value, list) or not value:
        raise DataError(f"{path}: expected a list under {key!r}; save the data set again with save_to_disk")
    return value


def read_object(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: invalid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def data_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.is_file() and suffix_of(file))


def suffix_of(path: Path) -> str | None:
    return next((suffix for suffix in READERS if path.name.lower().endswith(suffix)), None)


def stem(path: Path) -> str:
    suffix = suffix_of(path)
    assert suffix is not None, path
    return path.name[: -len(suffix)]


def named(files: list[Path]) -> str:
    shown = ", ".join(file.name for file in files[:10])
    return (shown + (", ..." if len(files) > 10 else "")) or "no data files"
