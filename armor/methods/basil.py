"""3BASiL keeps W as S + U·V, both chosen by what they do to the output. It needs Gram matrices.

With H = XXᵀ the output error of a change E of the weight is the trace of E H Eᵀ. The alternating direction method of
multipliers (ADMM) has three blocks: S is free and solves a ridge regression, U·V is the truncated singular value
decomposition of (W − S) H^½, taken back by H^-½, and a copy of S has the pattern. A penalty ρ pulls S and its copy
together. It grows while the pattern changes, fast or slowly by how much, and the search ends when the pattern stays.
Then S is fitted on the pattern by conjugate gradients, in turn with U·V, and the output error falls with each turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from armor.core.pattern import PatternLike
from armor.methods import method

if TYPE_CHECKING:
    from torch import Tensor

    from armor.core.factorization import Factorization

PENALTY = 0.1  # the first ρ, H having a diagonal of ones
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # of ρ, by the share of the pattern that changed; ALPS's
LOOK = 3  # iterations between two looks at the pattern
ITERATIONS = 300  # at most
TURNS = 8  # of S and U·V, once the pattern stays
CONJUGATE = 10  # steps of conjugate gradients in a turn


def _peak_bytes(shape: tuple[int, int], itemsize: int, *, pattern: PatternLike, rank: int) -> int:
    """That of the search: S, its copy, duals and the sorting of groups; the Gram matrix, its vectors and its roots."""
    rows, columns = shape
    return rows * columns * (itemsize + 57) + 21 * columns**2 + 16 * min(rank, *shape) * (rows + columns)


@method("3BASiL", source="Makni et al. 2026, arXiv 2603.01376", memory=_peak_bytes)
def basil(
    weight: Tensor,
    importance: Tensor,
    gram: Tensor,
    *,
    pattern: PatternLike = "2:4",
    rank: int = 64,
    seed: int = 0,
) -> Factorization:
    """Split weight (out, in) under gram (in, in), the mean of x xᵀ, into a core and a pair of rank `rank`.

    importance (in,) serves only the loss. Any float dtype; computed in float32, the roots of the Gram matrix in
    float64. The rule for ρ is that of ALPS (Meng et al. 2024, arXiv 2406.07831). Raises ValueError for bad input.
    """
    import torch

    from armor.core.pattern import top_n_mask
    from armor.methods.solver.low_rank import alternated, basis_of, shared, stored
    from armor.methods.solver.objective import check
    from armor.methods.sparsegpt import damped

    pattern = check(weight, importance, pattern)
    h, dead = damped(gram.to(weight.device), weight.shape[1])
    d = h.diagonal().sqrt()
    h = h / d / d[:, None]  # with a diagonal of ones: an entry of W·d counts by its size
    values, vectors = torch.linalg.eigh(h)
    root, back = ((vectors * values**power @ vectors.T).float() for power in (0.5, -0.5))
    h, d, values, vectors = (x.float() for x in (h, d, values, vectors))
    target = weight.float().masked_fill(dead, 0) * d

    def low_rank(sparse: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """U and V beside a sparse part."""
        outer = (target - sparse) @ root
        basis = alternated(outer, basis)
        return basis, basis.T @ outer @ back

    mask = top_n_mask(target.square(), pattern)
    sparse = torch.where(mask, target, 0)
    pair = low_rank(sparse, basis_of((target - sparse) @ root, rank, seed))
    dual, penalty, seen = torch.zeros_like(target), PENALTY, mask
    for iteration in range(1, ITERATIONS + 1):
        free = (target - pair[0] @ pair[1]) @ h - dual + penalty * sparse
        free = free @ vectors / (values + penalty) @ vectors.T
        pair = low_rank(free, pair[0])
        free += dual / penalty
        mask = top_n_mask(free.square(), pattern)
        sparse = torch.where(mask, free, 0)
        dual = penalty * (free - sparse)
        if iteration % LOOK == 0:
            changed = float((mask != seen).sum() / mask.sum())
            if not changed:
                break
            penalty *= next(growth for least, growth in GROWTH if changed >= least)
            seen = mask
    for _ in range(TURNS):
        sparse = _fitted(target - pair[0] @ pair[1], sparse, mask, h)
        pair = low_rank(sparse, pair[0])
    return stored(weight, importance, pattern, sparse / d, mask, shared(pair[0], pair[1] / d))


def _fitted(target: Tensor, sparse: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """`sparse` (out, in), closer to target under `gram` on its mask: conjugate gradients for every row by itself."""
    rest = (target - sparse) @ gram * mask
    step, size = rest, rest.square().sum(1, keepdim=True)
    for _ in range(CONJUGATE):
        image = step @ gram * mask
        length = size / (step * image).sum(1, keepdim=True).clamp_min(1e-30)
        sparse, rest = sparse + length * step, rest - length * image
        before, size = size, rest.square().sum(1, keepdim=True)
        step = rest + size / before.clamp_min(1e-30) * step
    return sparse
