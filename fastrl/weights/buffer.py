"""One contiguous weight buffer behind a Hugging Face model, and a gradient buffer of the same layout.

A slot is one tensor as vLLM holds it. vLLM's fused tensors (qkv_proj, gate_up_proj) are row concatenations of Hugging
Face tensors, so each of those is a contiguous row range of one slot and the model's parameters can be views. Optimizers
and update rules see the buffers, or one rank's slice of them, as flat vectors.

    offset   0          1024                   ...
             | embed_tokens | layers.0.qkv_proj: q rows, k rows, v rows | ... |    starts at multiples of 1024 elements

Padding (between slots, vocabulary rows up to a multiple of 64, the tail) is zero, gets no gradient and stays zero.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGN = 1024  # elements: tensors start at multiples of it, so 16-byte vectors fit, and 8-bit scales of 256
BLOCK = ALIGN  # elements that belong to one tensor, as moves count them
PART = 1 << 24  # elements that are in a wider type at a time
VOCAB_ROWS = 64  # vLLM pads the vocabulary to a multiple of this

FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
FUSED_PART = {part: (fused, row) for fused, parts in FUSED.items() for row, part in enumerate(parts)}


@dataclass(frozen=True, slots=True)
class Slot:
    offset: int  # elements
    shape: tuple[int, ...]  # with padded vocabulary rows
    parts: tuple[str, ...]  # Hugging Face parameter names, in row order

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def slot_name(parameter: str) -> tuple[str, int]:
    """'...self_attn.k_proj.bias' -> ('...self_attn.qkv_proj.bias', 1); a tensor that is not fused keeps its name."""
    module, leaf = parameter.rsplit(".", 1)
    for part, (fused, row) in FUSED_PART.items():
        if module.endswith(part):
            return f"{module.removesuffix(part)}{fused}.{leaf}", row
    return parameter, 0


def layout(shapes: dict[str, tuple[int, ...]]) -> dict[str, Slot]:
    """Hugging Face parameter names and shapes, tied ones once -> slots by vLLM name. Needs neither weights nor vLLM."""
    parts: dict[str, list[tuple[int, str]]] = {}
    for parameter in shapes:
        name, row = slot_name(parameter)
        parts.setdefault(name, []).append((row, parameter))
    slots, offset = {}, 0
    for name, rows in parts.items():
        members = tuple(parameter for _, parameter in sorted(rows))
        shape = (sum(shapes[m][0] for m in members), *shapes[members[0]][1:])
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            shape = (round_up(shape[0], VOCAB_ROWS), *shape[1:])
        slots[name] = Slot(offset, shape, members)
        offset += round_up(math.prod(shape), ALIGN)
    return slots


def buffer_elements(slots: dict[str, Slot], ranks: int) -> int:
    """Elements of a buffer that holds the slots and divides evenly among ranks."""
    last = list(slots.values())[-1]
    return round_up(last.offset + last.numel, ALIGN * ranks)


class FlatParams:
    """The buffers of one model: `weights` [P] in the model's dtype and `grads` [P], which autograd accumulates into.

    grad_dtype None: there are no gradients.

    Example: a q_proj.weight [32, 64] becomes rows 0..31 of its slot qkv_proj.weight; to write the buffer is to write
    the model.
    """

    def __init__(self, model: nn.Module, *, ranks: int = 1, grad_dtype: torch.dtype | None = torch.float32):
        named = dict(model.named_parameters())
        first = next(iter(named.values()))
        wrong = [n for n, p in named.items() if p.dtype != first.dtype or p.device != first.device]
        if wrong:
            raise ValueError(f"all parameters must share {first.dtype} on {first.device}, but not {wrong[:3]}")
        self.slots = layout({name: tuple(p.shape) for name, p in named.items()})
        total = buffer_elements(self.slots, ranks)
        self.weights = torch.zeros(total, dtype=first.dtype, device=first.device)
        self.grads = None  # of a model that is not trained
        if grad_dtype is not None:
            self.grads = torch.zeros(total, dtype=torch.promote_types(grad_dtype, first.dtype), device=first.device)
        for slot in self.slots.values():
            row = 0
            for name in slot.parts:
                param = named[name]
                rows = slice(row, row + param.shape[0])
                with torch.no_grad():
                    view = self.view(self.weights, slot)[rows]
                    view.copy_(param)
                param.data = view
                if self.grads is not None:
                    param.grad_dtype = self.grads.dtype
                    param.grad = self.view(self.grads, slot)[rows]
                row += param.shape[0]

    def view(self, buffer: Tensor, slot: Slot) -> Tensor:
        """A slot of `buffer` in its own shape."""
        return buffer[slot.offset : slot.offset + slot.numel].view(slot.shape)

    def owns(self, tensor: Tensor) -> bool:
        """Whether `tensor` starts inside the weight buffer."""
        start = self.weights.data_ptr()
        return start <= tensor.data_ptr() < start + self.weights.numel() * self.weights.element_size()

    def take_grads(self) -> None:
        """Memory for the gradients, with whatever is in it, where `drop_grads` has given it back; views of them hold.

        Who accumulates zeroes them first: zeroes here would be written twice.
        """
        assert self.grads is not None
        if not self.grads.untyped_storage().nbytes():
            self.grads.untyped_storage().resize_(self.grads.numel() * self.grads.element_size())

    def zero_grads(self) -> None:
        """Gradients of zero, once for each that is accumulated."""
        self.take_grads()
        assert self.grads is not None
        self.grads.zero_()

    def drop_grads(self) -> None:
        """Give the memory of the gradients back; until `take_grads` they must not be touched."""
        assert self.grads is not None
        self.grads.untyped_storage().resize_(0)
