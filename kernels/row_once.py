"""Rows of logits read once, with the loss of tokens: the arguments of csrc/row_once.cu, and a chunk through it.

The kernels of `rows.py` read a logit twice and write its gradient: 10 bytes. This one keeps a row in the registers of a
cluster of blocks: 6 bytes. It needs compute capability 9 and a CUDA compiler, so the caller brings it: a `RowKernel`.
"""

import ctypes
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastrl.kernels.logit_map import LogitMap
from fastrl.kernels.policy_loss import KL_CAP, STATS, TokenLoss
from fastrl.kernels.rows import factors, over_logits
from fastrl.kernels.vectors import NO_DUAL_CLIP

THREADS, BLOCKS, VECTOR = 256, 8, 8  # kThreads, kBlocks, kVector
KL_TYPES = ("none", "k1", "k2", "k3", "k3+")  # Kl
POINTER, FLOAT = ctypes.c_void_p, ctypes.c_float


class Arguments(ctypes.Structure):
    """`struct Arguments` of csrc/row_once.cu, pointers as addresses or None."""

    _fields_ = [
        ("z", POINTER),
        ("target", POINTER),
        ("inv_temperature", POINTER),
        ("old_logprobs", POINTER),
        ("ref_logprobs", POINTER),
        ("advantage", POINTER),
        ("w", POINTER),
        ("logprobs", POINTER),
        ("entropy", POINTER),
        ("stats", POINTER),
        ("stride", ctypes.c_longlong),
        ("words", ctypes.c_int),
        ("cispo", ctypes.c_int),
        ("kl_type", ctypes.c_int),
        ("outer", FLOAT),
        ("inner", FLOAT),
        ("entropy_coef", FLOAT),
        ("kl_coef", FLOAT),
        ("low_edge", FLOAT),
        ("high_edge", FLOAT),
        ("dual_clip", FLOAT),
        ("cap", FLOAT),
        ("kl_cap", FLOAT),
    ]


@dataclass(frozen=True, slots=True)
class Configuration:
    """An instance of the kernel. groups: of `RowKernel.group` words, that the vocabulary takes."""

    groups: int
    softcap: bool
    half: bool  # the gradient is bfloat16; else float32

    @property
    def words(self) -> tuple[str, str, str]:
        """As C++ spells them."""
        return str(self.groups), str(self.softcap).lower(), str(self.half).lower()

    @property
    def instance(self) -> str:
        return f"FASTRL_ROW_ONCE({', '.join(self.words)})\n"

    @property
    def name(self) -> str:
        return "_".join(["fastrl_row_once", *self.words])


class RowKernel(Protocol):
    group: int  # words of a group, THREADS x BLOCKS x VECTOR as they were compiled
    most_words: int  # that the registers of a cluster hold

    def launch(self, configuration: Configuration, arguments: Arguments, rows: int) -> None:
        """Queue it for so many rows on the current stream of the current device."""
        ...


def configuration_of(kernel: RowKernel, words: int, dtype: torch.dtype, logit_map: LogitMap) -> Configuration:
    """Raises ValueError where there is none: float16, or more words than the registers of a cluster hold."""
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"row_kernel: hidden must be torch.bfloat16 or torch.float32, got {dtype}; leave row_kernel out"
        )
    if words > kernel.most_words:
        raise ValueError(f"row_kernel: at most {kernel.most_words} words, got {words}; leave row_kernel out")
    return Configuration(-(-words // kernel.group), logit_map.softcap > 0, dtype == torch.bfloat16)


def row_once(
    kernel: RowKernel,
    loss: TokenLoss,
    z: Tensor,
    target: Tensor,
    inv_temperature: float | Tensor,
    vectors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    logprobs: Tensor,
    entropy: Tensor,
    *,
    dtype: torch.dtype,
    logit_map: LogitMap,
) -> tuple[Tensor, Tensor]:
    """z [n, V] of the workspace -> dz [n, V] of `dtype` over it, and stats [n, len(STATS)] of each token.

    vectors: advantage, w, old_logprobs, ref_logprobs, [n] float32. logprobs, entropy [n] are written in place; nats.
    """
    assert z.stride(0) % VECTOR == 0 and z.data_ptr() % 16 == 0, "a row is read and written 16 bytes at a time"
    configuration = configuration_of(kernel, z.shape[1], dtype, logit_map)
    stats = torch.empty(len(z), len(STATS), dtype=torch.float32, device=z.device)
    advantage, w, old, ref = vectors
    outer, inner = factors(inv_temperature, logit_map)
    target = target.long()
    tensors = dict(
        z=z,
        target=target,
        inv_temperature=outer.float() if isinstance(outer, Tensor) else None,
        old_logprobs=old,
        ref_logprobs=ref,
        advantage=advantage,
        w=w,
        logprobs=logprobs,
        entropy=entropy,
        stats=stats,
    )
    arguments = Arguments(
        **{name: None if x is None else x.data_ptr() for name, x in tensors.items()},
        stride=z.stride(0),
        words=z.shape[1],
        cispo=loss.surrogate == "cispo",
        kl_type=0 if ref is None else KL_TYPES.index(loss.kl_type),
        outer=1.0 if isinstance(outer, Tensor) else outer,
        inner=inner,
        entropy_coef=loss.entropy,
        kl_coef=loss.kl,
        low_edge=1 - loss.clip_low,
        high_edge=1 + loss.clip_high,
        dual_clip=NO_DUAL_CLIP if loss.dual_clip is None else loss.dual_clip,
        cap=loss.log_ratio_cap,
        kl_cap=KL_CAP,
    )
    if len(z):
        kernel.launch(configuration, arguments, len(z))
    return over_logits(z, dtype), stats
