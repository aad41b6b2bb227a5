"""How large the blocks of A and B are for a weight of some shape. Free of torch: the workflow plans by it."""

from __future__ import annotations

from collections.abc import Sequence

from armor.core.pattern import Pattern

__all__ = ["block_size_for", "sizes"]


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
