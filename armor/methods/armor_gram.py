"""ARMOR, fitted to the output: the search of `armor`, then A, S and B by what they do to the output. It needs Gram
matrices.

The proxy loss takes the inputs of a linear one by one. The Gram matrix has how they go together, so that one can make
up for another. The search weighs an error by the root of two mean squares, that of its input and that of what no other
input can make up for, 1 / [H⁻¹]_jj, as in SparseGPT. Then the factors are fitted on the mask that it found.

The promise of `armor` stays: where the fit would leave a proxy loss above NoWag-P's, or no lower output error in the
dtype that is stored, the factors of the search are returned, or NoWag-P's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from armor.core.pattern import PatternLike
from armor.methods import method
from armor.methods.armor import armor, obstacle, peak_bytes
from armor.methods.solver.settings import SolverSettings

if TYPE_CHECKING:
    from torch import Tensor

    from armor.core.factorization import Factorization


def _peak_bytes(
    shape: tuple[int, int], itemsize: int, *, pattern: PatternLike, block_size: int, solver: SolverSettings
) -> int:
    """That of the search, the Gram matrix beside it; or that of the fit, with what conjugate gradients hold."""
    rows, columns = shape
    entries, square = rows * columns, columns**2
    search = peak_bytes(shape, itemsize, pattern=pattern, block_size=block_size, solver=solver)
    return max(search + 4 * square, entries * (itemsize + 50) + 24 * square)


@method(
    "ARMOR, fitted to the output",
    source="Liu et al. 2025, arXiv 2510.05528; the fit is of this project",
    memory=_peak_bytes,
    obstacle=obstacle,
    instead="nowag",
)
def armor_gram(
    weight: Tensor,
    importance: Tensor,
    gram: Tensor,
    *,
    pattern: PatternLike = "2:4",
    block_size: int = 128,
    solver: SolverSettings = SolverSettings(),
    seed: int = 0,
) -> Factorization:
    """Factorize weight (out, in) under importance (in,) and gram (in, in), the mean of x xᵀ, any float dtype.

    Raises ValueError for bad input.
    """
    import torch

    from armor.methods.solver.objective import Objective, check, finish
    from armor.methods.solver.output import fitted, output_error
    from armor.methods.sparsegpt import damped

    check(weight, importance, pattern)
    h, dead = damped(gram.to(weight.device), weight.shape[1])
    objective, target = Objective.of(weight, importance), weight.float().masked_fill(dead, 0)
    alone = 1 / torch.cholesky_inverse(torch.linalg.cholesky(h)).diagonal()
    between = (importance.to(h) * alone).sqrt()
    found = armor(weight, between, pattern=pattern, block_size=block_size, solver=solver, seed=seed)
    assert found.left is not None and found.right is not None
    candidates = []
    for a, s, b in ((found.left, found.core, found.right), fitted(target, h, found)):
        factors = a / objective.row.view(len(a), -1, 1), s, found.mask, b / objective.column.view(len(b), 1, -1)
        candidates.append(finish(weight, objective, found.pattern, factors, found.trace, (a.shape[1], b.shape[1])))
    return min(candidates, key=lambda each: output_error(target, h, each))
