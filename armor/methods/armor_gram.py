"""ARMOR-Gram is ARMOR for the output of a linear: after the search it fits A, S and B by the Gram matrix of the inputs.

The proxy loss takes the inputs of a linear one by one. The Gram matrix H has their correlations, so an error in one
weight can be cancelled by others. The search weighs an error by the root of two mean squares, that of its input and
that of what no other input can make up for, 1 / [H⁻¹]_jj, as in SparseGPT. Then the factors are fitted on the mask that
it found. As in SparseGPT, 1% of the mean of H's diagonal is added to it.

The promise of `armor` stays. Of the fit and the search the one with the lower output error is returned, as stored. One
whose proxy loss is above NoWag-P's does not count. NoWag-P's factors take its place.

A budget of bits tries `armor` in its place. What the fit cancels is not seen in errors of single weights, and the
choices for `armor` were found to serve as well (docs/RESULTS.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from armor.core.pattern import PatternLike
from armor.methods import method
from armor.methods.armor import armor, obstacle, peak_bytes
from armor.methods.solver.settings import SolverSettings
from armor.methods.sparsegpt import check_gram

if TYPE_CHECKING:
    from torch import Tensor

    from armor.core.factorization import Factorization


def _peak_bytes(
    shape: tuple[int, int], itemsize: int, *, pattern: PatternLike, block_size: int, solver: SolverSettings
) -> int:
    """That of H's inverse, of the search, or of the fit, with what conjugate gradients hold."""
    rows, columns = shape
    entries, square = rows * columns, columns**2
    inverse = entries * itemsize + 32 * square
    search = peak_bytes(shape, itemsize, pattern=pattern, block_size=block_size, solver=solver) + 8 * square
    return max(inverse, search, entries * (itemsize + 57) + 20 * square)


@method(
    "ARMOR-Gram",
    source="Liu et al. 2025, arXiv 2510.05528; the fit is of this project",
    memory=_peak_bytes,
    obstacle=obstacle,
    instead="nowag",
    priced_by="armor",
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

    Without a trace, for that of the search is of another loss. Raises ValueError for bad input.
    """
    from dataclasses import replace

    from armor.methods.solver.objective import Objective, check, finish, relative_loss
    from armor.methods.solver.output import fitted, output_error

    check(weight, importance, pattern)
    check_gram(gram, weight.shape[1])
    h, between = _weighed(gram.to(weight.device), importance.to(weight.device))
    found = armor(weight, between, pattern=pattern, block_size=block_size, solver=solver, seed=seed)
    objective = Objective.of(weight, importance)
    found = replace(found, loss=relative_loss(weight, objective, found), trace=[])
    a, s, b = fitted(weight, h, found)
    a, b = a / objective.row.view(len(a), -1, 1), b / objective.column.view(len(b), 1, -1)
    factors, sizes = (a, s, found.mask, b), (a.shape[1], b.shape[1])
    fit = finish(weight, objective, found.pattern, factors, [], sizes)
    found = replace(found, start_loss=fit.start_loss)
    candidates = [fit, found] if found.loss <= fit.start_loss else [fit]
    return min(candidates, key=lambda each: output_error(weight, h, each))


def _weighed(gram: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """H (in, in) float32 as `damped` has it, and what the search weighs errors by (in,)."""
    import torch

    from armor.methods.solver.output import damped

    h = damped(gram)
    root, info = torch.linalg.cholesky_ex(h)
    if info:
        raise ValueError("gram: not a Gram matrix, for it has negative eigenvalues; calibrate again")
    h = h.float()
    alone = 1 / torch.cholesky_inverse(root).diagonal()
    return h, (importance.double() * alone).sqrt()
