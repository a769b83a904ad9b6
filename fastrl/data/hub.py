"""Data sets of the Hugging Face hub: owner/name[:config][@revision], read from their parquet or JSON files.

Which files make a configuration and a split is what the data set's card says (`configs` in its README.md), else what
the names of files and folders say. A loading script is never run, and only files of known kinds are fetched.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fastrl.base.hub import NAME, REVISION, HubError, Repo, Snapshot, fetch, snapshot_of
from fastrl.base.types import DataError
from fastrl.data.base import BOXED_INSTRUCTION, Loaded, problems_from_rows
from fastrl.data.files import READERS, suffix_of
from fastrl.data.jsonl import read_json, read_jsonl

TYPED = re.compile(rf"(?P<name>{NAME})(?::(?P<config>[\w.-]+))?(?:@(?P<revision>{REVISION}))?")
CARD = "README.md"
Rows = Iterator[tuple[str, int, object]]  # file name, line or row number from 1, row or DataError
Rewrite = Callable[[dict], dict]  # gives a row the columns that fastrl knows
WHOLE = "all"  # the split of files that name none
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
SPLITS |= {name: "validation" for name in ("validation", "valid", "val", "dev")}


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A repository with one or several configurations and splits. No id is excluded."""

    name: str  # as it is typed, without the revision
    repo: Repo
    config: str = ""  # of the card, or a folder; empty: the only one, or the default
    preferred: str = ""  # taken for the default where there is one of this name
    splits: dict[str, str] = field(default_factory=dict)  # --split -> the repository's name of it, where it differs
    rewrite: Rewrite | None = None
    default_reward: str = "math"
    default_instruction: str = BOXED_INSTRUCTION

    def snapshot(self) -> Snapshot:
        with naming(self.name):
            return snapshot_of(self.repo)

    def load(self, split: str, data_dir: str = "") -> Loaded:
        snapshot = self.snapshot()
        with naming(self.name):
            card = read_card(fetch(snapshot, [CARD]) / CARD) if CARD in snapshot.files else {}
        files, found = choose(
            snapshot.files,
            card,
            self.config or self.preferred,
            self.splits.get(split, split),
            self.name,
            must=bool(self.config),
        )
        with naming(self.name):
            folder = fetch(snapshot, files)
        rows = own_rows(read_files(folder, files), f"{self.name}/{found}", self.rewrite)
        loaded = problems_from_rows(rows, source=self.name)
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        loaded.source = f"{self.repo.name}@{snapshot.commit} {files[0]}{more}"
        return loaded


class naming:
    """Say of a HubError which data set was asked for, as a DataError."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, HubError):
            here = ", and there is no such file or folder" if "/" in self.name else ""
            raise DataError(f"data set {self.name!r}: {error}{here}") from error


def hub_dataset(typed: str) -> HubDataset | None:
    """owner/name[:config][@revision], or None for what has another form."""
    found = TYPED.fullmatch(typed)
    if not found or ".." in typed:
        return None
    repo = Repo(kind="dataset", name=found["name"], revision=found["revision"] or "main")
    return HubDataset(name=typed.partition("@")[0], repo=repo, config=found["config"] or "")


def read_card(path: Path) -> dict:
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(path) or {}
    except Exception as error:  # of YAML, which has many
        raise DataError(f"{path}: its head is no YAML: {str(error).splitlines()[0]}") from error


def choose(
    files: Sequence[str], card: dict, config: str, split: str, name: str, *, must: bool = True
) -> tuple[list[str], str]:
    """-> the files of a configuration's split, and the name of the split they are.

    must: whether there has to be a configuration of this name. Where there is one split only, it is that, whatever was
    asked for: as of a single file, all rows are read. Raises DataError where there is nothing, or several things that
    could be meant.
    """
    config = config if must or config in config_names(files, card) else ""
    readable = [file for file in files if suffix_of(Path(file)) and not hidden(file)]
    splits = of_card(readable, card, config, name) or of_names(readable, config, name)
    splits = {each: found for each, found in splits.items() if found}
    if not splits:
        kinds = ", ".join(sorted({PurePosixPath(file).suffix or file for file in files if not hidden(file)})[:8])
        raise DataError(
            f"data set {name!r}: no file of it can be read (it has {kinds or 'none'}; known are {', '.join(READERS)}). "
            "Save it as one of these, and give the path"
        )
    found = next(iter(splits)) if len(splits) == 1 else split
    if found not in splits:
        raise DataError(f"data set {name!r} has the splits {', '.join(splits)}, got {split!r}; use --split")
    chosen = splits[found]
    if any(file.endswith(".parquet") for file in chosen):  # the others are copies of it
        chosen = [file for file in chosen if file.endswith(".parquet")]
    if len({suffix_of(Path(file)) for file in chosen}) > 1:
        raise DataError(
            f"data set {name!r}: split {found!r} exists as {', '.join(chosen[:5])}; fetch one of them and give its path"
        )
    return chosen, found


def configs_of(card: dict) -> dict[str, dict]:
    configs = card.get("configs")
    entries = [each for each in configs if isinstance(each, dict)] if isinstance(configs, list) else []
    return {str(each.get("config_name", "default")): each for each in entries}


def config_names(files: Sequence[str], card: dict) -> set[str]:
    return set(configs_of(card)) or {file.partition("/")[0] for file in files if "/" in file}


def of_card(files: list[str], card: dict, config: str, name: str) -> dict[str, list[str]]:
    """Split -> files by the `configs` of a card; empty where it has none."""
    named = configs_of(card)
    if not named:
        return {}
    if config not in named:
        default = [each for each in named if named[each].get("default") or each == "default"]
        default = default or (list(named) if len(named) == 1 else [])
        if config or not default:
            raise DataError(
                f"data set {name!r} has the configurations {', '.join(sorted(named))}; name one of them, as in "
                f"{name.partition(':')[0]}:{min(named)}"
            )
        config = default[0]
    found, folder = named[config].get("data_files"), str(named[config].get("data_dir") or "")
    if found is None:
        return of_names([file for file in files if file.startswith(f"{folder}/")] if folder else files, "", name)
    patterns: dict[str, list[str]] = {}
    for entry in found if isinstance(found, list) else [found]:
        parts = entry if isinstance(entry, dict) and "path" not in entry else {"train": entry}
        if isinstance(entry, dict) and "path" in entry:
            parts = {str(entry.get("split", "train")): entry["path"]}
        for split, paths in parts.items():
            patterns.setdefault(split, []).extend(map(str, paths if isinstance(paths, list) else [paths]))
    inside = f"{folder}/" if folder else ""
    return {
        split: [file for file in files if any(matches(file, inside + pattern) for pattern in wanted)]
        for split, wanted in patterns.items()
    }


def of_names(files: list[str], config: str, name: str) -> dict[str, list[str]]:
    """Split -> files by the names of files and folders: train-00000-of-00002.parquet, main/test.jsonl, test/0.json."""
    folders = {file.partition("/")[0] for file in files if "/" in file} - {"data"}
    configs = sorted(folder for folder in folders if folder.lower() not in SPLITS)
    if config and config in folders:
        files = [file for file in files if file.startswith(f"{config}/")]
    elif config:
        raise DataError(
            f"data set {name!r}: it has no configuration {config!r}; its folders are {', '.join(configs) or 'none'}"
        )
    elif len(configs) > 1 and all(file.partition("/")[0] in configs for file in files):
        raise DataError(
            f"data set {name!r} has the configurations {', '.join(configs)}; name one of them, as in "
            f"{name}:{configs[0]}"
        )
    splits: dict[str, list[str]] = {}
    for file in sorted(files):
        splits.setdefault(split_of(file), []).append(file)
    if set(splits) > {WHOLE}:  # beside files of splits, what else lies there is none
        del splits[WHOLE]
    return splits


def split_of(file: str) -> str:
    """data/test-00000-of-00001.parquet -> test; gsm8k_train.jsonl -> train; a/val/7.json -> validation."""
    for part in reversed(PurePosixPath(file).parts):
        words = re.split(r"[^a-z]+", part.lower())
        if found := next((SPLITS[word] for word in words if word in SPLITS), ""):
            return found
    return WHOLE


def hidden(file: str) -> bool:
    parts = PurePosixPath(file).parts
    return ".." in parts or any(part.startswith((".", "_")) for part in parts) or file.startswith("/")


def matches(file: str, pattern: str) -> bool:
    """As a shell would: `*` stays in a folder, `**/` is any number of folders."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    made = "".join(wild.get(p) or (p.replace("[!", "[^") if i % 2 else re.escape(p)) for i, p in enumerate(pieces))
    return re.fullmatch(made, file) is not None


def read_files(folder: Path, files: list[str]) -> Rows:
    for file in files:
        suffix = suffix_of(Path(file))
        assert suffix is not None, file
        read = read_json_or_lines if suffix == ".json" else READERS[suffix]
        for line, row in read(folder / file):
            yield file, line, row


def read_json_or_lines(path: Path) -> Iterator[tuple[int, object]]:
    """On the hub a .json file often holds a row per line."""
    with path.open("rb") as file:
        begins_list = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    yield from (read_json if begins_list else read_jsonl)(path)


def own_rows(rows: Rows, prefix: str, rewrite: Rewrite | None) -> Rows:
    """Rows as `rewrite` has them; those without an id are prefix/0, prefix/1, ..., whatever file they lie in."""
    for number, (file, line, row) in enumerate(rows):
        if isinstance(row, dict):
            row = rewrite(row) if rewrite else row
            row = row if row.get("id") not in (None, "") else row | {"id": f"{prefix}/{number}"}
        yield file, line, row
