"""OATS keeps W as S + U·V: a sparse core and a pair of low rank, in turn the best for what the other leaves.

Errors are weighed by the root of the input's mean square, W·D, as in Wanda. There the best U·V for W − S is a truncated
singular value decomposition, and the best S for W − U·V keeps the largest of each group. So the weighted error falls
from alternation to alternation. With rank 0 it is Wanda.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from armor.core.pattern import PatternLike
from armor.methods import method

if TYPE_CHECKING:
    from torch import Tensor

    from armor.core.factorization import Factorization

ALTERNATIONS = 80  # the paper's


def _peak_bytes(shape: tuple[int, int], itemsize: int, *, pattern: PatternLike, rank: int) -> int:
    """That of the search: W·D, what is left, W·D − S and the sorting of groups; a few copies of the pair."""
    return shape[0] * shape[1] * (itemsize + 54) + 16 * min(rank, *shape) * sum(shape)


@method("OATS", source="Zhang and Papyan 2024, arXiv 2409.13652", memory=_peak_bytes)
def oats(
    weight: Tensor, importance: Tensor, *, pattern: PatternLike = "2:4", rank: int = 64, seed: int = 0
) -> Factorization:
    """Split weight (out, in) under importance (in,) into a core and a pair of rank `rank`, any float dtype.

    Computed in float32. Raises ValueError for bad input.
    """
    import torch

    from armor.core.pattern import top_n_mask
    from armor.methods.solver.low_rank import alternated, basis_of, shared, stored
    from armor.methods.solver.objective import check

    pattern = check(weight, importance, pattern)
    d = importance.float().to(weight.device)
    d = d.clamp_min(1e-8 * d.amax()).sqrt() if d.any() else torch.ones_like(d)
    target = weight.float() * d
    up = basis_of(target, rank, seed)
    down = up.T @ target
    for _ in range(ALTERNATIONS - 1):
        rest = target - up @ down
        beside = torch.where(top_n_mask(rest.square(), pattern), target - rest, target)  # W·D − S
        up = alternated(beside, up)
        down = up.T @ beside
    up, down = (part.to(weight.dtype).float() for part in shared(up, down / d))
    core = weight.float() - up @ down
    return stored(weight, importance, pattern, core, top_n_mask((core * d).square(), pattern), (up, down))
