"""The proxy loss that every factorization method minimises and is judged by (NoWag, then ARMOR, arXiv 2510.05528).

Divide every column of W by its 2-norm, then every row by its own: W̄. With d_j the mean of x_j² over calibration
tokens, L = Σ (W̄ − Ŵ̄)²_ij d_j, reported relative to Σ W̄²_ij d_j. Equal rows weigh the same whatever their scale, and
a column counts by how strongly its input fires. In the weight's own scale this is a weighted squared error, Σ (W −
Ŵ)²_ij d_j / (r_i c_j)². So one float64 function, exact for every method and dtype, serves them all. Absorbing √d into
W̄ leaves a plain Frobenius problem, W~ = W̄·diag(√d), which is what the solvers see.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from armor.core import blockdiag
from armor.core.factorization import Factorization
from armor.core.pattern import Pattern, PatternLike, top_n_mask
from armor.methods.solver.memory import PIECE

__all__ = ["Objective", "balanced", "check", "condition", "finish", "relative_loss", "supports"]

_MOST_SUPPORTS = 70  # those of 4:8


@dataclass(frozen=True)
class Objective:
    """The scales of W = diag(row) W̄ diag(column), and d; all float64.

    row (out,) and column (in,) are the norms, 1 where a row or column is zero. importance (in,) is d, divided by its
    mean; the relative loss does not change, and nothing overflows.
    """

    row: Tensor
    column: Tensor
    importance: Tensor

    @classmethod
    def of(cls, weight: Tensor, importance: Tensor) -> Objective:
        """Normalise weight (out, in), importance (in,), any float dtype."""
        scale = weight.abs().amax().double().clamp_min(torch.finfo(torch.float64).tiny)  # norms of denormals underflow
        w = weight.double() / scale
        column = _nonzero(w.norm(dim=0))
        row = _nonzero(w.div_(column).norm(dim=1))
        d = importance.to(w.device, torch.float64)
        top = d.amax()
        d = d / top if top > 0 else torch.ones_like(d)
        return cls(row, column * scale, d / d.mean())

    def normal(self, weight: Tensor) -> Tensor:
        """W̄ (out, in) float32."""
        return (weight.double() / self.column).div_(self.row[:, None]).float()

    def score(self, weight: Tensor) -> Tensor:
        """W̄²·d (out, in) float32, by which NoWag ranks the entries of a group."""
        return self.normal(weight).mul_(self.importance.sqrt().float()).square_()


def _nonzero(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, norms, 1.0)


def check(weight: Tensor, importance: Tensor, pattern: PatternLike) -> Pattern:
    """Validate the inputs of a factorization and return the pattern. Raises ValueError naming what is wrong."""
    pattern = Pattern.parse(pattern)
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(f"weight: found {tuple(weight.shape)} {weight.dtype}, expected a float matrix (out, in)")
    if importance.shape != weight.shape[1:]:
        found = tuple(importance.shape)
        raise ValueError(f"importance: found shape {found}, expected ({weight.shape[1]},), one per input")
    for name, tensor in (("weight", weight), ("importance", importance)):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ValueError(f"{name}: found {bad} NaN or infinite of {tensor.numel()} entries, expected finite ones")
    if importance.min() < 0:
        raise ValueError(f"importance: found {importance.min().item():.3g}, expected mean squares, never negative")
    pattern.group(weight.shape[1])  # raises where no row can hold the pattern
    return pattern


def relative_loss(weight: Tensor, objective: Objective, factors: Factorization) -> float:
    """The relative proxy loss of `factors` as they are stored, in float64; 0 for a perfect fit, about 1 for zeros.

    The factors are multiplied in float64, in pieces of block rows. Where every weight counts for nothing the loss is 0.
    """
    rows, columns = weight.shape
    factors = factors.in_floats()
    left = factors.left
    size = left.shape[1] if left is not None else 1
    step = max(PIECE // columns // size, 1) * size
    scale = objective.importance.sqrt() / objective.column  # squared only where it has met a weight, or it overflows
    error = total = 0.0
    for start in range(0, rows, step):
        part = slice(start, start + step)
        exact = weight[part].to(torch.float64, copy=True)
        product = factors.core[part].double()
        if factors.right is not None:
            product = blockdiag.multiply(factors.right.double().transpose(1, 2), product)
        if left is not None:
            blocks = left[start // size : (start + step) // size].double()
            product = torch.bmm(blocks, product.view(-1, size, columns)).view(-1, columns)
        if factors.up is not None and factors.down is not None:
            product = product + factors.up[part].double() @ factors.down.double()
        row_scale = objective.row[part].square()
        error += float(((exact - product).mul_(scale).square_().sum(1) / row_scale).sum())
        total += float((exact.mul_(scale).square_().sum(1) / row_scale).sum())
    return error / total if total > 0 else 0.0


def supports(pattern: Pattern, device: torch.device | None = None) -> Tensor | None:
    """Every choice of n positions in a group (choices, n) int64, or None where there are too many to enumerate."""
    if pattern.m == 0 or math.comb(pattern.m, pattern.n) > _MOST_SUPPORTS:
        return None
    return torch.tensor(list(itertools.combinations(range(pattern.m), pattern.n)), device=device)


def balanced(a: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same product A·S·B, up to a scale, with columns of A and rows of B of norm 1: their norms go into S.

    a (out/d, d, d), s (out, in), b (in/d, d, d), each in its own dtype. Exact but for rounding; zeros of S stay zeros,
    and so does a column or row of zeros. Blocks whose columns differ by a factor of 1,000 can be neither trained nor
    rounded well. The largest norm of each side counts as 1, so that S cannot overflow.
    """
    columns, rows = _nonzero(a.norm(dim=1)), _nonzero(b.norm(dim=2))  # (out/d, d), (in/d, d)
    s = s * (columns / columns.max()).to(s.dtype).view(-1, 1)
    s.mul_((rows / rows.max()).to(s.dtype).view(1, -1))
    return a / columns[:, None] * columns.max(), s, b / rows[:, :, None] * rows.max()


def condition(factors: Factorization) -> float | None:
    """The worst condition number of the blocks of A and B, at most 1e16; None without blocks."""
    factors = factors.in_floats()
    sides = [side for side in (factors.left, factors.right) if side is not None]
    return max((float(blockdiag.condition(side).max()) for side in sides), default=None)


def finish(
    weight: Tensor,
    objective: Objective,
    pattern: Pattern,
    factors: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    trace: list[tuple[int, float, float]],
    block_sizes: tuple[int, int],
) -> Factorization:
    """The factorization to store: `factors` in the weight's own scale and dtype, or NoWag-P where that is no worse.

    factors are A (out/d, d, d), S (out, in), its mask, B (in/d, d, d) of the normalised weight. The norms of rows and
    columns go into A and B. A and B are balanced. Then the three factors get the same largest entry, the safest share
    of a narrow dtype.
    """
    mask = top_n_mask(objective.score(weight), pattern)
    options = {"dtype": weight.dtype, "device": weight.device}
    a, b = (blockdiag.identity(n, d, **options) for n, d in zip(weight.shape, block_sizes, strict=True))
    start = Factorization(torch.where(mask, weight, 0), mask, pattern, a, b)
    start_loss = loss = relative_loss(weight, objective, start)
    best = start
    if factors is not None:
        a, s, mask, b = factors
        a = a.double() * objective.row.view(len(a), -1, 1)
        b = b.double() * objective.column.view(len(b), 1, -1)
        a, s, b = balanced(a, s, b)
        tops = [float(x.abs().amax()) for x in (a, s, b)]
        if all(0 < top < math.inf for top in tops):
            share = math.prod(top ** (1 / 3) for top in tops)
            a, s, b = ((x * (share / top)).to(weight.dtype) for x, top in zip((a, s, b), tops, strict=True))
            found = Factorization(torch.where(mask, s, 0), mask, pattern, a, b)
            found_loss = relative_loss(weight, objective, found)
            if found_loss < start_loss:  # false for NaN
                best, loss = found, found_loss
    return replace(best, loss=loss, start_loss=start_loss, trace=trace)
