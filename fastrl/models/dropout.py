"""Dropout and other noise of training, switched off: the policy that learns must be the policy that sampled.

Half of transformers' families keep a rate as a number in a module or in the configuration, and not as an nn.Dropout.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RATE = re.compile(r"drop|jitter", re.IGNORECASE)  # attention_dropout, resid_pdrop, layerdrop, router_jitter_noise


def switch_off(model: "PreTrainedModel") -> None:
    """Set every rate of dropout or jitter in the modules and the configurations of a model to zero, in place."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for holder in holders(model):
        for name, value in vars(holder).items():
            # a rate is a fraction: counts and switches of such a name stay
            if RATE.search(name) and isinstance(value, float) and 0 < value <= 1:
                setattr(holder, name, 0.0)


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
