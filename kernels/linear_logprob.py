"""log p(target) from hidden states and the LM head, without an [N, V] tensor.

    z[n] = inv_temperature * hidden[n] @ weight.T
    lse[n] = logsumexp(z[n])
    logprob[n] = z[n, target[n]] - lse[n]
    entropy[n] = lse[n] - sum_v p[n, v] z[n, v]

Rows are processed in chunks. The forward keeps three floats per row; the backward recomputes each chunk of logits:

    dz[n, v] = dlogprob[n] (1[v == target[n]] - p[n, v]) + dlse[n] p[n, v]
               - dentropy[n] p[n, v] (log p[n, v] + entropy[n])
"""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # float32 logits alive at a time: 64 MiB


def linear_logprob_ref(
    hidden: Tensor, weight: Tensor, target: Tensor, *, inv_temperature: float = 1.0, need_entropy: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The definition: hidden [N, H], weight [V, H], target [N] -> logprobs [N], entropy [N] or None, lse [N].

    Computed in at least float32 (float64 stays float64), with all logits alive.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).T * inv_temperature
    lse = logits.logsumexp(dim=-1)
    logprobs = logits.gather(-1, target[:, None]).squeeze(-1) - lse
    logp = logits.log_softmax(dim=-1)
    entropy = -(logp.exp() * logp).sum(dim=-1) if need_entropy else None
    return logprobs, entropy, lse


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, inv_temperature, need_entropy, weight_grad):
        ctx.set_materialize_grads(False)  # outputs that the loss does not use cost nothing in the backward
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, lse = torch.empty(2, len(hidden), dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(lse) if need_entropy else None
        for rows in chunks(hidden, weight):
            logits = chunk_logits(hidden[rows], weight, inv_temperature)
            torch.logsumexp(logits, dim=-1, out=lse[rows])
            logprobs[rows] = logits.gather(-1, target[rows, None]).squeeze(-1) - lse[rows]
            if need_entropy:
                logp = logits.sub_(lse[rows, None])
                entropy[rows] = logp.exp().mul_(logp).sum(dim=-1).neg_()
        ctx.save_for_backward(hidden, weight, target, lse, entropy)
        ctx.inv_temperature, ctx.weight_grad = inv_temperature, weight_grad
        return logprobs, entropy, lse

    @staticmethod
    def backward(ctx, dlogprobs, dentropy, dlse):
        hidden, weight, target, lse, entropy = ctx.saved_tensors
        dlogprobs = torch.zeros_like(lse) if dlogprobs is None else dlogprobs
        scale = -dlogprobs if dlse is None else dlse - dlogprobs
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        into, dweight = ctx.weight_grad, None
        if into is not None and into.dtype == lse.dtype:
            dweight = into
        elif into is not None or ctx.needs_input_grad[1]:
            # chunks add up in full precision, also for a bfloat16 buffer
            dweight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        for rows in chunks(hidden, weight):
            logp = chunk_logits(hidden[rows], weight, ctx.inv_temperature).sub_(lse[rows, None])
            probs = logp.exp()
            dz = probs * scale[rows, None]
            if dentropy is not None:
                dz -= probs.mul_(logp.add_(entropy[rows, None])).mul_(dentropy[rows, None])
            dz.scatter_add_(-1, target[rows, None], dlogprobs[rows, None])
            dz.mul_(ctx.inv_temperature)
            if dhidden is not None:
                dhidden[rows] = dz.to(weight.dtype) @ weight
            if dweight is not None:
                dweight.addmm_(dz.T, hidden[rows].to(dz.dtype))
        if into is not None and dweight is not into:
            into += dweight
        returned = dweight.to(weight.dtype) if into is None and dweight is not None else None
        return dhidden, returned, None, None, None, None


def chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // len(weight))
    return [slice(start, start + step) for start in range(0, len(hidden), step)]


def chunk_logits(hidden: Tensor, weight: Tensor, inv_temperature: float) -> Tensor:
    """[n, H], [V, H] -> scaled logits [n, V] in at least float32; bfloat16 products are not rounded on the way out."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logits = hidden.to(dtype) @ weight.to(dtype).T
    return logits if inv_temperature == 1.0 else logits.mul_(inv_temperature)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    inv_temperature: float = 1.0,
    need_entropy: bool = False,
    weight_grad: Tensor | None = None,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """hidden [N, H], weight [V, H] of one dtype, target [N] int64 in [0, V) -> logprobs, entropy, lse, each [N], nats.

    Outputs are float32 (float64 for float64 inputs); entropy is None unless asked for. All three are differentiable in
    hidden and weight. With `weight_grad` [V, H] the weight gradient is added there during the backward and does not
    travel through autograd. `workspace` is scratch memory for the CUDA path and not read on the CPU.
    Raises ValueError on shapes or dtypes that do not match.
    """
    if hidden.ndim != 2 or target.shape != hidden.shape[:1] or weight.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            "linear_logprob expects hidden [N, H], weight [V, H] and target [N], "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(target.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"linear_logprob expects one dtype, got hidden {hidden.dtype} and weight {weight.dtype}")
    if weight_grad is not None and weight_grad.shape != weight.shape:
        raise ValueError(f"weight_grad is {tuple(weight_grad.shape)} but weight is {tuple(weight.shape)}")
    return LinearLogprob.apply(hidden, weight, target, float(inv_temperature), need_entropy, weight_grad)
