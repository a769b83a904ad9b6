"""Squared regression of whole completions, A*-PO (arXiv:2505.20686); on CUDA in one launch (`vectors.py`).

    u[b]    = sum over the tokens of completion b of (logprob - ref_logprob)
    loss[b] = w_seq[b] (beta2 u[b] + optimal_value[b] - reward[b])^2
    coef[n] = d loss / d logprob[n] = 2 beta2 w_seq[b] (beta2 u[b] + optimal_value[b] - reward[b]),   b that of token n

Completions lie one after the other: those of b are cu_seqlens[b] to cu_seqlens[b + 1]. A sum and not a mean, so u grows
with length.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels.policy_loss import check_vectors


class ApoLoss(NamedTuple):
    """loss [B], coef [N], u [B], float32."""

    loss: Tensor
    coef: Tensor
    u: Tensor


def apo_loss_ref(
    logprobs: Tensor, ref_logprobs: Tensor, cu_seqlens: Tensor, optimal_value: Tensor, reward: Tensor, w_seq: Tensor,
    beta2: float,
) -> ApoLoss:  # fmt: skip
    """The definition, by autograd, in at least float32 (float64 stays float64); completions are summed in float64."""
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    with torch.enable_grad():
        logp = logprobs.detach().to(dtype).requires_grad_()
        completion = torch.arange(len(reward), device=logp.device).repeat_interleave(cu_seqlens.diff())
        u = logp.new_zeros(len(reward), dtype=torch.float64)
        u = u.index_add(0, completion, (logp - ref_logprobs.to(dtype)).double()).to(dtype)
        residual = torch.where(w_seq != 0, beta2 * u + optimal_value - reward, 0.0)
        loss = w_seq * residual.square()
        (coef,) = torch.autograd.grad(loss.sum(), logp)
    return ApoLoss(loss.detach(), coef, u.detach())


def apo_loss(
    logprobs: Tensor, ref_logprobs: Tensor, cu_seqlens: Tensor, optimal_value: Tensor, reward: Tensor, w_seq: Tensor,
    beta2: float, *, triton: bool | None = None,
) -> ApoLoss:  # fmt: skip
    """logprobs, ref_logprobs [N]; cu_seqlens [B + 1] int32, from 0 to N; optimal_value, reward, w_seq [B]; all float32.

    Tokens outside every completion get no coef, so cu_seqlens must cover them. Nothing is differentiable.
    triton: whether to launch the kernel; None = on CUDA. Raises ValueError on other shapes or dtypes.
    """
    check_vectors("apo_loss", dict(logprobs=logprobs, ref_logprobs=ref_logprobs))
    check_vectors("apo_loss", dict(optimal_value=optimal_value, reward=reward, w_seq=w_seq))
    B = len(reward)
    if reward.device != logprobs.device:
        raise ValueError(f"apo_loss: logprobs is on {logprobs.device} and reward on {reward.device}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.shape != (B + 1,) or cu_seqlens.device != logprobs.device:
        raise ValueError(
            f"apo_loss: cu_seqlens must be int32 [{B + 1}] on {logprobs.device}, one more than rewards, "
            f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
    inputs = (logprobs, ref_logprobs, cu_seqlens, optimal_value, reward, w_seq, beta2)
    if not (logprobs.is_cuda if triton is None else triton) or B == 0:
        return apo_loss_ref(*inputs)
    from fastrl.kernels.vectors import apo_loss_completions

    loss, u = torch.empty(2, B, dtype=torch.float32, device=logprobs.device)
    coef = torch.empty_like(logprobs)
    apo_loss_completions(*inputs, loss, coef, u)
    return ApoLoss(loss, coef, u)
