"""Squared regression of whole completions (A*-PO, arXiv:2505.20686), differentiable in their tokens' log-probabilities.

    u[b]        = sum_s mask (logprob - ref_logprob)
    residual[b] = beta2 u[b] - target[b]           target: reward minus optimal value
    loss[b]     = residual[b]^2,   d loss[b] / d logprob[b, s] = 2 beta2 residual[b] mask[b, s]

On CUDA one launch sums a completion and writes the gradients of its tokens; the backward scales them by what comes from
above. A completion whose mask is empty has residual 0, whatever its target is.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ApoLoss(NamedTuple):
    """loss [B], differentiable; residual [B] and u [B] without gradient."""

    loss: Tensor
    residual: Tensor
    u: Tensor


def apo_loss_ref(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, target: Tensor, beta2: float) -> ApoLoss:
    """The definition, by autograd, in the precision of the inputs. Outside the mask anything may stand."""
    log_ratio = torch.where(mask, logprobs - ref_logprobs, torch.zeros((), dtype=logprobs.dtype, device=mask.device))
    u = log_ratio.sum(dim=1)
    residual = torch.where(mask.any(dim=1), beta2 * u - target, torch.zeros((), dtype=u.dtype, device=u.device))
    return ApoLoss(residual.square(), residual.detach(), u.detach())


class ApoLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, ref_logprobs, mask, target, beta2):
        from fastrl.kernels.vectors import apo_loss_completions

        loss, residual, u = torch.empty(3, len(target), dtype=torch.float32, device=logprobs.device)
        coef = torch.empty_like(logprobs)
        apo_loss_completions(logprobs, ref_logprobs, mask, target, beta2, loss, residual, u, coef)
        ctx.save_for_backward(coef)
        ctx.mark_non_differentiable(residual, u)
        return loss, residual, u

    @staticmethod
    def backward(ctx, dloss, dresidual, du):
        (coef,) = ctx.saved_tensors
        return coef * dloss[:, None], None, None, None, None


def apo_loss(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, target: Tensor, beta2: float, *, triton: bool | None = None
) -> ApoLoss:
    """logprobs, ref_logprobs [B, S] nats, mask [B, S] bool, target [B] -> loss, residual, u, each [B].

    triton: whether to launch the kernel, which takes contiguous float32; None = on CUDA for float32. Raises ValueError
    on shapes or dtypes that do not fit.
    """
    shape = tuple(logprobs.shape)
    for name, x, own in (("ref_logprobs", ref_logprobs, shape), ("mask", mask, shape), ("target", target, shape[:1])):
        if logprobs.ndim != 2 or tuple(x.shape) != own or x.device != logprobs.device:
            raise ValueError(
                f"apo_loss: {name} must be {list(own)} on {logprobs.device}, as logprobs [B, S] say, "
                f"got {tuple(x.shape)} on {x.device}"
            )
    if mask.dtype != torch.bool:
        raise ValueError(f"apo_loss: mask must be torch.bool, got {mask.dtype}")
    floats = (logprobs, ref_logprobs, target)
    plain = all(x.dtype == torch.float32 for x in floats)
    if triton is None:
        triton = logprobs.is_cuda and plain
    if not triton or 0 in shape:
        return apo_loss_ref(logprobs, ref_logprobs, mask, target, beta2)
    if not plain:
        raise ValueError(f"apo_loss: the kernel takes torch.float32, got {', '.join(str(x.dtype) for x in floats)}")
    rows = (x.contiguous() for x in (logprobs, ref_logprobs, mask))
    return ApoLoss(*ApoLossFunction.apply(*rows, target.contiguous(), beta2))
