"""Building the program's own parts inside a test."""

import hashlib
import json
from pathlib import Path

import pytest

from fastrl import checkpoint
from fastrl.base.log import RunLog
from fastrl.run.build import build
from fastrl.run.resolve import resolve
from fastrl.run.sampling import open_rewards
from fastrl.settings.parse import parse
from fastrl.settings.run import AXES, EMBEDDED_RECIPE, TrainConfig
from fastrl.step.trainer import Trainer

TIMES = ("timing_s/", "perf/", "memory/", "step_time", "profile/seconds")


def make_trainer(folder: Path, *args: object, stop_requested=lambda: False) -> Trainer:
    """The trainer of `python -m fastrl.train ARGS` on the embedded task, writing into `folder`."""
    argv = [str(EMBEDDED_RECIPE), "--out", str(folder), *map(str, args)]
    config = parse(TrainConfig, argv, AXES)
    log = RunLog(folder, total_steps=config.run.steps)
    log.open()
    return build(resolve(config), log, open_rewards(config), stop_requested)


def mostly_later(values, *now):
    """Parameters of a test, of which those that are not in `now` only run in `make soak`."""
    return [value if value in now else pytest.param(*listed(value), marks=pytest.mark.soak) for value in values]


def listed(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def step_records(folder: Path) -> list[dict[str, str]]:
    """Every number of every training step as float.hex, without times and memory."""
    return [
        {name: float(value).hex() for name, value in row.items() if not name.startswith(TIMES)}
        for row in rows(folder)
        if "reward" in row
    ]


def sign_again(path: Path, **changed: object) -> None:
    """Make the manifest of a checkpoint say what its files are now, and what else is `changed`."""
    manifest = json.loads((path / "MANIFEST.json").read_text())
    files = {
        p.name: {"size": p.stat().st_size, "crc32": checkpoint.checksum(p)}
        for p in sorted(path.iterdir()) if p.is_file() and not p.is_symlink() and p.name != "MANIFEST.json"
    }  # fmt: skip
    manifest |= {"files": files, **changed}
    (path / "MANIFEST.json").write_text(checkpoint.manifest_text(manifest))


def digest(path: Path) -> dict[str, str]:
    """sha256 of the weights, the optimizer's states and the generators in a checkpoint."""
    names = ["model.safetensors", *(p.name for p in sorted(path.iterdir()) if p.name.startswith(("optim", "rng")))]
    return {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}


def leftovers(folder: Path) -> list[str]:
    """What is in a folder of checkpoints and is none."""
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))
