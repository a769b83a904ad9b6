"""The head and the loss of single tokens in one pass, with the gradients taken in the forward.

    chunk of rows   Z = hidden @ weight.T                               GEMM, float32 out
                    logprob, lse, entropy of each row of Z              rows.row_forward
                    coef = d loss / d logprob                           policy_loss
                    dZ over Z                                           rows.row_gradient
                    (or the three of them at once, with a `RowKernel`   row_once.row_once)
                    hidden_grad = dZ @ weight,   weight_grad += dZ.T @ hidden
    loss          = sum_n w (policy loss + kl KL - entropy H)

Six products of N H V instead of the eight of `linear_logprob`, whose backward makes the logits again. It takes a loss
that is known when the row is: a `TokenLoss` of token ratios, with its normalizer in w. A loss of whole completions
(A*-PO, REBEL, GSPO) needs their sum of log-probabilities first, and so the logits twice: those are the eight.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastrl.kernels.linear_logprob import TorchChunks, TritonChunks, check_head, chunks_of, linear_logprob_ref, part
from fastrl.kernels.logit_map import PLAIN, LogitMap
from fastrl.kernels.policy_loss import STATS, PolicyLoss, TokenLoss, check_vectors, policy_loss, policy_loss_ref
from fastrl.kernels.workspace import Workspace

if TYPE_CHECKING:
    from fastrl.kernels.row_once import RowKernel


class TokenVectors(NamedTuple):
    """What a loss of tokens reads beside their log-probabilities, [N] float32.

    w: the response mask over the global denominator. old_logprobs None: on-policy, ratio 1.
    """

    advantage: Tensor
    w: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None

    def at(self, rows: slice) -> "TokenVectors":
        old, ref = (None if x is None else x[rows] for x in (self.old_logprobs, self.ref_logprobs))
        return TokenVectors(self.advantage[rows], self.w[rows], old, ref)


class LinearLoss(NamedTuple):
    """loss [] (the only differentiable member); logprobs, entropy [N] nats; hidden_grad [N, H]; weight_grad [V, H].

    stats [len(policy_loss.STATS)]: sums over tokens.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor
    stats: Tensor

    def named(self) -> dict[str, Tensor]:
        return dict(zip(STATS, self.stats, strict=True))


def linear_policy_loss_ref(
    loss: TokenLoss,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    vectors: TokenVectors,
    *,
    inv_temperature: float | Tensor = 1.0,
    logit_map: LogitMap = PLAIN,
) -> LinearLoss:
    """The definition: linear_logprob_ref, policy_loss_ref, and autograd between them, with all logits alive."""
    ignored = target < 0
    w = torch.where(ignored, torch.zeros_like(vectors.w), vectors.w)
    with torch.enable_grad():
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        logprobs, entropy, _ = linear_logprob_ref(
            hidden, weight, target.clamp(min=0), inv_temperature=inv_temperature, logit_map=logit_map, need_entropy=True
        )
        assert entropy is not None  # need_entropy
        token = of_tokens(policy_loss_ref, loss, logprobs.detach(), vectors._replace(w=w))
        linear = (token.coef.to(logprobs.dtype) * logprobs).sum() - loss.entropy * (w * entropy).sum()
        hidden_grad, weight_grad = torch.autograd.grad(linear, (hidden, weight))
    stats = token.stats.clone()
    logprobs, entropy = (torch.where(ignored, torch.zeros_like(x), x).detach() for x in (logprobs, entropy))
    stats[0] -= (loss.entropy * (w * entropy).sum()).to(stats)
    return LinearLoss(stats[0], logprobs, entropy, hidden_grad, weight_grad, stats)


def of_tokens(function, loss: TokenLoss, logprobs: Tensor, vectors: TokenVectors, **how) -> PolicyLoss:
    return function(loss, logprobs, vectors.old_logprobs, vectors.advantage, vectors.w, vectors.ref_logprobs, **how)


class Saved(torch.autograd.Function):
    """A loss whose gradient in hidden is known; that in weight has been added to its buffer already."""

    @staticmethod
    def forward(ctx, hidden, loss, hidden_grad):
        ctx.save_for_backward(hidden_grad)
        return loss.clone()

    @staticmethod
    def backward(ctx, dloss):
        (hidden_grad,) = ctx.saved_tensors
        # the buffer of the weight cannot be scaled any more; on CUDA the check waits for nothing
        torch._assert_async(dloss == 1, "linear_policy_loss: the loss must not be scaled; put the factor into w")
        return hidden_grad, None, None


def linear_policy_loss(
    loss: TokenLoss,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    vectors: TokenVectors,
    *,
    inv_temperature: float | Tensor = 1.0,
    logit_map: LogitMap = PLAIN,
    weight_grad: Tensor | None = None,
    triton: bool | None = None,
    workspace: Workspace | None = None,
    row_kernel: "RowKernel | None" = None,
) -> LinearLoss:
    """hidden [N, H], weight [V, H] of one dtype; target [N], negative where w = 0 is meant.

    weight_grad [V, H] float32 is added to in place; without it the result holds a new one. inv_temperature, logit_map,
    triton, workspace: as in `linear_logprob`. The loss can be added to others and its backward() called, but not
    scaled. row_kernel: one that reads each logit once, in the place of those of Triton.

    Raises ValueError on shapes, dtypes or a loss that do not fit.
    """
    if triton is None:
        triton = hidden.is_cuda and hidden.dtype != torch.float64
    check_head("linear_policy_loss", hidden, weight, target, inv_temperature, weight_grad=weight_grad, triton=triton)
    if vectors.w.shape != target.shape or vectors.w.device != hidden.device:
        raise ValueError(
            f"linear_policy_loss: w must be [{len(hidden)}] on {hidden.device}, "
            f"got {tuple(vectors.w.shape)} on {vectors.w.device}"
        )
    check_vectors("linear_policy_loss", {"w": vectors.w, **vectors._asdict()})
    if loss.ratio_level != "token":
        raise ValueError("linear_policy_loss: the ratio of a sequence is not known here; use ratio_level='token'")
    if weight_grad is None:
        weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    elif weight_grad.dtype != torch.float32:
        raise ValueError(f"linear_policy_loss: weight_grad must be torch.float32, got {weight_grad.dtype}")
    if row_kernel is not None and not triton:
        raise ValueError("linear_policy_loss: row_kernel takes the logits of the Triton path; use triton=True")
    chunks = chunks_of(hidden, weight, logit_map, triton, workspace)
    with torch.no_grad():
        made = in_chunks(loss, chunks, target, vectors, inv_temperature, weight_grad, row_kernel)
    return made._replace(loss=Saved.apply(hidden, made.loss, made.hidden_grad))


def in_chunks(
    loss: TokenLoss,
    chunks: TritonChunks | TorchChunks,
    target: Tensor,
    vectors: TokenVectors,
    inv_temperature: float | Tensor,
    weight_grad: Tensor,
    row_kernel: "RowKernel | None",
) -> LinearLoss:
    hidden, weight, triton = chunks.hidden, chunks.weight, isinstance(chunks, TritonChunks)
    logprobs, lse, entropy = torch.empty(3, len(hidden), dtype=torch.float32, device=hidden.device)
    hidden_grad = torch.empty_like(hidden)
    ignored, target = target < 0, target.clamp(min=0)
    vectors = vectors._replace(w=torch.where(ignored, 0.0, vectors.w))
    stats = [torch.zeros(len(STATS), dtype=torch.float32, device=hidden.device)]
    for rows in chunks:
        z, scale, given = chunks.logits(rows), part(inv_temperature, rows), vectors.at(rows)
        if row_kernel is not None and isinstance(chunks, TritonChunks):
            own = logprobs[rows], entropy[rows]
            dz, sums = chunks.at_once(row_kernel, loss, z, target[rows], scale, given, *own)
            stats.append(sums.sum(dim=0))
        else:
            chunks.forward(z, target[rows], scale, logprobs[rows], lse[rows], entropy[rows])
            token = of_tokens(policy_loss, loss, logprobs[rows], given, triton=triton)
            stats.append(token.stats)
            dentropy = -loss.entropy * given.w if loss.entropy else None
            if not triton:  # the torch definition spends its logits
                z = chunks.logits(rows)
            dz = chunks.gradient(z, target[rows], scale, lse[rows], entropy[rows], token.coef, None, dentropy)
        torch.mm(dz.to(weight.dtype), weight, out=hidden_grad[rows])
        chunks.add_weight_gradient(weight_grad, dz, hidden[rows])
    totals = torch.stack(stats).sum(dim=0)
    entropy = torch.where(ignored, 0.0, entropy)
    if loss.entropy:
        counted = (vectors.w != 0) & entropy.isfinite()
        totals[0] -= loss.entropy * torch.where(counted, vectors.w * entropy, 0.0).sum()
    logprobs = torch.where(ignored, 0.0, logprobs)
    return LinearLoss(totals[0], logprobs, entropy, hidden_grad, weight_grad, totals)
