"""Checkpoints: directories of safetensors and JSON that are complete or not there.

    step-40/  config.json model.safetensors tokenizer...    a Hugging Face model folder
              optim-rank0.safetensors                       float32 master and optimizer state of one rank's shard
              rng-rank0.safetensors, .json                  generators of torch and the device; of Python and numpy
              state.json                                    step, positions, counters, configuration
              MANIFEST.json                                 size and crc32 of every file

Written to .tmp-step-40, synced to disk, renamed, and only then are old ones removed. A checkpoint is used when every
file of its manifest is there with the right size and checksum; nothing is ever unpickled.
"""

import json
import os
import random
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastrl import ranks
from fastrl.types import CheckpointError

VERSION = 1


def save(
    folder: Path, step: int, *, write_model: Callable[[Path], None], tensors: Iterable[tuple[str, Tensor]],
    state: dict, keep: int,
) -> Path:  # fmt: skip
    """Commit a checkpoint of `step` under `folder` and prune to the newest `keep`. Returns its path.

    write_model(path) writes the Hugging Face part; `tensors` is this rank's optimizer state. Raises CheckpointError
    when it cannot be written; an older checkpoint is never touched before the new one is complete.
    """
    temporary, final = folder / f".tmp-step-{step}", folder / f"step-{step}"
    try:
        if ranks.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        ranks.barrier()
        rank = ranks.rank()
        save_file({n: t.contiguous().cpu() for n, t in tensors}, temporary / f"optim-rank{rank}.safetensors")
        save_file(torch_generators(), temporary / f"rng-rank{rank}.safetensors")
        (temporary / f"rng-rank{rank}.json").write_text(json.dumps(python_generators()))
        ranks.barrier()
        if rank == 0:
            write_model(temporary)
            (temporary / "state.json").write_text(json.dumps(state, indent=1))
            files = {p.name: {"size": p.stat().st_size, "crc32": checksum(p)} for p in sorted(temporary.iterdir())}
            manifest = {"version": VERSION, "step": step, "ranks": ranks.size(), "files": files}
            (temporary / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))
            for path in temporary.iterdir():
                sync(path)
            sync(temporary)
            if final.exists():  # the same step again, after a resume from before it
                shutil.rmtree(final)
            os.rename(temporary, final)
            sync(folder)
            prune(folder, keep)
        ranks.barrier()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final}: the checkpoint could not be written ({error}); free some space there"
        ) from error
    return final


def load(path: Path, device: str = "cpu") -> tuple[dict, dict[str, Tensor]]:
    """A verified checkpoint -> its state and this rank's tensors; restores the generators of this process.

    Raises CheckpointError naming the file that is missing or changed.
    """
    manifest = verify(path)
    if manifest["ranks"] != ranks.size():
        raise CheckpointError(
            f"{path}: written by {manifest['ranks']} ranks but this run has {ranks.size()}; start as many as then"
        )
    rank = ranks.rank()
    tensors = load_file(path / f"optim-rank{rank}.safetensors", device=device)
    restore_generators(load_file(path / f"rng-rank{rank}.safetensors"), read_json(path / f"rng-rank{rank}.json"))
    return read_json(path / "state.json"), tensors


def verify(path: Path) -> dict:
    """Check every file against the manifest and return the manifest. Raises CheckpointError at the first difference."""
    if not (path / "MANIFEST.json").is_file():
        raise CheckpointError(f"{path}: no MANIFEST.json, so this is not a complete checkpoint")
    manifest = read_json(path / "MANIFEST.json")
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise CheckpointError(f"{path}: the manifest is not of version {VERSION}; use the fastrl that wrote it")
    for name, wanted in manifest["files"].items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{path}: {name!r} is named in the manifest but missing")
        if file.stat().st_size != wanted["size"] or checksum(file) != wanted["crc32"]:
            raise CheckpointError(f"{path}: {name} has changed since it was written (size or checksum)")
    return manifest


def newest(folder: Path) -> list[Path]:
    """Committed checkpoints under `folder`, newest first."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: -int(p.name.removeprefix("step-")))


def set_aside(folder: Path, step: int) -> None:
    """Rename checkpoints of later steps to abandoned-step-N: a run that went on from `step` is no longer theirs."""
    for path in newest(folder):
        if int(path.name.removeprefix("step-")) > step:
            target = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            os.rename(path, target)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` (at least 2, so that one is whole while another is being judged)."""
    for old in newest(folder)[max(2, keep) :]:
        doomed = old.with_name(f".del-{old.name}")
        os.rename(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable ({error})") from error


def checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leave every generator of this process as it was, whatever is drawn inside."""
    before = generators()
    try:
        yield
    finally:
        restore_generators(*before)


def generators() -> tuple[dict[str, Tensor], dict]:
    """States of torch's generators, and of Python's and numpy's."""
    return torch_generators(), python_generators()


def seed_generators(seed: int) -> None:
    """Seed torch, Python and numpy; nothing of ours draws from them, but reward functions may."""
    import numpy

    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def torch_generators() -> dict[str, Tensor]:
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def python_generators() -> dict:
    import numpy

    name, keys, position, has_gauss, gauss = numpy.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],
    }


def restore_generators(tensors: dict[str, Tensor], others: dict) -> None:
    import numpy

    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, internal, gauss_next = others["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = others["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, gauss))
