"""Attention of packed rows, as transformers calls it.

Queries, keys and values of the flat tokens are gathered into rows and the outputs gathered back. With a kernel
(`models.ragged`) the rows stand one after the other and each is attended to in its own length, so padding costs
nothing at all. Without one, which is the definition, they are right-padded, where causal attention needs no mask.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding  # a gather whose backward adds up in a fixed order, in parallel

from fastrl.base.exhausted import means_out_of_memory
from fastrl.models.packing import Packing, forward
from fastrl.models.ragged import Kernel, Layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "fastrl_sdpa"  # the name transformers knows `attention` by; with a kernel, its own is added
CAUSAL = {"full_attention", "sliding_attention"}
# arguments of attention that SDPA has no place for
EAGER_ONLY = {
    "softcap": "bounds the model's attention scores (attn_logit_softcapping)",
    "s_aux": "takes part of the model's attention away (attention sinks)",
}


def register(kernel: Kernel | None = None) -> str:
    """Make `attention` with a kernel known to transformers; returns its name there."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    name = ATTENTION if kernel is None else f"{ATTENTION}_{kernel.key}"
    AttentionInterface.register(name, partial(attention, kernel=kernel))
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    kernel: Kernel | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' SDPA; with a packing, of query, key and value [1, heads, N, d] -> [1, N, heads, d].

    Raises ValueError for what SDPA cannot do and transformers' would leave out.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    left_out = [name for name in EAGER_ONLY if kwargs.get(name) is not None]
    if left_out:
        raise ValueError(f"--attention sdpa leaves out what {EAGER_ONLY[left_out[0]]}; use --attention eager")
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    B, S = packing.place.shape
    if kernel is not None:
        q, k, v = (
            embedding(packing.rows, x[0].transpose(0, 1).flatten(1)).view(-1, x.shape[1], x.shape[3])
            for x in (query, key, value)
        )
        out = kernel.attend(q, k, v, packing.row_starts, S, scale_of(query, kwargs), sliding_window)
        return embedding(packing.row_home, out.flatten(1)).view(1, -1, *out.shape[1:]), None

    def rows(x: Tensor) -> Tensor:
        heads, _, d = x.shape[1:]
        return embedding(packing.place, x[0].transpose(0, 1).flatten(1)).view(B, S, heads, d).transpose(1, 2)

    mask = None
    if sliding_window is not None and sliding_window < S:
        mask = query.new_ones(S, S, dtype=torch.bool).tril().triu(1 - sliding_window)[None, None]
    out, _ = sdpa_attention_forward(module, rows(query), rows(key), rows(value), mask, **kwargs)
    return embedding(packing.home, out.reshape(B * S, -1)).view(1, -1, *out.shape[2:]), None


def without_cudnn(device: str) -> None:
    """Let SDPA on a GPU take no kernel of cuDNN's in this process, as vLLM does: it makes a plan for each new shape."""
    if device.startswith("cuda"):
        torch.backends.cuda.enable_cudnn_sdp(False)


def scale_of(query: Tensor, kwargs: dict) -> float:
    """What scores are multiplied by: SDPA's default where the model has none of its own."""
    scaling = kwargs.get("scaling")
    return query.shape[-1] ** -0.5 if scaling is None else float(scaling)


def packed_layers(model: "PreTrainedModel") -> list[Layer]:
    """What each layer asks of attention; empty where rows cannot be packed. For a model that has just been loaded.

    They can where attention is the only layer that looks at more than one token, and can be replaced. `layer_types`
    says so where a configuration has it. In any case `attention` must have been given a packing in every layer, and a
    window in every layer that has one: a family may have attention of its own, layers that its configuration does not
    name, or windows that it puts into masks only.
    """
    config = model.config.get_text_config()
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or []
    if model.config._attn_implementation != ATTENTION or not CAUSAL.issuperset(kinds):
        return []
    windowed = kinds.count("sliding_attention") if kinds else layers * bool(getattr(config, "sliding_window", None))
    asked = packed_calls(model)
    packs = len(asked) >= layers and len([layer for layer in asked if layer.window]) >= windowed
    return asked if packs else []


def packed_calls(model: "PreTrainedModel") -> list[Layer]:
    """What a forward of a packing asks of `attention`; empty where it fails."""
    from transformers import AttentionInterface

    calls: list[Layer] = []

    def counted(module, query, key, value, attention_mask, packing=None, sliding_window=None, **kwargs):
        if packing is not None:
            calls.append(
                Layer(
                    heads=query.shape[1],
                    key_heads=key.shape[1],
                    head_dim=query.shape[3],
                    value_dim=value.shape[3],
                    scale=scale_of(query, kwargs),
                    window=sliding_window,
                    dtype=query.dtype,
                    device=query.device,
                )
            )
        given = dict(packing=packing, sliding_window=sliding_window, **kwargs)
        return attention(module, query, key, value, attention_mask, **given)

    row = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    flat = Packing(
        input_ids=row,
        position_ids=torch.arange(2, device=model.device)[None],
        place=torch.arange(2, device=model.device)[None],
        home=torch.arange(2, device=model.device),
        rows=torch.arange(2, device=model.device),
        row_starts=torch.tensor([0, 2], dtype=torch.int32, device=model.device),
        row_home=torch.arange(2, device=model.device),
    )
    AttentionInterface.register(ATTENTION, counted)
    try:
        with torch.no_grad():
            forward(model, flat)
    except Exception as error:  # whatever a family says that cannot take flat rows: its rows are padded
        if means_out_of_memory(error):
            raise
        return []
    finally:
        register()
    return calls
