"""What a run takes at its peak, in bytes, from shapes alone, so that a card too small is refused early.

Two moments can be the peak: the work itself, and the end. There the factors to be stored are compared in float64 with
those of the start, in pieces of a bounded size. Counts are those of the code, in bytes an entry; a test holds them to
what is measured. No torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["PIECE", "pruning_bytes", "rounding_bytes"]

PIECE = 1 << 22
"""Entries of the float64 pieces in which the loss is summed: 32 MB each."""


def pruning_bytes(scoring: int) -> Callable[..., int]:
    """The peak of a method of pruning; `scoring` is the bytes an entry of scores, sorted scores and places.

    It is 16 for scores in float32, 24 in float64.
    """

    def peak(shape: tuple[int, int], itemsize: int, **settings: Any) -> int:
        entries = shape[0] * shape[1]
        stored = itemsize + 1  # a core and its mask
        return entries * itemsize + max(entries * (stored + scoring), entries * 2 * stored + 24 * min(entries, PIECE))

    return peak


def rounding_bytes(shape: tuple[int, int], itemsize: int, **settings: Any) -> int:
    """The peak of a method that rounds every weight to the nearest; what is stored is a byte and its mask."""
    entries = shape[0] * shape[1]
    normalised, multiplied_out = entries * 16, entries * 8 + 24 * min(entries, PIECE)
    return entries * (itemsize + 2) + max(normalised, multiplied_out)
