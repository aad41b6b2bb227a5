"""Block-diagonal matrices, kept as a stack of their blocks: (dimension / d, d, d).

They wrap the sparse core on both sides. The block size d is the knob between accuracy and latency: multiplying a vector
of n entries costs n·d multiplications, and storing the matrix n·d numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["by_column", "condition", "expand", "identity", "multiply"]


def identity(dimension: int, block_size: int, **options) -> Tensor:
    """The identity of size `dimension`, as blocks; `options` are those of torch.eye."""
    return torch.eye(block_size, **options).repeat(dimension // block_size, 1, 1)


def multiply(blocks: Tensor, x: Tensor) -> Tensor:
    """y = D x for every vector in the last dimension of `x` (..., dimension), D being block diagonal."""
    count, size, _ = blocks.shape
    y = torch.matmul(x.reshape(-1, count, size).transpose(0, 1), blocks.transpose(1, 2))  # (count, rows, size)
    return y.transpose(0, 1).reshape(x.shape)


def by_column(x: Tensor, size: int) -> Tensor:
    """x (rows, columns) as the blocks of a matrix on its right meet it: (columns / d, rows, d)."""
    return x.view(x.shape[0], -1, size).transpose(0, 1)


def expand(blocks: Tensor) -> Tensor:
    """The dense (dimension, dimension) matrix."""
    return torch.block_diag(*blocks)


def condition(blocks: Tensor) -> Tensor:
    """The condition number of every block (dimension / d,), in the 2-norm, float64; 1e16 for a singular one."""
    values = torch.linalg.svdvals(blocks.double())
    return (values[:, 0] / values[:, -1]).nan_to_num(1e16).clamp_max(1e16)
