"""Liger's kernels for the norms, rotary positions and gated MLPs of a loaded model: fewer saved activations, less time.

Its losses are not used: the head has kernels of its own.
"""

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PATCHES = {name: f"apply_liger_kernel_to_{name}" for name in ("llama", "qwen2", "qwen3")}  # by model_type


def check(model_type: str, device: str) -> None:
    """Raise ValueError where the kernels cannot be used."""
    if model_type not in PATCHES:
        raise ValueError(f"--liger knows {', '.join(PATCHES)}, but the model is of type {model_type}; leave it out")
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError(
            "--liger needs liger-kernel, which is not installed; pip install liger-kernel, or leave it out"
        )
    if not device.startswith("cuda"):
        raise ValueError(f"--liger is for a GPU, but the device is {device}; leave it out")


def patch(model: "PreTrainedModel") -> None:
    """Put the kernels into a transformers model. Rotary positions are replaced in the whole process."""
    from liger_kernel import transformers

    apply = getattr(transformers, PATCHES[model.config.model_type])
    apply(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=model)
