"""What a model reads of a microbatch: made on the CPU, where the batch is, and uploaded in one transfer.

Every position is an index that the CPU has computed. A boolean mask on a GPU would do as well, but the host must wait
for the device to count its elements.
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import embedding  # a gather whose backward adds up in a fixed order, in parallel

from fastrl.base.types import TrainBatch
from fastrl.models.packing import Packing, pack

T = TypeVar("T")
ALIGN = 16  # bytes between the tensors of an upload


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """L response tokens of B rows of S tokens, and the hidden states that predict them.

    With rows [p p a] and [p p b b], unpacked: labels 2, 6, 7 of 2 * 4 places; sources 1, 4, 5 of 2 * 3 hidden states.
    """

    shape: tuple[int, int]  # B, S
    ids: Tensor  # int64, [B, S - 1], or the packing's [1, N]: nothing is predicted from a row's last token
    labels: Tensor  # [L] int64, where the response tokens stand among the B * S
    targets: Tensor  # [L] int64, their ids
    sources: Tensor  # [L] int64, which hidden state predicts each
    packing: Packing | None

    @classmethod
    def of(cls, input_ids: Tensor, response_mask: Tensor, packing: Packing | None = None) -> "Inputs":
        """input_ids, response_mask [B, S] on the CPU, right-padded."""
        B, S = input_ids.shape
        labels = response_mask.flatten().nonzero()[:, 0]
        sources = labels - 1 - labels.div(max(1, S), rounding_mode="floor")  # rows are one shorter
        ids = input_ids[:, :-1]
        if packing is not None:
            ids, sources = packing.input_ids, packing.place.flatten()[sources]
        return cls((B, S), ids, labels, input_ids.flatten()[labels], sources, packing)

    def spread(self, x: Tensor) -> Tensor:
        """x [L] -> [B, S], at the response tokens and zero elsewhere."""
        B, S = self.shape
        return x.new_zeros(B * S).index_copy(0, self.labels, x).view(B, S)

    def at_labels(self, x: Tensor) -> Tensor:
        """x [B, S] -> [L]"""
        return x.flatten()[self.labels]

    def at_sources(self, hidden: Tensor) -> Tensor:
        """Hidden states of all tokens, [..., H] -> [L, H]"""
        return embedding(self.sources, hidden.flatten(0, -2))


def inputs_of(batch: TrainBatch, packs: bool) -> Inputs:
    return Inputs.of(batch.input_ids, batch.response_mask, pack(batch) if packs else None)


def upload(things: T, device: torch.device) -> T:
    """Dataclasses (and tuples of them) of tensors on the CPU -> the same on the device, after one transfer.

    On CUDA all tensors travel in one pinned buffer, and the host does not wait for it.
    """
    found: dict[int, Tensor] = {}
    collect(things, found)
    if device.type == "cpu" or not found:
        return things
    starts, size = {}, 0
    for name, tensor in found.items():
        starts[name] = size
        size += -(-tensor.numel() * tensor.element_size() // ALIGN) * ALIGN
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for name, tensor in found.items():
        view(buffer, starts[name], tensor).copy_(tensor)
    there = buffer.to(device, non_blocking=True)
    return with_tensors(things, {name: view(there, starts[name], tensor) for name, tensor in found.items()})


def view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)


def collect(thing: Any, into: dict[int, Tensor]) -> None:
    """All tensors in it, by id: one that is there twice travels once."""
    if isinstance(thing, Tensor):
        into[id(thing)] = thing
    elif isinstance(thing, tuple):
        for part in thing:
            collect(part, into)
    elif is_dataclass(thing):
        for f in fields(thing):
            collect(getattr(thing, f.name), into)


def with_tensors(thing: Any, moved: dict[int, Tensor]) -> Any:
    """The thing with the tensors of `moved`, by the id of the one that each replaces."""
    if isinstance(thing, Tensor):
        return moved[id(thing)]
    if isinstance(thing, tuple):
        return tuple(with_tensors(part, moved) for part in thing)
    if is_dataclass(thing) and not isinstance(thing, type):
        values = {f.name: getattr(thing, f.name) for f in fields(thing)}
        return replace(thing, **{name: with_tensors(value, moved) for name, value in values.items()})
    return thing
