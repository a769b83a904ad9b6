"""log p(target) from logits that exist: for engines, tests and benchmarks; training never has them.

    z[n] = inv_temperature * logits[n],   lse = logsumexp(z),   logprob = z[ids] - lse,   entropy = -sum_v p log p

One pass over the logits forward. The backward writes their gradient over them, so they must not be used again.
"""

import torch
from torch import Tensor


def selective_logprob_ref(logits: Tensor, ids: Tensor, inv_temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: logits [N, V], ids [N] -> logprobs, lse, entropy [N], in at least float32."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * inv_temperature
    logp = z.log_softmax(dim=-1)
    entropy = -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(dim=-1)
    return logp.gather(-1, ids[:, None].long()).squeeze(-1), z.logsumexp(dim=-1), entropy


class SelectiveLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids, inv_temperature):
        from fastrl.kernels.rows import row_forward

        ctx.set_materialize_grads(False)
        logprobs, lse, entropy = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
        if len(logits):
            row_forward(logits, ids, inv_temperature, logprobs, lse, entropy)
        ctx.save_for_backward(logits, ids, lse, entropy)
        ctx.inv_temperature = inv_temperature
        return logprobs, lse, entropy

    @staticmethod
    def backward(ctx, dlogprobs, dlse, dentropy):
        from fastrl.kernels.rows import row_gradient

        logits, ids, lse, entropy = ctx.saved_tensors
        dlogprobs = torch.zeros_like(lse) if dlogprobs is None else dlogprobs.contiguous()
        dlse, dentropy = (None if d is None else d.contiguous() for d in (dlse, dentropy))
        if len(logits) == 0:
            return torch.empty_like(logits), None, None
        dz = row_gradient(logits, ids, ctx.inv_temperature, lse, entropy, dlogprobs, dlse, dentropy, dtype=logits.dtype)
        return dz, None, None


def selective_logprob(
    logits: Tensor, ids: Tensor, inv_temperature: float = 1.0, *, triton: bool | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [N, V] contiguous bfloat16, float16 or float32, ids [N] -> logprobs, lse, entropy [N] float32, nats.

    All three are differentiable in logits. triton: whether to launch the kernels, whose backward overwrites logits, so
    that it can be run once, and which have NaN for an id that is no column; None = on CUDA. Raises ValueError on
    shapes, dtypes or strides that do not fit.
    """
    if logits.ndim != 2 or ids.shape != logits.shape[:1]:
        raise ValueError(
            f"selective_logprob expects logits [N, V] and ids [N], got {tuple(logits.shape)} and {tuple(ids.shape)}"
        )
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not logits.is_contiguous():
        raise ValueError(
            f"selective_logprob expects contiguous bfloat16, float16 or float32 logits, got {logits.dtype} with "
            f"strides {logits.stride()}"
        )
    if logits.is_cuda if triton is None else triton:
        return SelectiveLogprob.apply(logits, ids, float(inv_temperature))
    return selective_logprob_ref(logits, ids, inv_temperature)
