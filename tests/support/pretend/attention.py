"""Attention as CUDA's operators are called, computed by its definition on the CPU: forward, log-sum-exp, gradients."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

HostView = Callable[[Tensor], Tensor]  # the same memory as a tensor of the CPU


def attended(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """[..., L, d] of any dtype; bias is added to the scores -> output, probabilities, log-sum-exp, in float32."""
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(dim=-1)
    probs = (scores - lse[..., None]).exp()
    return probs @ value.float(), probs, lse


def gradients(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of query, key and value, in float32."""
    out, probs, _ = attended(query, key, value, bias, scale)
    dout = upstream.float()
    dprobs = dout @ value.float().transpose(-1, -2)
    dscores = probs * (dprobs - (dout * out).sum(-1, keepdim=True)) * scale
    return dscores @ key.float(), dscores.transpose(-1, -2) @ query.float(), probs.transpose(-1, -2) @ dout


def unseen(queries: int, keys: int, causal: bool, left: int | None = None, right: int | None = None) -> Tensor | None:
    """[queries, keys]: -inf where a query, counted from the end, must not look; None where it may look everywhere.

    left, right: how many tokens back and ahead it looks at most; negative or None: all. causal: right is 0.
    """
    own = torch.arange(queries)[:, None] + keys - queries
    other = torch.arange(keys)
    hidden = torch.zeros(queries, keys, dtype=torch.bool)
    right = 0 if causal else right
    if right is not None and right >= 0:
        hidden |= other > own + right
    if left is not None and left >= 0:
        hidden |= other < own - left
    return torch.zeros(queries, keys).masked_fill(hidden, -math.inf) if hidden.any() else None


def efficient(host: HostView, query, key, value, bias, wants_lse, dropout=0.0, causal=False, *, scale=None):
    """aten::_scaled_dot_product_efficient_attention, [B, heads, L, d]."""
    given = unseen(query.shape[2], key.shape[2], causal) if bias is None else host(bias).float()
    made, _, lse = attended(host(query), host(key), host(value), given, scale or query.shape[-1] ** -0.5)
    out, kept = torch.empty_like(query), query.new_empty(lse.shape if wants_lse else (0,), dtype=torch.float32)
    host(out).copy_(made)
    if wants_lse:
        host(kept).copy_(lse)
    number = torch.zeros((), dtype=torch.int64)
    return out, kept, number, number


def efficient_backward(
    host: HostView,
    upstream,
    query,
    key,
    value,
    bias,
    out,
    lse,
    seed,
    offset,
    dropout,
    wanted,
    causal=False,
    *,
    scale=None,
):
    """aten::_scaled_dot_product_efficient_attention_backward; no gradient of the bias."""
    given = unseen(query.shape[2], key.shape[2], causal) if bias is None else host(bias).float()
    inputs = (host(upstream), host(query), host(key), host(value))
    found = gradients(*inputs, given, scale or query.shape[-1] ** -0.5)
    made = [torch.empty_like(x) for x in (query, key, value)]
    for into, gradient in zip(made, found, strict=True):
        host(into).copy_(gradient)
    return *made, None


def ragged(
    host: HostView,
    query,
    key,
    value,
    starts,
    starts_of_keys,
    longest,
    longest_of_keys,
    dropout,
    causal,
    debug,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
    **rest,
):
    """aten::_flash_attention_forward over rows of their own lengths, [M, heads, d]; fewer heads of keys are shared."""
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    for rows in row_slices(host(starts)):
        q, k, v = (host(x)[rows].transpose(0, 1) for x in (query, key, value))
        mask = unseen(q.shape[1], k.shape[1], causal, window_size_left, window_size_right)
        made, _, sums = attended(q, shared(k, q), shared(v, q), mask, scale or q.shape[-1] ** -0.5)
        host(out)[rows] = made.transpose(0, 1).to(out.dtype)
        host(lse)[:, rows] = sums
    state = query.new_empty(2, dtype=torch.uint64)
    return out, lse, state, query.new_empty((), dtype=torch.uint64), query.new_empty(0)


def ragged_backward(
    host: HostView,
    upstream,
    query,
    key,
    value,
    out,
    lse,
    starts,
    starts_of_keys,
    longest,
    longest_of_keys,
    dropout,
    causal,
    state,
    unused,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
    **rest,
):
    """aten::_flash_attention_backward of the same rows."""
    made = [torch.empty_like(x) for x in (query, key, value)]
    for rows in row_slices(host(starts)):
        dout, q, k, v = (host(x)[rows].transpose(0, 1) for x in (upstream, query, key, value))
        mask = unseen(q.shape[1], k.shape[1], causal, window_size_left, window_size_right)
        dq, dk, dv = gradients(dout, q, shared(k, q), shared(v, q), mask, scale or q.shape[-1] ** -0.5)
        for into, gradient in zip(made, (dq, summed(dk, k), summed(dv, v)), strict=True):
            host(into)[rows] = gradient.transpose(0, 1).to(into.dtype)
    return tuple(made)


def row_slices(starts: Tensor) -> list[slice]:
    bounds = starts.tolist()
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def shared(x: Tensor, query: Tensor) -> Tensor:
    """[kv heads, L, d] -> [heads, L, d]"""
    return x.repeat_interleave(query.shape[0] // x.shape[0], dim=0)


def summed(gradient: Tensor, like: Tensor) -> Tensor:
    """The other way round."""
    return gradient.unflatten(0, (len(like), -1)).sum(1)
