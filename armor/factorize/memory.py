"""How much memory a factorization takes at its peak, from shapes alone, so that a card too small is refused early.

Two moments can be the peak: the search, with all its matrices, and the end, where the factors to be stored are compared
in float64 with those of the start, in pieces of a bounded size. Small weights peak at the end, large ones in the
search. The counts are those of the code, in bytes an entry; a test holds them to what is measured.
"""

from __future__ import annotations

from armor.config import ModuleSettings
from armor.core.nm import Pattern
from armor.factorize.objective import PIECE, sizes

__all__ = ["peak_bytes"]


def peak_bytes(shape: tuple[int, int], itemsize: int, settings: ModuleSettings) -> int:
    """The peak of `settings.method` on a weight of `shape` (out, in), `itemsize` bytes an entry, weight included."""
    rows, columns = shape
    entries = rows * columns
    piece = min(entries, PIECE)
    stored = itemsize + 1  # a core and its mask
    if settings.method == "dense":
        return 0
    if (
        settings.method == "sparsegpt"
    ):  # the Gram matrix and its inverse factor, of which a float64 copy and two results
        start = 32 * columns**2 + entries * (itemsize + 4)
        kept = 8 * columns**2 + entries * (itemsize + 5)
        return max(start, kept + max(entries * 16, entries * (2 * itemsize + 1) + 24 * piece))
    if settings.method != "armor":
        rank = {"wanda": 24}.get(settings.method, 16)  # scores, sorted scores, places; Wanda's scores are float64
        return entries * itemsize + max(entries * (stored + rank), entries * 2 * stored + 24 * piece)
    pattern = Pattern.parse(settings.pattern)
    left, right = sizes(shape, pattern, settings.block_size)
    blocks = 20 * (rows * left + columns * right)  # five copies of A and B: the iterate, the best, momentum, inverses
    # The best S and its mask, NoWag-P's, S once scaled and once masked; the pieces of exact, product and difference.
    end = entries * (itemsize + 5 + stored + 2 * itemsize) + 32 * piece + blocks
    if settings.solver.algorithm == "published":  # W~, S, gradient, two moments and four buffers stay until the end
        return end + entries * 37 + blocks
    # W~, S, its momentum, its best copy, three buffers, two masks; 72 bytes for a group that the mask search looks at.
    group, parts = pattern.m or right, max(4, 2 * (entries >> 22))
    return max(end, entries * (itemsize + 33) + 72 * entries // (group * parts) + blocks)
