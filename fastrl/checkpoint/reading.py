"""Reading a checkpoint that may be damaged, another run's, or made to do harm: checked before anything is used."""

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastrl.base import ranks
from fastrl.base.types import CheckpointError
from fastrl.checkpoint.files import MAX_JSON, VERSION, checksum, manifest_text, read_json, regular_size, seal, step_of
from fastrl.checkpoint.generators import generators, restore_generators
from fastrl.checkpoint.resharding import reslice
from fastrl.checkpoint.state_form import whole
from fastrl.checkpoint.tensor_form import check_tensors, read_header

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", re.ASCII)
# what other programs would run code from; no checkpoint of ours has them
CODE = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".distcp", ".metadata", ".npy", ".npz", ".py", ".so")
OF_RUN = ("optim-", "rng-", "state.json")  # files of a checkpoint that are not the model's
MAX_STEP, MAX_RANKS, MAX_BYTES, MAX_FILES = 10**12, 2**16, 2**50, 2**20


def load(path: Path, sizes: dict[str, int] | None = None, device: str = "cpu") -> tuple[dict, dict[str, Tensor]]:
    """A verified checkpoint -> its state and this rank's tensors; restores the generators of this process.

    sizes: elements of this rank's shard by prefix of its tensors, "" for the policy's; without it they may have any
    length, and the number of ranks must be that of the checkpoint. A rank that did not exist then keeps its
    generators. Raises CheckpointError, on every rank alike, naming the file that is missing, changed or not ours.
    """
    fault, before = "", generators()
    try:
        state, tensors, own_generators = read(path, sizes or {}, device)
        if own_generators:
            restore_generators(*own_generators)
    except CheckpointError as error:
        fault = str(error)
    except (OSError, SafetensorError) as error:
        fault = f"{path}: not readable ({error}); use another checkpoint"
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        fault = f"{path}: the states of the generators cannot be used ({error!r:.200}); use another checkpoint"
    fault = ranks.first_text(fault)
    if fault:
        restore_generators(*before)
        raise CheckpointError(fault)
    return state, tensors


def read(path: Path, sizes: dict[str, int], device: str) -> tuple[dict, dict[str, Tensor], tuple | None]:
    """-> state, this rank's tensors, states of its generators. Each rank takes its share of the checksums."""
    manifest = verify(path)
    state = read_json(path / "state.json")
    if not isinstance(state, dict) or state.get("step") != manifest["step"]:
        raise CheckpointError(f"{path}: state.json is not of step {manifest['step']}, as the manifest says")
    count, rank = manifest["ranks"], ranks.rank()
    if count != ranks.size() and not sizes:
        raise CheckpointError(f"{path}: written by {count} ranks but this run has {ranks.size()}; start as many")
    own = None
    if rank < count:
        own = load_file(path / f"rng-rank{rank}.safetensors"), read_json(path / f"rng-rank{rank}.json")
    files = [path / f"optim-rank{r}.safetensors" for r in range(count)]
    if count == ranks.size():
        check_tensors(files[rank], read_header(files[rank]), sizes)
        return state, load_file(files[rank], device=device), own
    headers = [read_header(file) for file in files]
    for file, header in zip(files, headers, strict=True):
        check_tensors(file, header, {})
        if header != headers[0]:
            raise CheckpointError(f"{file}: it has other tensors than the first rank's; use another checkpoint")
    return state, reslice(files, sizes, rank, ranks.size(), device), own


def verify(path: Path) -> dict:
    """Check the manifest, and this rank's share of the files against it -> the manifest. Raises CheckpointError."""
    manifest = read_manifest(path)
    beside = sorted({p.name for p in path.iterdir()} - {*manifest["files"], "MANIFEST.json"})
    if beside:
        raise CheckpointError(f"{path}: {beside[0]!r} is not named in the manifest; take it out of the folder")
    check_files(path, manifest["files"])
    return manifest


def verify_model(path: Path) -> None:
    """Check the files of the model in a checkpoint against its manifest; a folder without one passes.

    Raises CheckpointError, on every rank alike. The folder may have lost what only a resumed run reads, and may hold
    more files than the manifest names.
    """
    fault = ""
    try:
        if (path / "MANIFEST.json").exists():
            files = read_manifest(path)["files"]
            check_files(path, {name: files[name] for name in files if not name.startswith(OF_RUN)})
    except CheckpointError as error:
        fault = str(error)
    except OSError as error:
        fault = f"{path}: not readable ({error}); use another checkpoint"
    fault = ranks.first_text(fault)
    if fault:
        raise CheckpointError(fault)


def read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint's folder, checked in itself. Raises CheckpointError."""
    if not path.is_dir() or regular_size(path / "MANIFEST.json") is None:
        raise CheckpointError(f"{path}: no MANIFEST.json, so this is not a complete checkpoint")
    manifest = read_json(path / "MANIFEST.json")
    check_manifest(manifest, path)
    if (path / "MANIFEST.json").read_bytes() != manifest_text(manifest).encode():
        raise CheckpointError(f"{path}: MANIFEST.json has changed since it was written (not a byte may)")
    return manifest


def check_files(path: Path, files: dict[str, dict[str, int]]) -> None:
    """Raise CheckpointError where one of the files is missing or, if it is in this rank's share, has changed."""
    for number, (name, wanted) in enumerate(sorted(files.items())):
        size = regular_size(path / name)
        if size is None:
            raise CheckpointError(f"{path}: {name} is named in the manifest but missing, or no plain file")
        mine = number % ranks.size() == ranks.rank()
        if size != wanted["size"] or (mine and checksum(path / name) != wanted["crc32"]):
            raise CheckpointError(f"{path}: {name} has changed since it was written (size or checksum)")


def check_manifest(manifest: object, path: Path) -> None:
    """Raise CheckpointError unless it is one that this version writes, for this folder, and unchanged."""
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise CheckpointError(f"{path}: the manifest is not of version {VERSION}; use the fastrl that wrote it")
    if manifest != seal(manifest):
        raise CheckpointError(f"{path}: MANIFEST.json has changed since it was written (its own checksum)")
    step, count, files = (manifest.get(name) for name in ("step", "ranks", "files"))
    if not whole(step, 0, MAX_STEP) or step_of(path) not in (None, step):
        raise CheckpointError(f"{path}: the manifest says step {str(step)[:40]}, which is not this checkpoint's")
    if not whole(count, 1, MAX_RANKS) or not isinstance(files, dict) or len(files) > MAX_FILES:
        raise CheckpointError(f"{path}: the manifest needs 'ranks', at least 1, and 'files', an object")
    for name, entry in files.items():
        if not NAME.fullmatch(name) or name.endswith(CODE):
            raise CheckpointError(f"{path}: the manifest names {name[:80]!r}, which no checkpoint has; use another one")
        if (
            not isinstance(entry, dict)
            or not whole(entry.get("size"), 0, MAX_JSON if name.endswith(".json") else MAX_BYTES)
            or not whole(entry.get("crc32"), 0, 2**32 - 1)
        ):
            raise CheckpointError(f"{path}: the manifest says {str(entry)[:80]} of {name}, expected size and crc32")
    needed = ["state.json"]
    needed += [f"{kind}-rank{r}.{end}" for r in range(count) for kind, end in KINDS]
    missing = [name for name in needed if name not in files]
    if missing:
        raise CheckpointError(f"{path}: the manifest does not name {missing[0]}; use another checkpoint")
    check_index(path, files)


KINDS = (("optim", "safetensors"), ("rng", "safetensors"), ("rng", "json"))


def check_index(path: Path, files: dict) -> None:
    """Raise CheckpointError when the index of a model in several files leads to a file that is not one of them."""
    name = "model.safetensors.index.json"
    if name not in files:
        return
    index = read_json(path / name)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(p, str) and p in files for p in places.values()):
        raise CheckpointError(f"{path}: {name} leads to a file that the manifest does not name; use another checkpoint")
