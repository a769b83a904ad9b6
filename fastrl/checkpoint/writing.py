"""Writing a checkpoint: all of it is on the disk before it gets its name, and before an older one goes."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastrl.base import faults, ranks
from fastrl.base.types import CheckpointError, NumericsError
from fastrl.checkpoint.files import VERSION, checksum, manifest_text, newest, seal, step_of, sync
from fastrl.checkpoint.generators import python_generators, torch_generators
from fastrl.checkpoint.reading import check_manifest

ROOM = 1.2  # free space that a save begins with, in estimated sizes: tokenizer and headers are not estimated


def save(
    folder: Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    tensors: Iterable[tuple[str, Tensor]],
    weights: Tensor | None = None,
    state: dict,
    keep: int,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Commit a checkpoint of `step` under `folder` and prune to the newest `keep`. Returns its path.

    write_model(path) writes the Hugging Face part, which holds `weights`; `tensors` is this rank's optimizer state;
    say: hears of old checkpoints that could not be removed. Raises, on all ranks alike, CheckpointError when it cannot
    be written, and NumericsError before anything is written when a value is not finite. Whatever fails, an older
    checkpoint is as it was.
    """
    temporary, rank = folder / f".tmp-step-{step}", ranks.rank()
    own = {name: tensor.contiguous().cpu() for name, tensor in tensors}
    refuse_nonfinite(step, own if weights is None else {**own, "weights": weights})
    estimate = ranks.all_sum(float(sum(tensor.nbytes for tensor in own.values())))
    estimate += 0 if weights is None else weights.nbytes

    def begin() -> None:
        faults.at("save.begin")
        folder.mkdir(parents=True, exist_ok=True)
        free = faults.through("save.free", float(shutil.disk_usage(folder).free))
        if free < ROOM * estimate:
            raise OSError(errno.ENOSPC, f"{free / 1e9:.3g} GB free, {ROOM * estimate / 1e9:.3g} GB needed")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def write_own() -> None:
        save_file(own, temporary / f"optim-rank{rank}.safetensors")
        faults.at("save.optim")
        save_file(torch_generators(), temporary / f"rng-rank{rank}.safetensors")
        (temporary / f"rng-rank{rank}.json").write_text(json.dumps(python_generators()))
        faults.at("save.rng")

    def commit() -> None:
        write_model(temporary)
        faults.at("save.model")
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        faults.at("save.state")
        write_manifest(temporary, step)
        put_in_place(temporary)

    try:
        together(begin, first_only=True)
        together(write_own)
        together(commit, first_only=True)
    except OSError as error:
        if rank == 0:
            tidy(folder, say)
        raise CheckpointError(
            f"{folder / f'step-{step}'}: the checkpoint could not be written ({error}); free some space there"
        ) from error
    if rank == 0:
        prune(folder, keep, say)
    ranks.barrier()
    return folder / f"step-{step}"


def together(part: Callable[[], None], first_only: bool = False) -> None:
    """Do a part of a save on every rank, or on the first; where it fails on one, OSError is raised on all."""
    fault = ""
    if not first_only or ranks.rank() == 0:
        try:
            part()
        except (OSError, SafetensorError, CheckpointError) as error:
            fault = str(error) or type(error).__name__
    fault = ranks.first_text(fault)
    if fault:
        raise OSError(fault)


def refuse_nonfinite(step: int, tensors: dict[str, Tensor]) -> None:
    """Raise NumericsError, on all ranks, when a value of one rank is NaN or infinite."""
    bad = ranks.first_text(next((name for name, tensor in tensors.items() if not finite(tensor)), ""))
    if bad:
        raise NumericsError(
            f"step {step}: {bad} is not finite, so no checkpoint was written, and the last one is from before; "
            "resume from it with a lower --optim.lr"
        )


def finite(tensor: Tensor) -> bool:
    """Whether all values are; one pass and no copy, unlike isfinite().all()."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(bound) for bound in torch.stack(tensor.aminmax()).tolist())


def write_manifest(folder: Path, step: int) -> None:
    """Size and checksum of every file of the folder, and all of it on the disk."""
    faults.at("save.manifest")
    files = {p.name: {"size": p.stat().st_size, "crc32": checksum(p)} for p in sorted(folder.iterdir())}
    manifest = {"version": VERSION, "step": step, "ranks": ranks.size(), "files": files}
    check_manifest(seal(manifest), folder)  # what could not be read again is not written
    (folder / "MANIFEST.json").write_text(manifest_text(manifest))
    faults.at("save.sync")
    for path in folder.iterdir():
        sync(path)
    sync(folder)
    faults.at("save.synced")


def put_in_place(temporary: Path) -> None:
    """Give a complete checkpoint its name. One of the same step stays under another until this one is there."""
    folder = temporary.parent
    final = folder / temporary.name.removeprefix(".tmp-")
    if final.exists():  # the same step again, after a resume from before it
        os.rename(final, folder / f".old-{final.name}")
        faults.at("save.replace")
    faults.at("save.rename")
    os.rename(temporary, final)
    faults.at("save.renamed")
    sync(folder)
    faults.at("save.committed")


def remove_leftovers(folder: Path) -> None:
    """What a run that was killed in a save has left: half-written ones go, one that was being replaced comes back.

    Raises OSError when something cannot be removed.
    """
    for old in folder.glob(".old-step-*"):
        name = old.name.removeprefix(".old-")
        if step_of(Path(name)) is not None and not (folder / name).exists():
            os.rename(old, folder / name)
    for pattern in (".tmp-step-*", ".del-step-*", ".old-step-*"):
        for path in folder.glob(pattern):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            else:
                shutil.rmtree(path)


def tidy(folder: Path, say: Callable[[str], None]) -> None:
    """Remove leftovers, and say what could not be removed."""
    try:
        faults.at("save.tidy")
        remove_leftovers(folder)
    except OSError as error:
        say(f"warning: {folder}: what is left of a checkpoint could not be removed ({error}); it is never read")


def set_aside(folder: Path, step: int) -> None:
    """Rename checkpoints of later steps to abandoned-step-N: a run that went on from `step` is no longer theirs."""
    for path in newest(folder):
        own = step_of(path)
        if own is not None and own > step:
            target = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            os.rename(path, target)


def prune(folder: Path, keep: int, say: Callable[[str], None]) -> None:
    """Remove all but the newest `keep` (at least 2, so that one is whole while another is being judged).

    Only folders named step-N count; one with another name stays as long as it has it.
    """
    for old in newest(folder)[max(2, keep) :]:
        try:
            faults.at("save.prune")
            os.rename(old, old.with_name(f".del-{old.name}"))
            faults.at("save.pruned")
        except OSError as error:
            say(f"warning: {old}: this old checkpoint could not be removed ({error}); the run goes on")
    tidy(folder, say)
