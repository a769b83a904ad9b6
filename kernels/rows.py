"""Rows of logits, one program each: log-probability and entropy, and their gradient written over the logits.

    z'      = inv_temperature f(z), f(z) = scale z or softcap tanh(scale z / softcap)
    lse     = logsumexp(z'),   logprob = z'[target] - lse,   entropy = lse - sum_v p[v] z'[v]
    dz'[v]  = dlogprob (1[v == target] - p[v]) + dlse p[v] - dentropy p[v] (log p[v] + entropy)
    dz[v]   = inv_temperature f'(z) dz'[v]

What `linear_logprob` and `linear_policy_loss` share: GEMMs by the vendor library, and these kernels between them. The
forward reads 4 bytes per logit; the gradient reads 4 and writes 2 (bfloat16) or 4 over them: a chunk of logits is all
the memory of its size. A row may also come in slabs of the vocabulary, one launch each: four floats are carried over.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels.jit import jit
from fastrl.kernels.logit_map import PLAIN, LogitMap
from fastrl.kernels.workspace import Workspace

# compiled for sm_90, 32 to 50 registers and no spills: two programs or more per multiprocessor (tests/support/aot.py)
BLOCK_V = 8192
NUM_WARPS = 16
ROW_ALIGN = 16  # floats; every row of logits starts at 64 bytes
SLAB_ROWS, SLAB_WORDS = 16384, 1024  # a product of this size takes longer than two launches
SLAB_ELEMENTS = SLAB_ROWS * SLAB_WORDS  # float32 logits alive while only log-probabilities are asked for: 64 MiB


@jit
def tanh(x):
    # exp overflows to inf, and 2 / inf is 0; NaN stays NaN
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@jit
def row_forward_kernel(
    z_ptr,
    target_ptr,
    inv_temperature_ptr,
    logprob_ptr,
    lse_ptr,
    entropy_ptr,
    state_ptr,
    z_stride_n,
    V,
    first_word,
    inv_temperature,  # times the softcap, if there is one, else times the scale
    inner,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    RESUME: tl.constexpr,
    FINISH: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # int64: rows times vocabulary passes 2^31 at 16k rows and a 152k vocabulary
    row_ptr = z_ptr + n * z_stride_n
    target = tl.load(target_ptr + n).to(tl.int64) - first_word
    if PER_TOKEN:
        inv_temperature = tl.load(inv_temperature_ptr + n)
    if RESUME:
        top = tl.load(state_ptr + 4 * n)
        total = tl.load(state_ptr + 4 * n + 1)
        moment = tl.load(state_ptr + 4 * n + 2)
        picked = tl.load(state_ptr + 4 * n + 3)
    else:
        top = -float("inf")
        total = 0.0  # sum of exp(z' - top)
        moment = 0.0  # sum of exp(z' - top) (z' - top)
        picked = float("nan")  # z' of the target; an id that is no word never gets one
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)  # [BLOCK_V]
        x = tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
        if SOFTCAP:
            x = tl.where(v < V, tanh(x * inner), -float("inf"))
        x *= inv_temperature
        new_top = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(new_top > -float("inf"), new_top, 0.0)  # a block of nothing but -inf
        gap = tl.where(top > -float("inf"), top - shift, 0.0)
        keep = tl.where(top > -float("inf"), tl.exp(gap), 0.0)
        x -= shift
        e = tl.exp(x)
        if ENTROPY:
            # 0 * -inf is NaN; the old moment was taken about the old top
            moment = keep * (moment + total * gap) + tl.sum(e * tl.where(x > -float("inf"), x, 0.0), 0)
        total = total * keep + tl.sum(e, 0)
        top = new_top
    inside = (target >= 0) & (target < V)
    here = tl.load(row_ptr + target, mask=inside, other=0.0).to(tl.float32)
    if SOFTCAP:
        here = tanh(here * inner)
    picked = tl.where(inside, here * inv_temperature, picked)
    if FINISH:
        logprob = tl.minimum((picked - top) - tl.log(total), 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(logprob_ptr + n, logprob)
        tl.store(lse_ptr + n, top + tl.log(total))
        if ENTROPY:
            tl.store(entropy_ptr + n, tl.log(total) - moment / total)
    else:
        tl.store(state_ptr + 4 * n, top)
        tl.store(state_ptr + 4 * n + 1, total)
        tl.store(state_ptr + 4 * n + 2, moment)
        tl.store(state_ptr + 4 * n + 3, picked)


@jit
def row_gradient_kernel(
    z_ptr,
    dz_ptr,
    target_ptr,
    inv_temperature_ptr,
    lse_ptr,
    entropy_ptr,
    dlogprob_ptr,
    dlse_ptr,
    dentropy_ptr,
    z_stride_n,
    dz_stride_n,
    V,
    inv_temperature,  # times the softcap, if there is one, else times the scale
    inner,
    SOFTCAP: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # dz lies over z: block b is read at bytes [4bB, 4(b+1)B) and written, as bfloat16, at [2bB, 2(b+1)B), so ascending
    # blocks write only what was read before; the barrier makes "before" hold for all threads of the program
    n = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + n).to(tl.int64)
    if PER_TOKEN:
        inv_temperature = tl.load(inv_temperature_ptr + n)
    lse = tl.load(lse_ptr + n)
    dlogprob = tl.load(dlogprob_ptr + n)
    on_all = -dlogprob
    if HAS_DLSE:
        on_all += tl.load(dlse_ptr + n)
    if HAS_DENTROPY:
        entropy = tl.load(entropy_ptr + n)
        dentropy = tl.load(dentropy_ptr + n)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)  # [BLOCK_V]
        x = tl.load(z_ptr + n * z_stride_n + v, mask=v < V, other=-float("inf")).to(tl.float32)
        tl.debug_barrier()
        slope = inv_temperature
        if SOFTCAP:
            x = tl.where(v < V, tanh(x * inner), -float("inf"))
            slope = inv_temperature * inner * (1.0 - x * x)
        logp = x * inv_temperature - lse
        p = tl.exp(logp)
        weight = on_all + tl.zeros([BLOCK_V], tl.float32)
        if HAS_DENTROPY:
            weight -= dentropy * (tl.where(p > 0, logp, 0.0) + entropy)
        dz = (p * weight + tl.where(v == target, dlogprob, 0.0)) * slope
        tl.store(dz_ptr + n * dz_stride_n + v, dz.to(dz_ptr.dtype.element_ty), mask=v < V)


def aligned(words: int) -> int:
    return triton.cdiv(words, ROW_ALIGN) * ROW_ALIGN


def logits_into(workspace: Workspace, hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [n, H], weight [V, H] -> logits [n, V] in the workspace; in float32, bfloat16 products are not rounded."""
    z = workspace.logits(len(hidden), aligned(len(weight)), hidden.device)[:, : len(weight)]
    if hidden.dtype == z.dtype:
        return torch.mm(hidden, weight.T, out=z)
    if hidden.device.type == "cpu":  # which has no bfloat16 product with a float32 result
        return torch.mm(hidden.float(), weight.float().T, out=z)
    return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=z)


def row_forward(
    z: Tensor,
    target: Tensor,
    inv_temperature: float | Tensor,
    logprobs: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    *,
    logit_map: LogitMap = PLAIN,
    state: Tensor | None = None,
    first_word: int = 0,
    finish: bool = True,
) -> None:
    """z [n, V] with contiguous rows -> logprobs, lse, entropy [n] float32, written in place; nats.

    z may be the columns from first_word on of a larger vocabulary, taken in order: `state` [n, 4] float32 then carries
    what is known of a row from one call to the next, and only the last one (finish) writes the others.
    """
    outer, inner = factors(inv_temperature, logit_map)
    per_token = isinstance(outer, Tensor)
    block = min(BLOCK_V, max(SLAB_WORDS, triton.next_power_of_2(z.shape[1])))
    row_forward_kernel[(len(z),)](
        z,
        target,
        outer if per_token else None,
        logprobs,
        lse,
        entropy,
        state,
        z.stride(0),
        z.shape[1],
        first_word,
        1.0 if per_token else outer,
        inner,
        SOFTCAP=logit_map.softcap > 0,
        ENTROPY=entropy is not None,
        PER_TOKEN=per_token,
        RESUME=first_word > 0,
        FINISH=finish,
        BLOCK_V=block,
        num_warps=max(1, block * NUM_WARPS // BLOCK_V),
        enable_fp_fusion=True,
    )


def factors(inv_temperature: float | Tensor, logit_map: LogitMap) -> tuple[float | Tensor, float]:
    """What the kernels multiply by: z' = outer z, or outer tanh(inner z) with a softcap."""
    factor, inner = (logit_map.softcap, logit_map.inner) if logit_map.softcap else (logit_map.scale, 1.0)
    return inv_temperature if factor == 1.0 else inv_temperature * factor, inner


def slab_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    inv_temperature: float | Tensor,
    logprobs: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    *,
    logit_map: LogitMap = PLAIN,
    workspace: Workspace,
) -> None:
    """hidden [n, H], weight [V, H] -> logprobs, lse, entropy [n] float32 in place, 64 MiB of logits alive at a time.

    Rows stay and columns move: each slab of weight is read once, and hidden, which is small, once per slab.
    """
    for start in range(0, len(hidden), SLAB_ROWS):
        rows = slice(start, min(start + SLAB_ROWS, len(hidden)))
        n = rows.stop - rows.start
        width = min(aligned(len(weight)), max(SLAB_WORDS, SLAB_ELEMENTS // n // SLAB_WORDS * SLAB_WORDS))
        state = torch.empty(n, 4, dtype=torch.float32, device=hidden.device) if width < len(weight) else None
        scale = inv_temperature[rows] if isinstance(inv_temperature, Tensor) else inv_temperature
        own = None if entropy is None else entropy[rows]
        for word in range(0, len(weight), width):
            row_forward(
                logits_into(workspace, hidden[rows], weight[word : word + width]),
                target[rows],
                scale,
                logprobs[rows],
                lse[rows],
                own,
                logit_map=logit_map,
                state=state,
                first_word=word,
                finish=word + width >= len(weight),
            )


def over_logits(z: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of z [n, V] as [n, V] of `dtype`, which is z's or half as wide; every row begins where z's does."""
    if dtype == z.dtype:
        return z
    whole = z.as_strided((len(z), z.stride(0)), (z.stride(0), 1)).view(dtype)
    return whole[:, : z.shape[1]]


def row_gradient(
    z: Tensor,
    target: Tensor,
    inv_temperature: float | Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    dlogprobs: Tensor,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    *,
    dtype: torch.dtype,
    logit_map: LogitMap = PLAIN,
) -> Tensor:
    """z [n, V], vectors [n] -> dz [n, V] of `dtype`, which is z's or half as wide, over the same memory; z is gone."""
    dz = over_logits(z, dtype)
    outer, inner = factors(inv_temperature, logit_map)
    per_token = isinstance(outer, Tensor)
    row_gradient_kernel[(len(z),)](
        z,
        dz,
        target,
        outer if per_token else None,
        lse,
        entropy,
        dlogprobs,
        dlse,
        dentropy,
        z.stride(0),
        dz.stride(0),
        z.shape[1],
        1.0 if per_token else outer,
        inner,
        SOFTCAP=logit_map.softcap > 0,
        HAS_DLSE=dlse is not None,
        HAS_DENTROPY=dentropy is not None,
        PER_TOKEN=per_token,
        BLOCK_V=BLOCK_V,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return dz


def add_weight_gradient(into: Tensor, dz: Tensor, hidden: Tensor) -> None:
    """into [V, H] float32 += dz.T [V, n] @ hidden [n, H], summed in float32, without another [V, H] tensor."""
    if hidden.dtype == torch.float32 or hidden.device.type == "cpu":
        into.addmm_(dz.float().T, hidden.float())
    else:
        torch.addmm(into, dz.T, hidden, out_dtype=torch.float32, out=into)
