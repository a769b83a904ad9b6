"""No dropout, and no noise of training: the policy that learns must be the policy that sampled.

Train mode is what transformers asks for before it checkpoints a layer, and before it adds noise: nn.Dropout, rates that
half of its families keep as numbers, jitter and sampled routes of experts. So a model stays in eval mode, but for the
modules that checkpoint, and there the rates are 0.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RATE = re.compile("drop", re.IGNORECASE)  # attention_dropout, resid_pdrop, layerdrop


def make_quiet(model: "PreTrainedModel") -> None:
    """Put a model into the mode that it is trained in; after `weights.activations.checkpoint_layers`."""
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for holder in holders(model):
        for name, value in vars(holder).items():
            # a rate is a fraction: counts and switches of such a name stay
            if RATE.search(name) and isinstance(value, float) and 0 < value <= 1:
                setattr(holder, name, 0.0)


@contextmanager
def without_checkpoints(model: nn.Module) -> Iterator[None]:
    """Inside, all of the model is in eval mode: where layers are checkpointed there would be no cache."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def holders(model: "PreTrainedModel") -> Iterator[Any]:
    """The modules of a model, and its configurations with those inside of them, each once."""
    from transformers import PretrainedConfig

    yield from model.modules()
    pending = [value for module in model.modules() for value in vars(module).values()]
    seen: set[int] = set()
    while pending:
        config = pending.pop()
        if isinstance(config, PretrainedConfig) and id(config) not in seen:
            seen.add(id(config))
            pending += vars(config).values()
            yield config
