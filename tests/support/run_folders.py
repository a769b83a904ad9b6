"""What lies in the folder of a run: its metrics and checkpoints, read back, compared, and signed anew."""

import hashlib
import json
from pathlib import Path

from fastrl import checkpoint

TIMES = ("timing_s/", "perf/", "memory/", "step_time", "profile/seconds")  # metrics that differ from run to run


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if not name.startswith(TIMES)}


def hexadecimal(metrics: dict) -> dict[str, str]:
    """Every number as float.hex, without times and memory."""
    return {name: float(value).hex() for name, value in without_times(metrics).items()}


def step_records(folder: Path) -> list[dict[str, str]]:
    """The metrics of every training step, hexadecimal."""
    return [hexadecimal(row) for row in rows(folder) if "reward" in row]


def sign_again(path: Path, **changed: object) -> None:
    """Make the manifest of a checkpoint say what its files are now, and what else is `changed`."""
    manifest = json.loads((path / "MANIFEST.json").read_text())
    files = {
        p.name: {"size": p.stat().st_size, "crc32": checkpoint.checksum(p)}
        for p in sorted(path.iterdir())
        if p.is_file() and not p.is_symlink() and p.name != "MANIFEST.json"
    }
    manifest |= {"files": files, **changed}
    (path / "MANIFEST.json").write_text(checkpoint.manifest_text(manifest))


def digest(path: Path) -> dict[str, str]:
    """sha256 of the weights, the optimizer's states and the generators in a checkpoint."""
    names = ["model.safetensors", *(p.name for p in sorted(path.iterdir()) if p.name.startswith(("optim", "rng")))]
    return {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}


def leftovers(folder: Path) -> list[str]:
    """What is in a folder of checkpoints and is none."""
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))
