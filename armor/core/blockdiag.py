"""Block-diagonal matrices, kept as a stack of their blocks: (dimension / d, d, d).

They wrap the sparse core on both sides. The block size d is the knob between accuracy and latency: multiplying a vector
of n entries costs n·d multiplications, and storing the matrix n·d numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from armor.core.pattern import Pattern

__all__ = ["block_size_for", "condition", "expand", "identity", "multiply", "sizes"]


def block_size_for(dimension: int, requested: int, multiple_of: int = 1) -> int | None:
    """The largest divisor of `dimension` that is at most `requested` and a multiple of `multiple_of`, or None."""
    start = min(requested, dimension) // multiple_of * multiple_of
    return next((d for d in range(start, 0, -multiple_of) if dimension % d == 0), None)


def sizes(shape: Sequence[int], pattern: Pattern, block_size: int) -> tuple[int, int]:
    """The block sizes of A and B for a weight of `shape` (out, in): divisors at most `block_size`, B's a multiple of m.

    A block of B holds whole groups. Where it cannot (block_size below m), both are 1: plain pruning with scales.
    """
    if block_size < 1:
        raise ValueError(f"block_size: found {block_size}, expected at least 1")
    left, right = block_size_for(shape[0], block_size), block_size_for(shape[1], block_size, max(pattern.m, 1))
    return (left, right) if left and right else (1, 1)


def identity(dimension: int, block_size: int, **options) -> Tensor:
    """The identity of size `dimension`, as blocks; `options` are those of torch.eye."""
    return torch.eye(block_size, **options).repeat(dimension // block_size, 1, 1)


def multiply(blocks: Tensor, x: Tensor) -> Tensor:
    """y = D x for every vector in the last dimension of `x` (..., dimension), D being block diagonal."""
    count, size, _ = blocks.shape
    y = torch.matmul(x.reshape(-1, count, size).transpose(0, 1), blocks.transpose(1, 2))  # (count, rows, size)
    return y.transpose(0, 1).reshape(x.shape)


def expand(blocks: Tensor) -> Tensor:
    """The dense (dimension, dimension) matrix."""
    return torch.block_diag(*blocks)


def condition(blocks: Tensor) -> Tensor:
    """The condition number of every block (dimension / d,), in the 2-norm, float64; 1e16 for a singular one."""
    values = torch.linalg.svdvals(blocks.double())
    return (values[:, 0] / values[:, -1]).nan_to_num(1e16).clamp_max(1e16)
