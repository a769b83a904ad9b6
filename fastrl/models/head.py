"""From hidden states to log-probabilities and losses: the one place where logits are shifted against labels."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastrl.base import faults
from fastrl.kernels.linear_logprob import linear_logprob
from fastrl.kernels.linear_policy_loss import LinearLoss, TokenVectors, linear_policy_loss
from fastrl.kernels.logit_map import LogitMap
from fastrl.kernels.workspace import Workspace
from fastrl.models import packing
from fastrl.models.inputs import Inputs
from fastrl.models.packing import HasBody
from fastrl.objectives.base import FusedLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# what configurations call it; the logits are multiplied by the first, divided by the second, capped by the third
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling",)
CAPS = ("final_logit_softcapping", "logits_soft_cap")
MULTIPLY_BY_DIVISOR = {"hyperclovax"}  # by model_type
NOT_APPLIED = {"mpt"}  # have a multiplier in their configuration only


def logit_map(model: "PreTrainedModel") -> LogitMap:
    """What the model does to its logits after the LM head. `models.check` finds out whether that is all.

    Granite with `logits_scaling: 8` -> LogitMap(scale=1/8); Gemma 2 -> LogitMap(softcap=30.0).
    """
    config = model.config.get_text_config()

    def product(names: tuple[str, ...]) -> float:
        values = [getattr(config, name, None) for name in names]
        return math.prod(float(value) for value in values if isinstance(value, (int, float)) and value)

    scale = 1.0 if config.model_type in NOT_APPLIED else product(MULTIPLIERS)
    divisor = product(DIVISORS)
    caps = [cap for name in CAPS if (cap := getattr(config, name, None))]
    scale = scale * divisor if config.model_type in MULTIPLY_BY_DIVISOR else scale / divisor
    return LogitMap(scale, float(caps[0]) if caps else 0.0)


def head_weight(model: "PreTrainedModel") -> Tensor:
    """[V, H] of the LM head, which is a plain one: `load_model` refuses others."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head.weight


def label_hidden(model: HasBody, inputs: Inputs) -> Tensor:
    """-> last hidden states [L, H], those from which the response tokens are predicted, in their order.

    Padding follows every real token, so causal attention needs no mask and padded ids cannot reach a response.
    """
    if not inputs.ids.numel():  # prompts of one token without a completion; attention takes no empty sequence
        body = model.base_model
        return body.get_input_embeddings()(inputs.ids.reshape(-1))  # pyright: ignore[reportCallIssue] said to be any module
    if inputs.packing is None:
        return inputs.at_sources(model.base_model(inputs.ids, use_cache=False).last_hidden_state)
    return inputs.at_sources(packing.forward(model, inputs.packing))


def token_policy_loss(
    model: "PreTrainedModel",
    inputs: Inputs,
    fused: FusedLoss,
    count: float,
    *,
    inv_temperature: float = 1.0,
    num_tokens: int,
    workspace: Workspace | None = None,
) -> tuple[LinearLoss, Tensor]:
    """As `token_logprobs`, and the loss with it, divided by count: `linear_policy_loss`'s result, and logprobs [B, S].

    The head's gradient is added to its float32 `.grad`; that of the hidden states goes on when the loss' backward() is
    called.
    """
    hidden = faults.through("logits", label_hidden(model, inputs))
    weight = head_weight(model)
    assert weight.grad is not None
    of_rows = (fused.advantage, fused.w / count, fused.old_logprobs, fused.ref_logprobs)
    advantage, w, old, ref = (None if x is None else inputs.at_labels(x).float() for x in of_rows)
    assert advantage is not None and w is not None
    vectors = TokenVectors(advantage, w, old, ref)
    out = linear_policy_loss(
        fused.loss,
        hidden,
        weight.detach()[:num_tokens],
        inputs.targets,
        vectors,
        inv_temperature=inv_temperature,
        logit_map=logit_map(model),
        weight_grad=weight.grad[:num_tokens],
        triton=True,
        workspace=workspace,
    )
    return out, inputs.spread(out.logprobs)


def token_logprobs(
    model: "PreTrainedModel",
    inputs: Inputs,
    *,
    inv_temperature: float = 1.0,
    num_tokens: int,
    need_entropy: bool = False,
    head_grad_in_place: bool = False,
    triton: bool = False,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor | None]:
    """-> logprobs [B, S], entropy [B, S] or None; nats, label-aligned, zero outside the response.

    Only response tokens enter the head. `num_tokens`: the tokenizer's size; ids beyond it (a
    padded vocabulary) are not part of the distribution, here as in the engine. head_grad_in_place: add the head's
    gradient to the `.grad` it has at this call (a view of a gradient buffer), without a second [V, H] tensor.
    triton: take the kernels for the head. workspace: where their logits go, in the forward and the backward.
    """
    hidden = faults.through("logits", label_hidden(model, inputs))
    weight = head_weight(model)
    in_place, weight_grad = head_grad_in_place and torch.is_grad_enabled(), None
    if in_place:
        assert weight.grad is not None
        weight_grad = weight.grad[:num_tokens]
    values, entropy, _ = linear_logprob(
        hidden,
        (weight.detach() if in_place else weight)[:num_tokens],
        inputs.targets,
        inv_temperature=inv_temperature,
        logit_map=logit_map(model),
        need_entropy=need_entropy,
        weight_grad=weight_grad,
        triton=triton,
        workspace=workspace,
    )
    return inputs.spread(values), None if entropy is None else inputs.spread(entropy)
