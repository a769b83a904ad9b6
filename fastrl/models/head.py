"""From hidden states to log-probabilities and losses: the one place where logits are shifted against labels."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from fastrl.base import faults
from fastrl.kernels.linear_logprob import linear_logprob
from fastrl.kernels.linear_policy_loss import LinearLoss, TokenVectors, linear_policy_loss
from fastrl.kernels.logit_map import LogitMap
from fastrl.kernels.workspace import Workspace
from fastrl.models import packing
from fastrl.models.packing import HasBody, Packing
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


def label_hidden(model: HasBody, input_ids: Tensor, response_mask: Tensor, packed: Packing | None) -> Tensor:
    """-> last hidden states [N, H], those from which the N tokens of the mask are predicted, in the mask's order.

    input_ids, response_mask [B, S], right-padded. Padding follows every real token, so causal attention needs no mask
    and padded ids cannot reach a masked position.
    """
    wanted = response_mask[:, 1:]
    source = input_ids[:, :-1] if packed is None else packed.input_ids
    if not source.numel():  # prompts of one token without a completion; attention takes no empty sequence
        body = model.base_model
        return body.get_input_embeddings()(source.reshape(-1))  # pyright: ignore[reportCallIssue] said to be any module
    if packed is None:
        return model.base_model(input_ids[:, :-1], use_cache=False).last_hidden_state[wanted]
    return embedding(packed.place[wanted], packing.forward(model, packed))


def spread(x: Tensor, mask: Tensor) -> Tensor:
    """x [N] -> [B, S], at the N tokens of the mask and zero elsewhere."""
    return x.new_zeros(mask.shape).masked_scatter(mask, x)


def token_policy_loss(
    model: "PreTrainedModel",
    input_ids: Tensor,
    response_mask: Tensor,
    fused: FusedLoss,
    count: float,
    *,
    inv_temperature: float = 1.0,
    num_tokens: int,
    packed: Packing | None = None,
    workspace: Workspace | None = None,
) -> tuple[LinearLoss, Tensor]:
    """As `token_logprobs`, and the loss with it, divided by count: `linear_policy_loss`'s result, and logprobs [B, S].

    The head's gradient is added to its float32 `.grad`; that of the hidden states goes on when the loss' backward() is
    called.
    """
    hidden = faults.through("logits", label_hidden(model, input_ids, response_mask, packed))
    weight = head_weight(model)
    assert weight.grad is not None
    old, ref = (None if x is None else x[response_mask].float() for x in (fused.old_logprobs, fused.ref_logprobs))
    advantage, w = (x[response_mask].float() for x in (fused.advantage, fused.w / count))
    vectors = TokenVectors(advantage, w, old, ref)
    out = linear_policy_loss(
        fused.loss,
        hidden,
        weight.detach()[:num_tokens],
        input_ids[response_mask],
        vectors,
        inv_temperature=inv_temperature,
        logit_map=logit_map(model),
        weight_grad=weight.grad[:num_tokens],
        triton=True,
        workspace=workspace,
    )
    return out, spread(out.logprobs, response_mask)


def token_logprobs(
    model: "PreTrainedModel",
    input_ids: Tensor,
    response_mask: Tensor,
    *,
    inv_temperature: float = 1.0,
    num_tokens: int,
    need_entropy: bool = False,
    head_grad_in_place: bool = False,
    packed: Packing | None = None,
    triton: bool = False,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Right-padded input_ids, response_mask [B, S] -> logprobs [B, S], entropy [B, S] or None; nats, label-aligned.

    Zero outside the mask. Only masked positions enter the head. `num_tokens`: the tokenizer's size; ids beyond it (a
    padded vocabulary) are not part of the distribution, here as in the engine. head_grad_in_place: add the head's
    gradient to the `.grad` it has at this call (a view of a gradient buffer), without a second [V, H] tensor.
    packed: the packing of input_ids, if the model can use it. triton: take the kernels for the head. workspace: where
    their logits go, in the forward and the backward.
    """
    hidden = faults.through("logits", label_hidden(model, input_ids, response_mask, packed))
    weight = head_weight(model)
    in_place, weight_grad = head_grad_in_place and torch.is_grad_enabled(), None
    if in_place:
        assert weight.grad is not None
        weight_grad = weight.grad[:num_tokens]
    values, entropy, _ = linear_logprob(
        hidden,
        (weight.detach() if in_place else weight)[:num_tokens],
        input_ids[:, 1:][response_mask[:, 1:]],
        inv_temperature=inv_temperature,
        logit_map=logit_map(model),
        need_entropy=need_entropy,
        weight_grad=weight_grad,
        triton=triton,
        workspace=workspace,
    )
    return spread(values, response_mask), None if entropy is None else spread(entropy, response_mask)
