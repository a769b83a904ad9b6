"""The norm of a vector as long as a model, in one pass and without a copy of it in a wider type.

Squares are summed in float32 within a row of ROW elements and in float64 over rows: the error is below 1e-6 of the norm
however long the vector is, at 16 bytes for each row. Squares under- and overflow in float32 where the numbers do not;
`norm_over_ranks` then takes the sum in float64.
"""

import math

import torch
from torch import Tensor

from fastrl.base import ranks
from fastrl.weights.buffer import PART

ROW = 256  # elements, of which the shards and tensors of a buffer have whole numbers but for a tensor's tail
AT_A_TIME = 1 << 26  # elements: the rows of so many are alive at a time, and on a CPU a float32 copy of bfloat16
# squares below 2^-126 are lost: of a norm above it not a millionth, with as many as 1e12 of them
LEAST = 1e-9


def squared_norm(vector: Tensor) -> Tensor:
    """[n] -> [] float64, by float32 sums of rows; float64 of a float64 vector. Not finite where an element is not."""
    total = torch.zeros((), dtype=torch.float64, device=vector.device)
    for part in vector.split(AT_A_TIME):
        whole = len(part) // ROW * ROW
        if whole:
            total += rows_norm(part[:whole].view(-1, ROW)).double().square_().sum()
        if whole < len(part):
            total += in_float64(part[whole:])
    return total


def rows_norm(rows: Tensor) -> Tensor:
    """[rows, ROW] -> [rows], float32 or better. On CUDA bfloat16 is read as it is, without a copy."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))


def squared_norm_in_float64(vector: Tensor) -> Tensor:
    """[n] -> [] float64; a chunk of the vector at a time is copied to float64."""
    total = torch.zeros((), dtype=torch.float64, device=vector.device)
    for part in vector.split(PART):
        total += in_float64(part)
    return total


def in_float64(vector: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vector, dtype=torch.float64).square()


def norm_over_ranks(shard: Tensor) -> float:
    """Of the vector that all ranks hold a shard of; the same on each of them. Waits for the device once.

    Twice where the norm is 0, tiny or infinite, of which every rank sees the same.
    """
    norm = ranks.all_sum_(squared_norm(shard)).sqrt().item()
    if norm < LEAST or norm == math.inf:
        norm = ranks.all_sum_(squared_norm_in_float64(shard)).sqrt().item()
    return norm
