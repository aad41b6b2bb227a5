"""ARMOR keeps W as A·S·B: a sparse core S between block-diagonal A and B, found by minimizing a layer-wise proxy loss.

The loss never ends above that of NoWag-P, from which the search starts: the solver returns the better of the two. The
blocks cost d/in + d/out numbers for each weight. `armor.methods.solver` has the optimisers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from armor.core.blocksizes import sizes
from armor.core.pattern import Pattern, PatternLike
from armor.methods import method
from armor.methods.solver.memory import PIECE
from armor.methods.solver.settings import SolverSettings

if TYPE_CHECKING:
    from torch import Tensor

    from armor.core.factorization import Factorization


def peak_bytes(
    shape: tuple[int, int], itemsize: int, *, pattern: PatternLike, block_size: int, solver: SolverSettings
) -> int:
    """That of the search, with all its matrices, for large weights; that of the end for small ones."""
    rows, columns = shape
    entries, pattern = rows * columns, Pattern.parse(pattern)
    left, right = sizes(shape, pattern, block_size)
    blocks = 20 * (rows * left + columns * right)  # five copies of A and B: the iterate, the best, momentum, inverses
    # The best S and its mask, NoWag-P's, S once scaled and once masked; the pieces of exact, product and difference.
    end = entries * (itemsize + 5 + itemsize + 1 + 2 * itemsize) + 32 * min(entries, PIECE) + blocks
    if solver.algorithm == "published":  # W~, S, gradient, two moments and four buffers stay until the end
        return end + entries * 37 + blocks
    # W~, S, its momentum, its best copy, three buffers, two masks; 72 bytes for a group that the mask search looks at.
    group, parts = pattern.m or right, max(4, 2 * (entries >> 22))
    return max(end, entries * (itemsize + 33) + 72 * entries // (group * parts) + blocks)


def obstacle(shape: tuple[int, int], *, pattern: PatternLike, block_size: int, solver: SolverSettings) -> str | None:
    if block_size > 1 and 1 in sizes(shape, Pattern.parse(pattern), block_size):
        return f"no blocks of at most {block_size} fit a {shape[0]} x {shape[1]} weight and {pattern}"
    return None


@method("ARMOR", source="Liu et al. 2025, arXiv 2510.05528", memory=peak_bytes, obstacle=obstacle, instead="nowag")
def armor(
    weight: Tensor,
    importance: Tensor,
    *,
    pattern: PatternLike = "2:4",
    block_size: int = 128,
    solver: SolverSettings = SolverSettings(),
    seed: int = 0,
) -> Factorization:
    """Factorize weight (out, in) under importance (in,), any float dtype. Raises ValueError for bad input."""
    from armor.methods.solver import annealed, published

    sizes: dict[str, Any] = {"pattern": pattern, "block_size": block_size, "seed": seed}
    if solver.algorithm == "fast":
        return annealed.solve(weight, importance, settings=annealed.Settings(solver.iterations), **sizes)
    chosen = published.Settings(solver.iterations)
    if solver.selection:
        chosen = replace(chosen, selection=solver.selection)
    return published.solve(weight, importance, settings=chosen, **sizes)
