"""What the layers of a model keep for the backward pass, and where.

    none        whatever autograd saves
    selective   each layer's input, and what attention gives: its cost grows with the square of the length
    full        each layer's input; all else is computed again

A byte of attention's output spares length, a byte of any other product's output only width, in operations; so products
are computed again under `selective` too.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Literal

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from fastrl.weights.host_slabs import Forward, HostSlabs, Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CheckpointMode = Literal["none", "selective", "full"]
LEAST = 1024  # elements; what is smaller is not worth the way to the host


def attention_kept(context, operator, *args, **kwargs) -> CheckpointPolicy:
    """Kept: outputs of attention kernels, of PyTorch's and of flash-attn's, which are operators of that name."""
    kept = "attention" in operator.name() or "attn" in operator.name()
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_layers(model: "PreTrainedModel", mode: CheckpointMode) -> None:
    """Let each layer of a transformers model keep what `mode` says."""
    if mode == "none":
        return
    how: dict = {"use_reentrant": False}
    if mode == "selective":
        how["context_fn"] = partial(create_selective_checkpoint_contexts, attention_kept)
    # the first name is that of transformers since 5.23, the second is on its way out
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(how)


def saved_on_host(weights: Tensor, slabs: HostSlabs | None) -> AbstractContextManager:
    """Around one forward: what autograd saves goes to slabs on the host until the backward asks for it; None: it stays.

    weights: a buffer whose views stay, for they are there anyway. What `selective` keeps beside the layers' inputs is
    not saved by autograd, and stays too.
    """
    if slabs is None:
        return nullcontext()
    forward, place = Forward(slabs), weights.untyped_storage().data_ptr()

    def pack(x: Tensor) -> Tensor | Kept:
        stays = x.numel() < LEAST or x.untyped_storage().data_ptr() == place
        return x if stays else forward.put(x)

    def unpack(kept: Tensor | Kept) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.back()

    return saved_tensors_hooks(pack, unpack)
