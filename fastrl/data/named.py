"""Data sets with a name of their own: fetched from the hub at a commit that is known, or read from local copies."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from fastrl.base.hub import Repo
from fastrl.base.types import DataError
from fastrl.data.base import BOXED_INSTRUCTION, Loaded, problems_from_rows
from fastrl.data.files import missing, read_object, read_rows
from fastrl.data.hub import HubDataset, Rewrite

EXCLUDE_FILE = "exclude_ids.json"


@dataclass(frozen=True, kw_only=True)
class NamedDataset:
    """A repository of the hub, and how local copies of it are called.

    Without --data-dir it is fetched. With it, it is one file per split in that folder, and training leaves out the ids
    of exclude_ids.json there.
    """

    name: str
    repo: str = ""  # owner/name on the hub, if it is there
    revision: str = "main"  # a commit, where it is known; else what the branch is at the start of a run
    config: str = ""
    splits: dict[str, str] = field(default_factory=dict)  # --split -> the repository's name of it
    files: dict[str, str]  # split -> path of a local copy below --data-dir
    rewrite: Rewrite | None = None
    default_reward: str = "math"
    default_instruction: str = BOXED_INSTRUCTION

    @property
    def hub(self) -> HubDataset:
        return HubDataset(
            name=self.name,
            repo=Repo(kind="dataset", name=self.repo, revision=self.revision),
            preferred=self.config,
            splits=self.splits,
            rewrite=self.rewrite,
        )

    def at(self, revision: str) -> "NamedDataset":
        """At another revision: NAME@REVISION."""
        return replace(self, revision=revision)

    def load(self, split: str, data_dir: str = "") -> Loaded:
        if not data_dir and not self.repo:
            raise DataError(f"data set {self.name!r} is not on the hub; pass the folder that holds it as --data-dir")
        if not data_dir:
            if split not in self.splits:
                raise DataError(
                    f"data set {self.name!r} has {', '.join(self.splits)} but no split {split!r}; use --split"
                )
            return self.hub.load(split)
        folder = Path(data_dir).expanduser()
        if not folder.is_dir():
            raise DataError(
                f"data set {self.name!r}: there is no data folder {str(data_dir)!r} (looked in {folder.resolve()}); "
                "pass the folder that holds the problem files as --data-dir, or none to fetch the data set"
            )
        if split not in self.files:
            raise DataError(f"data set {self.name!r} has {', '.join(self.files)} but no split {split!r}; use --split")
        path = folder / self.files[split]
        if not path.is_file():
            raise DataError(f"data set {self.name!r}: {missing(path)}. Is --data-dir {data_dir} the right folder?")
        exclude = read_exclude(folder / EXCLUDE_FILE) if split == "train" else {}
        return problems_from_rows(read_rows(path, split), source=str(path), exclude=exclude)


def read_exclude(path: Path) -> dict[str, list[str]]:
    """id -> why it is not trained on. A missing file is a DataError, so that nobody trains on them unknowingly."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; it names the ids not to train on. Write {{}} into it to exclude none")
    return read_object(path)
