"""What the tensors of a rank are, by name: how long, of which types, and how they are cut among ranks."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastrl.base.types import CheckpointError
from fastrl.checkpoint.files import unique

MAX_HEADER = 100_000_000  # bytes; safetensors has the same limit
BLOCK = 256  # elements of an 8-bit state that share a scale


@dataclass(frozen=True, slots=True)
class Rule:
    """each: what one rank's tensor holds. element: one per element of its shard; block: one per 256; same: on all."""

    dtypes: tuple[str, ...]
    each: Literal["element", "block", "same"]


FLOATS = ("F32", "F64")
RULES = {
    "master": Rule(FLOATS, "element"),
    "optimizer.exp_avg": Rule(FLOATS, "element"),
    "optimizer.exp_avg_sq": Rule(FLOATS, "element"),
    "optimizer.step": Rule(("F32", "I64"), "same"),
    "optimizer.state1": Rule(("U8", "F32"), "element"),
    "optimizer.state2": Rule(("U8", "F32"), "element"),
    "optimizer.absmax1": Rule(("F32",), "block"),
    "optimizer.absmax2": Rule(("F32",), "block"),
    "optimizer.qmap1": Rule(("F32",), "same"),
    "optimizer.qmap2": Rule(("F32",), "same"),
}
LENGTHS = {"optimizer.step": 1, "optimizer.qmap1": 256, "optimizer.qmap2": 256}


def rule_of(name: str) -> Rule | None:
    """What a tensor without the critic's prefix must be; None where no run has it. `update.X` is an update rule's."""
    return Rule(FLOATS, "element") if name.startswith("update.") else RULES.get(name)


def split_name(name: str) -> tuple[str, str]:
    """'critic.optimizer.step' -> ('critic.', 'optimizer.step'); what has no prefix is the policy's."""
    return ("critic.", name.removeprefix("critic.")) if name.startswith("critic.") else ("", name)


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Names of a safetensors file with dtype and shape; reads the header alone, and never more than its limit.

    Raises CheckpointError where it is too long or no header. That offsets fit is checked by safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise CheckpointError(f"{path}: its header claims {length} bytes of {size}, so it is no safetensors file")
        try:
            entries = json.loads(file.read(length), object_pairs_hook=unique)
            found = {n: (e["dtype"], list(e["shape"])) for n, e in entries.items() if n != "__metadata__"}
        except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{path}: its header cannot be read ({type(error).__name__}: {error}); use another checkpoint"
            ) from error
    return found


def check_tensors(path: Path, header: dict[str, tuple[str, list[int]]], sizes: dict[str, int]) -> None:
    """Raise CheckpointError unless every tensor is one that a rank writes, of its type and length.

    sizes: elements of the shard by prefix ("" for the policy, "critic."); {}: any. All masters are float32 or float64.
    """
    for name, (dtype, shape) in header.items():
        prefix, rest = split_name(name)
        rule = rule_of(rest)
        if rule is None or (sizes and prefix not in sizes):
            raise CheckpointError(f"{path}: it has a tensor {name[:80]!r}, which this run has not; use another one")
        if dtype not in rule.dtypes:
            raise CheckpointError(f"{path}: {name} is {dtype!r:.20}, expected {' or '.join(rule.dtypes)}")
        if shape == [] and rule.each == "same":
            continue
        wanted = LENGTHS.get(rest) if rule.each == "same" else sizes.get(prefix)
        if rule.each == "block" and wanted:
            wanted = -(-wanted // BLOCK)
        if len(shape) != 1 or type(shape[0]) is not int or wanted not in (None, shape[0]):
            raise CheckpointError(
                f"{path}: {name} has the shape {str(shape)[:60]}, and this run needs [{wanted}]; "
                "it belongs to another model"
            )
