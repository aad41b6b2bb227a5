"""A pair U·V of low rank beside a sparse core: what the methods of sparse plus low rank have in common.

In a space where the error is a plain sum of squares the best U·V for a matrix M is its truncated singular value
decomposition. Between two alternations M moves little. So it is not decomposed anew: a step of subspace iteration from
the basis of U before takes its place. V is fitted to that basis, a new basis to V, and V to it: each is a least squares
fit with the rest as it is, and the error never rises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from armor.core.factorization import Factorization
from armor.core.pattern import Pattern, top_n_mask
from armor.methods.solver.objective import Objective, relative_loss

__all__ = ["alternated", "basis_of", "shared", "stored"]

STEPS = 4
"""Of subspace iteration, where there is no basis yet."""


def basis_of(target: Tensor, rank: int, seed: int) -> Tensor:
    """An orthonormal basis (out, r) of nearly the best r = min(rank, out, in) columns for target (out, in) float32.

    From random directions (Halko et al. 2011, Alg. 4.4).
    """
    generator = torch.Generator(target.device).manual_seed(seed)
    size = (target.shape[1], min(rank, *target.shape))
    basis = torch.linalg.qr(target @ torch.randn(size, generator=generator, device=target.device))[0]
    for _ in range(STEPS):
        basis = alternated(target, basis)
    return basis


def alternated(target: Tensor, basis: Tensor) -> Tensor:
    """The basis (out, r) after one step of subspace iteration on target (out, in)."""
    return torch.linalg.qr(target @ (target.T @ basis))[0]


def shared(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The product of up (out, r) and down (r, in), as a pair whose columns and rows have the same norms.

    Up to a rotation of the r channels it is any other pair of this product. These are the singular ones.
    """
    basis, small = torch.linalg.qr(up)
    left, values, right = torch.linalg.svd(small @ down, full_matrices=False)
    root = values.sqrt()
    return basis @ left * root, root[:, None] * right


def stored(
    weight: Tensor, importance: Tensor, pattern: Pattern, core: Tensor, mask: Tensor, pair: tuple[Tensor, Tensor]
) -> Factorization:
    """The factorization to store, in the weight's dtype, with its loss under importance (in,) and that of NoWag-P.

    core (out, in) under mask, and the pair (out, r), (r, in); without one where r is 0.
    """
    objective = Objective.of(weight, importance)
    start_mask = top_n_mask(objective.score(weight), pattern)
    start = Factorization(torch.where(start_mask, weight, 0), start_mask, pattern)
    up, down = (part.to(weight.dtype).contiguous() if part.numel() else None for part in pair)
    core = torch.where(mask, core, 0).to(weight.dtype)
    losses = [
        relative_loss(weight, objective, x) for x in (Factorization(core, mask, pattern, up=up, down=down), start)
    ]
    return Factorization(core, mask, pattern, loss=losses[0], start_loss=losses[1], up=up, down=down)
