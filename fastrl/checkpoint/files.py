"""Names of checkpoints, and the files in one: checksums, what reaches the disk, JSON that may be anyone's."""

import json
import os
import re
import stat
import zlib
from pathlib import Path

from fastrl.base.types import CheckpointError

VERSION = 2
STEP = re.compile(r"step-(0|[1-9][0-9]{0,11})", re.ASCII)
MAX_JSON = 2**26  # bytes; a state takes a few thousand


def step_of(path: Path) -> int | None:
    """The step that a folder's name says, None for any other name."""
    found = STEP.fullmatch(path.name)
    return int(found[1]) if found else None


def newest(folder: Path) -> list[Path]:
    """Committed checkpoints under `folder`, newest first; a link is none."""
    steps = {path: step_of(path) for path in folder.glob("step-*") if path.is_dir() and not path.is_symlink()}
    found = [(-step, path) for path, step in steps.items() if step is not None]
    return [path for _, path in sorted(found, key=lambda pair: pair[0])]


def checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def seal(manifest: dict) -> dict:
    """The manifest with the checksum of its own content under `crc32`."""
    content = {name: value for name, value in manifest.items() if name != "crc32"}
    return content | {"crc32": zlib.crc32(json.dumps(content, sort_keys=True).encode())}


def manifest_text(manifest: dict) -> str:
    """The one way in which a manifest is written, its own checksum included."""
    return json.dumps(seal(manifest), indent=1)


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def regular_size(path: Path) -> int | None:
    """Bytes of a regular file; None where there is none, or something that is not one, such as a link or a pipe."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def read_json(path: Path):
    """Raises CheckpointError on anything but one JSON document of moderate size with each name once in an object."""
    try:
        size = regular_size(path)
        if size is None or size > MAX_JSON:
            raise CheckpointError(f"{path}: expected a file of at most {MAX_JSON} bytes, got {size or 'none'}")
        return json.loads(path.read_bytes(), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable ({type(error).__name__}: {error})") from error


def unique(pairs: list[tuple[str, object]]) -> dict:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a name comes twice in one object")
    return names
