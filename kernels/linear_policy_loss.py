"""The head and the loss of single tokens in one pass, with the gradients taken in the forward.

    chunk of rows   Z = hidden @ weight.T                               GEMM, float32 out
                    logprob, lse, entropy of each row of Z              rows.row_forward
                    coef = d loss / d logprob                           policy_loss
                    dZ over Z                                           rows.row_gradient
                    hidden_grad = dZ @ weight,   weight_grad += dZ.T @ hidden
    loss          = sum_n w (policy loss + kl_coef kl - entropy_coef entropy)

Six products of N H V instead of the eight of `linear_logprob`, whose backward makes the logits again. It takes a loss
that is known when the row is: of one token, with its normalizer in w. A loss of whole completions (A*-PO, REBEL, GSPO)
needs their sum of log-probabilities first, and can use mode "given" if it has that sum already.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastrl.kernels.linear_logprob import CHUNK_ROWS, TorchChunks, TritonChunks, check_head, linear_logprob_ref, part
from fastrl.kernels.policy_loss import (
    STATS,
    KlEstimator,
    PolicyLoss,
    add_up,
    check_vectors,
    policy_loss,
    policy_loss_ref,
)

Mode = Literal["clip", "cispo", "pg", "given"]


class LinearLoss(NamedTuple):
    """loss [] (the only differentiable member); logprobs, entropy [N] nats; hidden_grad [N, H]; weight_grad [V, H].

    stats [len(policy_loss.STATS)]: sums over tokens; in mode "given" only loss, tokens and nonfinite are counted.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor | None
    hidden_grad: Tensor
    weight_grad: Tensor | None
    stats: Tensor

    def named(self) -> dict[str, Tensor]:
        return dict(zip(STATS, self.stats, strict=True))


def linear_policy_loss_ref(
    hidden: Tensor, weight: Tensor, target: Tensor, *, advantage: Tensor | None = None, w: Tensor,
    old_logprobs: Tensor | None = None, ref_logprobs: Tensor | None = None, kl_coef: float = 0.0,
    kl_estimator: KlEstimator = "k3", entropy_coef: float = 0.0, inv_temperature: float | Tensor = 1.0,
    mode: Mode = "clip", epsilon: tuple[float, float] = (0.2, 0.2), dual_clip: float | None = 3.0,
    log_ratio_cap: float = 20.0, coef: Tensor | None = None,
) -> LinearLoss:  # fmt: skip
    """The definition: linear_logprob_ref, policy_loss_ref, and autograd between them, with all logits alive."""
    ignored = target < 0
    w = torch.where(ignored, torch.zeros_like(w), w)
    with torch.enable_grad():
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        logprobs, entropy, _ = linear_logprob_ref(
            hidden, weight, target.clamp(min=0), inv_temperature=inv_temperature, need_entropy=True
        )
        if mode == "given":
            token = given(logprobs.detach(), w, coef)
        else:
            token = policy_loss_ref(
                logprobs.detach(), old_logprobs, advantage, w, ref_logprobs=ref_logprobs, kl_coef=kl_coef,
                kl_estimator=kl_estimator, mode=mode, epsilon=epsilon, dual_clip=dual_clip,
                log_ratio_cap=log_ratio_cap,
            )  # fmt: skip
        linear = (token.coef.to(logprobs.dtype) * logprobs).sum() - entropy_coef * (w * entropy).sum()
        grads = torch.autograd.grad(linear, (hidden, weight))
    stats = token.stats.clone()
    shown = [torch.where(ignored, torch.zeros_like(x), x).detach() for x in (logprobs, entropy)]
    stats[0] -= (entropy_coef * (w * shown[1]).sum()).to(stats)
    return LinearLoss(stats[0], *shown, *grads, stats)


def given(logprobs: Tensor, w: Tensor, coef: Tensor) -> PolicyLoss:
    """Coefficients that are known already; their loss is the linear one."""
    coef = torch.where(w != 0, coef, torch.zeros_like(coef))
    stats = coef.new_zeros(len(STATS))
    alive = w != 0
    stats[STATS.index("loss")] = torch.where(alive, coef * logprobs.to(coef), torch.zeros_like(coef)).sum()
    stats[STATS.index("tokens")] = alive.sum()
    stats[STATS.index("nonfinite")] = (alive & ~logprobs.isfinite()).sum()
    return PolicyLoss(coef, stats[0], stats)


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
    hidden: Tensor, weight: Tensor, target: Tensor, *, advantage: Tensor | None = None, w: Tensor,
    old_logprobs: Tensor | None = None, ref_logprobs: Tensor | None = None, kl_coef: float = 0.0,
    kl_estimator: KlEstimator = "k3", entropy_coef: float = 0.0, need_entropy: bool = True,
    inv_temperature: float | Tensor = 1.0, mode: Mode = "clip", epsilon: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = 3.0, log_ratio_cap: float = 20.0, coef: Tensor | None = None,
    weight_grad: Tensor | None = None, need_weight_grad: bool = True, chunk: int = CHUNK_ROWS,
    workspace: Tensor | None = None, logits_dtype: torch.dtype = torch.float32, rows_with_gradient: int | None = None,
    triton: bool | None = None,
) -> LinearLoss:  # fmt: skip
    """hidden [N, H], weight [V, H] of one dtype; target [N]; the other vectors [N] float32.

    w: the response mask over the global denominator; a negative target has w = 0. old_logprobs None: on-policy, ratio
    1. mode "given" takes d loss / d logprob as coef and no advantage. weight_grad [V, H] float32 is added to in place;
    without it (and with need_weight_grad) the result holds a new one. rows_with_gradient: how many rows, the first,
    may have a coef or an entropy term that is not 0; the others cost two of the six products. chunk: rows of logits
    alive at a time; logits_dtype: bfloat16 logits take half the memory and move ratios by several per cent. workspace
    [rows, at least V] of logits_dtype, triton: as in `linear_logprob`.

    The loss can be added to others and its backward() called, but not scaled. Raises ValueError on shapes, dtypes or a
    mode that do not fit.
    """
    if triton is None:
        triton = hidden.is_cuda
    check_head(
        "linear_policy_loss", hidden, weight, target, inv_temperature, workspace=workspace, weight_grad=weight_grad,
        logits_dtype=logits_dtype, triton=triton,
    )  # fmt: skip
    if chunk < 1:
        raise ValueError(f"linear_policy_loss: chunk must be at least 1 row, got {chunk}")
    if logits_dtype not in (torch.float32, hidden.dtype):
        raise ValueError(
            f"linear_policy_loss: logits_dtype must be torch.float32 or that of hidden, {hidden.dtype}, "
            f"got {logits_dtype}"
        )
    active = len(hidden) if rows_with_gradient is None else rows_with_gradient
    if not 0 <= active <= len(hidden):
        raise ValueError(f"linear_policy_loss: rows_with_gradient must be 0 to {len(hidden)}, got {active}")
    if w.shape != target.shape or w.device != hidden.device:
        raise ValueError(
            f"linear_policy_loss: w must be [{len(hidden)}] on {hidden.device}, got {tuple(w.shape)} on {w.device}"
        )
    vectors = dict(w=w, advantage=advantage, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, coef=coef)
    check_vectors("linear_policy_loss", vectors)
    wanted, other = ("coef", "advantage") if mode == "given" else ("advantage", "coef")
    if vectors[wanted] is None or vectors[other] is not None:
        raise ValueError(f"linear_policy_loss: mode {mode} takes {wanted} and no {other}")
    if weight_grad is not None and weight_grad.dtype != torch.float32:
        raise ValueError(f"linear_policy_loss: weight_grad must be torch.float32, got {weight_grad.dtype}")
    with torch.no_grad():
        made = in_chunks(
            hidden, weight, target, w, vectors, inv_temperature=inv_temperature, need_entropy=need_entropy,
            entropy_coef=entropy_coef, into=weight_grad, need_weight_grad=need_weight_grad, active=active, mode=mode,
            triton=triton, layout=dict(chunk=chunk, logits_dtype=logits_dtype), workspace=workspace, options=dict(
                kl_coef=kl_coef, kl_estimator=kl_estimator, epsilon=epsilon, dual_clip=dual_clip,
                log_ratio_cap=log_ratio_cap,
            ),
        )  # fmt: skip
    return made._replace(loss=Saved.apply(hidden, made.loss, made.hidden_grad))


def in_chunks(
    hidden, weight, target, w, vectors, *, inv_temperature, need_entropy, entropy_coef, into, need_weight_grad,
    active, mode, triton, layout, workspace, options,
) -> LinearLoss:  # fmt: skip
    logprobs, lse = torch.empty(2, len(hidden), dtype=torch.float32, device=hidden.device)
    entropy = torch.empty_like(lse) if need_entropy or entropy_coef else None
    ignored = target < 0
    w = torch.where(ignored, 0.0, w)
    target = target.clamp(min=0)
    hidden_grad = torch.empty_like(hidden)
    if into is None and need_weight_grad:
        into = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)

    def chunks_of(hidden: Tensor) -> TritonChunks | TorchChunks:
        return TritonChunks(hidden, weight, workspace, **layout) if triton else TorchChunks(hidden, weight, **layout)

    def token_loss(rows: slice) -> PolicyLoss:
        _, advantage, old, ref, coef = (None if x is None else x[rows] for x in vectors.values())
        if mode == "given":
            return given(logprobs[rows], w[rows], coef)
        return policy_loss(
            logprobs[rows], old, advantage, w[rows], ref_logprobs=ref, mode=mode, triton=triton, **options
        )

    stats = [torch.zeros(len(STATS), dtype=torch.float32, device=hidden.device)]
    chunks = chunks_of(hidden[:active])
    for rows in chunks:
        z = chunks.logits(rows)
        scale, own = part(inv_temperature, rows), None if entropy is None else entropy[rows]
        chunks.forward(z, target[rows], scale, logprobs[rows], lse[rows], own)
        token = token_loss(rows)
        stats.append(token.stats)
        dentropy = -entropy_coef * w[rows] if entropy_coef else None
        if not triton:  # the torch definition spends its logits
            z = chunks.logits(rows)
        dz = chunks.gradient(z, target[rows], scale, lse[rows], own, token.coef, None, dentropy)
        torch.mm(dz.to(weight.dtype), weight, out=hidden_grad[rows])
        if need_weight_grad:
            chunks.add_weight_gradient(into, dz, hidden[rows])
    if active < len(hidden):
        rest = slice(active, len(hidden))
        own = None if entropy is None else entropy[rest]
        chunks_of(hidden[rest]).forward_all(target[rest], part(inv_temperature, rest), logprobs[rest], lse[rest], own)
        token = token_loss(rest)
        stats.append(token.stats)
        silent = (token.coef == 0).all() & (entropy_coef * w[rest] == 0).all()
        torch._assert_async(silent, "linear_policy_loss: a row beyond rows_with_gradient has a gradient")
        hidden_grad[rest] = 0
    totals = add_up(stats)
    if entropy is not None:
        entropy = torch.where(ignored, 0.0, entropy)
    if entropy_coef:
        totals[0] -= entropy_coef * torch.where((w != 0) & entropy.isfinite(), w * entropy, 0.0).sum()
    logprobs = torch.where(ignored, 0.0, logprobs)
    return LinearLoss(totals[0], logprobs, entropy, hidden_grad, into if need_weight_grad else None, totals)
