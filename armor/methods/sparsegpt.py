"""SparseGPT prunes column by column and lets the columns to come make up for the error. It needs Gram matrices.

With H = XXᵀ the output error of a row w is quadratic. The optimal brain surgeon's step (Hassibi and Stork 1993) says
how the others should move when entry j becomes zero: by −w_j [H⁻¹]_j / [H⁻¹]_jj, at the cost w_j² / [H⁻¹]_jj. Going
from left to right, H is that of the columns not yet passed. One Cholesky factor has the inverses of all of these. With
H⁻¹ = Uᵀ U the row U_j holds [H⁻¹]_j / √[H⁻¹]_jj of the columns from j on. So one factor serves all rows and all steps.
Masks are chosen when a group is reached, by cost, from weights that have moved already. Updates beyond 128 columns wait
until the 128 are done and are then one matrix product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from armor.core.pattern import PatternLike
from armor.methods import method
from armor.methods.solver.memory import PIECE

if TYPE_CHECKING:
    from torch import Tensor

    from armor.core.factorization import Factorization

DAMPING = 0.01  # of the mean diagonal of H
WIDTH = 128  # columns between two products; with a percentage also the columns that share their quota


def peak_bytes(shape: tuple[int, int], itemsize: int, *, pattern: PatternLike) -> int:
    """That of the Gram matrix and its inverse factor, of which a float64 copy and two results; or that of the end."""
    rows, columns = shape
    entries = rows * columns
    start = 32 * columns**2 + entries * (itemsize + 4)
    kept = 8 * columns**2 + entries * (itemsize + 5)
    return max(start, kept + max(entries * 16, entries * (2 * itemsize + 1) + 24 * min(entries, PIECE)))


@method("SparseGPT", source="Frantar and Alistarh 2023, arXiv 2301.00774", memory=peak_bytes)
def sparsegpt(weight: Tensor, importance: Tensor, gram: Tensor, *, pattern: PatternLike = "2:4") -> Factorization:
    """Prune weight (out, in) under gram (in, in), the mean of x xᵀ; importance (in,) serves only the loss.

    Any float dtype; computed in float32, the inverse in float64. A percentage keeps its share of every row, spread
    evenly over runs of 128 columns. Raises ValueError for bad input.
    """
    import torch

    from armor.core.factorization import Factorization
    from armor.core.pattern import top_n_mask
    from armor.methods.solver.objective import Objective, check, relative_loss

    pattern = check(weight, importance, pattern)
    columns = weight.shape[1]
    w = weight.float()
    upper, dead = inverse_factor(gram.to(w.device), columns)
    w = w.masked_fill(dead, 0)
    kept, m = pattern.group(columns)
    width = max(WIDTH // m, 1) * m if pattern.m else WIDTH
    mask = torch.zeros_like(w, dtype=torch.bool)
    for start in range(0, columns, width):
        end = min(start + width, columns)
        block, u = w[:, start:end], upper[start:end, start:end]
        errors = torch.zeros_like(block)
        group = m if pattern.m else end - start
        n = kept if pattern.m else end * kept // columns - start * kept // columns
        for j in range(end - start):
            if j % group == 0:
                here = slice(j, j + group)
                cost = block[:, here].square() / u.diagonal()[here].square()
                chosen = cost.argsort(dim=1, descending=True, stable=True)[:, :n]
                mask[:, start:end][:, here].scatter_(1, chosen, True)
            pruned = block[:, j].masked_fill(mask[:, start + j], 0)
            errors[:, j] = pruned / u[j, j]
            block[:, j] -= pruned
            block[:, j + 1 :] -= errors[:, j, None] * u[j, j + 1 :]
        w[:, end:] -= errors @ upper[start:end, end:]
    objective = Objective.of(weight, importance)
    start_mask = top_n_mask(objective.score(weight), pattern)
    plain = Factorization(torch.where(start_mask, weight, 0), start_mask, pattern)
    found = Factorization(w.to(weight.dtype), mask, pattern)
    losses = [relative_loss(weight, objective, each) for each in (found, plain)]
    return Factorization(found.core, mask, pattern, loss=losses[0], start_loss=losses[1])


def inverse_factor(gram: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """U (in, in) float32, upper triangular, Uᵀ U the inverse of the damped gram (in, in), and the dead inputs (in,).

    Raises ValueError where `damped` does.
    """
    import torch

    h, dead = damped(gram, columns)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True).float(), dead


def damped(gram: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """gram (in, in) with a larger diagonal, float64, so that it has an inverse, and the dead inputs (in,).

    An input that is always zero is dead: its weights do nothing and become zero. Raises ValueError where `check_gram`
    does.
    """
    import torch

    check_gram(gram, columns)
    h = gram.to(torch.float64, copy=True)
    diagonal = h.diagonal()
    dead = diagonal == 0
    diagonal += DAMPING * diagonal.sum() / max(int((~dead).sum()), 1)  # of the mean of those that fire
    diagonal[dead] = 1
    return h, dead


def check_gram(gram: Tensor, columns: int) -> None:
    """Raises ValueError for a gram that is not (columns, columns) or not finite."""
    if gram.shape != (columns, columns) or not gram.isfinite().all():
        found = tuple(gram.shape) if gram.isfinite().all() else "NaN or infinity"
        raise ValueError(f"gram: found {found}, expected finite numbers of shape {(columns, columns)}")
