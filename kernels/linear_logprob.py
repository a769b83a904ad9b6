"""log p(target) from hidden states and the LM head, without an [N, V] tensor.

    z[n] = inv_temperature * f(hidden[n] @ weight.T)        f: the model's `LogitMap`, the identity for most
    lse[n] = logsumexp(z[n])
    logprob[n] = z[n, target[n]] - lse[n]
    entropy[n] = lse[n] - sum_v p[n, v] z[n, v]

The forward keeps three floats per row; the backward recomputes the logits, a chunk of rows at a time:

    dz[n, v] = dlogprob[n] (1[v == target[n]] - p[n, v]) + dlse[n] p[n, v]
               - dentropy[n] p[n, v] (log p[n, v] + entropy[n])

and the gradient of the raw logits is inv_temperature f' dz. GEMMs are the vendor library's. Between them are the Triton
kernels of `rows.py` on CUDA, and torch elsewhere.
"""

from functools import partial

import torch
from torch import Tensor

from fastrl.kernels.logit_map import PLAIN, LogitMap
from fastrl.kernels.workspace import Workspace

CHUNK_ELEMENTS = 1 << 24  # float32 logits alive at a time without Triton: 64 MiB
GRADIENT_WORDS = 8192  # of the weight's gradient alive twice without Triton
# With it: the float32 weight gradient is read and written once per chunk, which takes longer than the product that is
# added to it below 1200 rows (an H100's ratio of arithmetic to bandwidth).
CHUNK_ROWS = 4096


def linear_logprob_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    inv_temperature: float | Tensor = 1.0,
    logit_map: LogitMap = PLAIN,
    need_entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The definition: hidden [N, H], weight [V, H], target [N] -> logprobs [N], entropy [N] or None, lse [N].

    Computed in at least float32 (float64 stays float64), with all logits alive.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = scaled(logit_map(hidden.to(dtype) @ weight.to(dtype).T), inv_temperature)
    lse = logits.logsumexp(dim=-1)
    logprobs = logits.gather(-1, target[:, None].long()).squeeze(-1) - lse
    logp = logits.log_softmax(dim=-1)
    entropy = -(logp.exp() * logp).sum(dim=-1) if need_entropy else None
    return logprobs, entropy, lse


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, inv_temperature, logit_map, need_entropy, weight_grad, triton, workspace):
        ctx.set_materialize_grads(False)  # outputs that the loss does not use cost nothing in the backward
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, lse = torch.empty(2, len(hidden), dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(lse) if need_entropy else None
        chunks = chunks_of(hidden, weight, logit_map, triton, workspace)
        chunks.forward_all(target, inv_temperature, logprobs, lse, entropy)
        ctx.save_for_backward(hidden, weight, target, lse, entropy)
        ctx.inv_temperature, ctx.weight_grad = inv_temperature, weight_grad
        ctx.chunks = partial(chunks_of, logit_map=logit_map, triton=triton, workspace=workspace)
        return logprobs, entropy, lse

    @staticmethod
    def backward(ctx, dlogprobs, dentropy, dlse):
        hidden, weight, target, lse, entropy = ctx.saved_tensors
        dlogprobs = torch.zeros_like(lse) if dlogprobs is None else dlogprobs.contiguous()
        dentropy, dlse = (None if d is None else d.contiguous() for d in (dentropy, dlse))
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        into, dweight = ctx.weight_grad, None
        if into is not None and into.dtype == lse.dtype:
            dweight = into
        elif into is not None or ctx.needs_input_grad[1]:
            # chunks add up in full precision, also for a bfloat16 buffer
            dweight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        chunks = ctx.chunks(hidden, weight)
        for rows in chunks:
            vectors = [None if x is None else x[rows] for x in (lse, entropy, dlogprobs, dlse, dentropy)]
            dz = chunks.gradient(chunks.logits(rows), target[rows], part(ctx.inv_temperature, rows), *vectors)
            if dhidden is not None:
                torch.mm(dz.to(weight.dtype), weight, out=dhidden[rows])
            if dweight is not None:
                chunks.add_weight_gradient(dweight, dz, hidden[rows])
        if into is not None and dweight is not into:
            into += dweight
        returned = dweight.to(weight.dtype) if into is None and dweight is not None else None
        return dhidden, returned, None, None, None, None, None, None, None


class TorchChunks:
    """Chunks of rows in torch, in the precision of the inputs but at least float32."""

    def __init__(self, hidden: Tensor, weight: Tensor, logit_map: LogitMap = PLAIN):
        self.hidden, self.weight, self.logit_map = hidden, weight, logit_map
        self.step = min(CHUNK_ROWS, max(1, CHUNK_ELEMENTS // len(weight)))

    def __iter__(self):
        return iter(slices(len(self.hidden), self.step))

    def logits(self, rows: slice) -> Tensor:
        return chunk_logits(self.hidden[rows], self.weight)

    def forward_all(self, target, inv_temperature, logprobs, lse, entropy) -> None:
        for rows in self:
            own = None if entropy is None else entropy[rows]
            scale = part(inv_temperature, rows)
            self.forward(self.logits(rows), target[rows], scale, logprobs[rows], lse[rows], own)

    def forward(self, z, target, inv_temperature, logprobs, lse, entropy) -> None:
        z = scaled_(self.logit_map.over(z), inv_temperature)
        torch.logsumexp(z, dim=-1, out=lse)
        torch.sub(z.gather(-1, target[:, None].long()).squeeze(-1), lse, out=logprobs)
        if entropy is not None:
            logp = z.sub_(lse[:, None])
            torch.sum(logp.exp().mul_(logp), dim=-1, out=entropy).neg_()

    def gradient(self, z, target, inv_temperature, lse, entropy, dlogprobs, dlse, dentropy) -> Tensor:
        z = self.logit_map.over(z)
        slope = self.logit_map.slope(z)
        logp = scaled_(z, inv_temperature).sub_(lse[:, None])
        probs = logp.exp()
        dz = probs * (-dlogprobs if dlse is None else dlse - dlogprobs)[:, None]
        if dentropy is not None:
            dz -= probs.mul_(logp.add_(entropy[:, None])).mul_(dentropy[:, None])
        dz.scatter_add_(-1, target[:, None].long(), dlogprobs[:, None])
        dz = scaled_(dz, inv_temperature)
        dz = dz if self.logit_map == PLAIN else dz.mul_(slope)
        return dz.to(self.hidden.dtype) if multiplies_halves(self.hidden) else dz

    @staticmethod
    def add_weight_gradient(into: Tensor, dz: Tensor, hidden: Tensor) -> None:
        if not multiplies_halves(hidden):
            into.addmm_(dz.T, hidden.to(dz.dtype))
            return
        # not the product in place of the Triton path: before a run the one is checked against the other
        for words in slices(len(into), GRADIENT_WORDS):
            into[words] += torch.mm(dz[:, words].T, hidden, out_dtype=torch.float32)


class TritonChunks:
    """Chunks of rows in one workspace of logits; their gradient takes its place, in the dtype of the model."""

    def __init__(self, hidden: Tensor, weight: Tensor, logit_map: LogitMap = PLAIN, workspace: Workspace | None = None):
        from fastrl.kernels import rows as kernels

        self.kernels, self.hidden, self.weight, self.logit_map = kernels, hidden, weight, logit_map
        self.workspace = Workspace() if workspace is None else workspace
        self.forward = partial(kernels.row_forward, logit_map=logit_map)
        self.add_weight_gradient = kernels.add_weight_gradient

    def __iter__(self):
        return iter(slices(len(self.hidden), CHUNK_ROWS))

    def logits(self, rows: slice) -> Tensor:
        return self.kernels.logits_into(self.workspace, self.hidden[rows], self.weight)

    def forward_all(self, *given) -> None:
        self.kernels.slab_forward(self.hidden, self.weight, *given, logit_map=self.logit_map, workspace=self.workspace)

    def gradient(self, *given) -> Tensor:
        return self.kernels.row_gradient(*given, dtype=self.hidden.dtype, logit_map=self.logit_map)

    def at_once(self, *given) -> tuple[Tensor, Tensor]:
        from fastrl.kernels.row_once import row_once

        return row_once(*given, dtype=self.hidden.dtype, logit_map=self.logit_map)


def chunks_of(
    hidden: Tensor, weight: Tensor, logit_map: LogitMap, triton: bool, workspace: Workspace | None
) -> TorchChunks | TritonChunks:
    """workspace None: memory of this call's own."""
    return TritonChunks(hidden, weight, logit_map, workspace) if triton else TorchChunks(hidden, weight, logit_map)


def slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def chunk_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[n, H], [V, H] -> logits [n, V] in at least float32; bfloat16 products are not rounded on the way out."""
    if multiplies_halves(hidden):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(dtype) @ weight.to(dtype).T


def multiplies_halves(x: Tensor) -> bool:
    """Whether products of x are of its 16 bits, with float32 results: float32 operands would leave the tensor cores.

    A CPU has no such product.
    """
    return x.dtype.itemsize == 2 and x.device.type != "cpu"


def scaled(z: Tensor, inv_temperature: float | Tensor) -> Tensor:
    return z * (inv_temperature[:, None] if isinstance(inv_temperature, Tensor) else inv_temperature)


def scaled_(z: Tensor, inv_temperature: float | Tensor) -> Tensor:
    if isinstance(inv_temperature, Tensor):
        return z.mul_(inv_temperature[:, None])
    return z if inv_temperature == 1.0 else z.mul_(inv_temperature)


def part(inv_temperature: float | Tensor, rows: slice) -> float | Tensor:
    return inv_temperature[rows] if isinstance(inv_temperature, Tensor) else inv_temperature


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    inv_temperature: float | Tensor = 1.0,
    logit_map: LogitMap = PLAIN,
    need_entropy: bool = False,
    weight_grad: Tensor | None = None,
    triton: bool | None = None,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """hidden [N, H], weight [V, H] of one dtype, target [N] in [0, V) -> logprobs, entropy, lse, each [N], nats.

    Outputs are float32 (float64 for float64 inputs); entropy is None unless asked for. All three are differentiable in
    hidden and weight. inv_temperature: one for all, or [N] float32. logit_map: what the model does to its logits before
    the temperature. With `weight_grad` [V, H] the weight gradient is
    added there during the backward and does not travel through autograd. triton: whether to take that path; None = on
    CUDA. workspace: the memory of its logits, which the backward takes too; None = of each its own.

    Raises ValueError on shapes or dtypes that do not match. A target that is no row of weight raises in torch and gives
    NaN in Triton.
    """
    if triton is None:
        triton = hidden.is_cuda and hidden.dtype != torch.float64
    check_head("linear_logprob", hidden, weight, target, inv_temperature, weight_grad=weight_grad, triton=triton)
    scale = inv_temperature if isinstance(inv_temperature, Tensor) else float(inv_temperature)
    return LinearLogprob.apply(hidden, weight, target, scale, logit_map, need_entropy, weight_grad, triton, workspace)


def check_head(
    operation: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    inv_temperature: float | Tensor,
    *,
    weight_grad: Tensor | None,
    triton: bool,
) -> None:
    """Raise ValueError unless the inputs of an operation on the head fit each other."""
    if hidden.ndim != 2 or target.shape != hidden.shape[:1] or weight.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            f"{operation} expects hidden [N, H], weight [V, H] and target [N], "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(target.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"{operation} expects one dtype, got hidden {hidden.dtype} and weight {weight.dtype}")
    if target.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{operation}: target must be int32 or int64, got {target.dtype}")
    if len({hidden.device, weight.device, target.device}) > 1:
        raise ValueError(
            f"{operation}: hidden is on {hidden.device}, weight on {weight.device} and target on {target.device}"
        )
    if isinstance(inv_temperature, Tensor) and (
        inv_temperature.shape != target.shape or inv_temperature.device != hidden.device
    ):
        raise ValueError(
            f"{operation}: inv_temperature must be a number or [{len(hidden)}] on {hidden.device}, "
            f"got {tuple(inv_temperature.shape)} on {inv_temperature.device}"
        )
    if weight_grad is not None and (weight_grad.shape != weight.shape or weight_grad.device != weight.device):
        raise ValueError(
            f"{operation}: weight_grad is {tuple(weight_grad.shape)} on {weight_grad.device} but weight is "
            f"{tuple(weight.shape)} on {weight.device}"
        )
    given = dict(hidden=hidden, weight=weight, weight_grad=weight_grad)
    for name, x in given.items():
        if x is None:
            continue
        if not x.is_contiguous():
            raise ValueError(f"{operation}: {name} must be contiguous, got strides {x.stride()} of {tuple(x.shape)}")
        if triton and x.data_ptr() % 16:
            raise ValueError(f"{operation}: {name} must start at a multiple of 16 bytes, got {x.data_ptr() % 16} more")
