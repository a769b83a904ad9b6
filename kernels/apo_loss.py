"""Squared regression of whole completions, A*-PO (arXiv:2505.20686), in one launch.

    u[b]    = sum over the tokens of completion b of (logprob - ref_logprob)
    loss[b] = w_seq[b] (beta2 u[b] + optimal_value[b] - reward[b])^2
    coef[n] = d loss / d logprob[n] = 2 beta2 w_seq[b] (beta2 u[b] + optimal_value[b] - reward[b]),   b that of token n

Completions lie one after the other: those of b are cu_seqlens[b] to cu_seqlens[b + 1]. A sum and not a mean, so u grows
with length. One program per completion: it reads 8 bytes per token, and writes 4.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels.policy_loss import check_vectors

BLOCK_N = 1024


class ApoLoss(NamedTuple):
    """loss [B], coef [N], u [B], float32."""

    loss: Tensor
    coef: Tensor
    u: Tensor


def apo_loss_ref(
    logprobs: Tensor, ref_logprobs: Tensor, cu_seqlens: Tensor, optimal_value: Tensor, reward: Tensor, w_seq: Tensor,
    beta2: float,
) -> ApoLoss:  # fmt: skip
    """The definition, by autograd, in at least float32 (float64 stays float64)."""
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    with torch.enable_grad():
        logp = logprobs.detach().to(dtype).requires_grad_()
        completion = torch.arange(len(reward), device=logp.device).repeat_interleave(cu_seqlens.diff())
        u = logp.new_zeros(len(reward)).index_add(0, completion, logp - ref_logprobs.to(dtype))
        loss = w_seq * (beta2 * u + optimal_value - reward).square()
        (coef,) = torch.autograd.grad(loss.sum(), logp)
    return ApoLoss(loss.detach(), coef, u.detach())


@triton.jit
def apo_loss_kernel(
    logprobs_ptr, ref_ptr, cu_seqlens_ptr, value_ptr, reward_ptr, w_ptr, loss_ptr, coef_ptr, u_ptr, beta2,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + b + 1).to(tl.int64)
    # a sum per lane, and a tree over lanes at the end: a running float32 sum drifts over thousands of tokens
    lanes = tl.zeros([BLOCK_N], tl.float32)
    for first in range(start, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        logp = tl.load(logprobs_ptr + n, mask=n < end, other=0.0)
        lanes += logp - tl.load(ref_ptr + n, mask=n < end, other=0.0)
    u = tl.sum(lanes, 0)
    w = tl.load(w_ptr + b)
    residual = beta2 * u + tl.load(value_ptr + b) - tl.load(reward_ptr + b)
    weighted = tl.where(w != 0, w * residual, 0.0)  # a completion of weight 0 may hold anything
    tl.store(loss_ptr + b, tl.where(w != 0, weighted * residual, 0.0))
    tl.store(u_ptr + b, u)
    for first in range(start, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        tl.store(coef_ptr + n, tl.zeros([BLOCK_N], tl.float32) + 2 * beta2 * weighted, mask=n < end)


def apo_loss(
    logprobs: Tensor, ref_logprobs: Tensor, cu_seqlens: Tensor, optimal_value: Tensor, reward: Tensor, w_seq: Tensor,
    beta2: float,
) -> ApoLoss:  # fmt: skip
    """logprobs, ref_logprobs [N]; cu_seqlens [B + 1] int32, from 0 to N; optimal_value, reward, w_seq [B]; all float32.

    Tokens outside every completion get no coef, so cu_seqlens must cover them. Nothing is differentiable. Raises
    ValueError on other shapes or dtypes.
    """
    check_vectors("apo_loss", dict(logprobs=logprobs, ref_logprobs=ref_logprobs))
    check_vectors("apo_loss", dict(optimal_value=optimal_value, reward=reward, w_seq=w_seq))
    B = len(reward)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.shape != (B + 1,) or cu_seqlens.device != logprobs.device:
        raise ValueError(
            f"apo_loss: cu_seqlens must be int32 [{B + 1}] on {logprobs.device}, one more than rewards, "
            f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
    loss, u = torch.empty(2, B, dtype=torch.float32, device=logprobs.device)
    coef = torch.empty_like(logprobs)
    if B:
        apo_loss_kernel[(B,)](
            logprobs, ref_logprobs, cu_seqlens, optimal_value, reward, w_seq, loss, coef, u, beta2, BLOCK_N=BLOCK_N,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return ApoLoss(loss, coef, u)
