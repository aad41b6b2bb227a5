"""Fit A, S and B to the output of their linear: the mask stays, and ‖(W − A·S·B) X‖² falls.

With H = XXᵀ and E = W − A·S·B this error is the trace of E H Eᵀ, quadratic in each factor while the other two stay. So
they take turns. S and B take some steps of conjugate gradients from where they are, A one of Newton's, for its normal
equations are small: d × d for each block. The gradients are −Aᵀ E H Bᵀ on the mask, −E H (S B)ᵀ and −(A S)ᵀ E H. Each
is preconditioned by the inverse of:

- for S, the diagonals of AᵀA and of B H Bᵀ
- for A, (S B) H (S B)ᵀ by block, exact but for a ridge
- for B, (A S)ᵀ(A S) on the left and H on the right, both by block

But for rounding the error falls with every turn. Most of what can be had comes with the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from armor.core import blockdiag
from armor.core.factorization import Factorization
from armor.methods.solver.annealed import by_column

__all__ = ["fitted", "output_error"]

ROUNDS = 6
STEPS = 10  # of conjugate gradients, of S and of B in every round
RIDGE = 1e-6  # of a diagonal of ones, in curvatures that are inverted

Divide = Callable[[Tensor], Tensor]


def fitted(
    weight: Tensor, gram: Tensor, factors: Factorization, rounds: int = ROUNDS, steps: int = STEPS
) -> tuple[Tensor, Tensor, Tensor]:
    """A (out/d, d, d) float64, S (out, in) and B (in/d, d, d) float32, from the `factors` of weight, on their mask.

    weight (out, in), gram (in, in) symmetric and positive definite, any float dtype. Computed in float32.
    """
    assert factors.left is not None and factors.right is not None
    tops = [float(part.abs().amax()) or 1.0 for part in (factors.left, factors.core, factors.right)]
    a, s, b = (
        x.double().div(top).float() for x, top in zip((factors.left, factors.core, factors.right), tops, strict=True)
    )
    scale = math.prod(tops)
    h, mask = gram.float(), factors.mask.float()
    wanted = weight.double().div(scale).float() @ h
    for _ in range(rounds):
        s = _fitted_core(wanted, h, (a, s, b), mask, steps)
        a = _fitted_left(wanted, h, a, _right(s, b))
        b = _fitted_right(wanted, h, _left(a, s), b, steps)
    return a.double() * scale, s, b


def output_error(weight: Tensor, gram: Tensor, factors: Factorization) -> float:
    """The trace of E H Eᵀ of `factors` as they are stored, by the square of weight's largest entry.

    weight (out, in), gram (in, in).
    """
    top = float(weight.abs().amax()) or 1.0
    error = (weight.float() - factors.reconstruct()) / top
    return float((error @ gram.float()).mul_(error).sum(dtype=torch.float64))


def _left(blocks: Tensor, x: Tensor) -> Tensor:
    """diag(blocks) x"""
    return torch.bmm(blocks, x.view(*blocks.shape[:2], -1)).view(x.shape)


def _right(x: Tensor, blocks: Tensor) -> Tensor:
    """x diag(blocks)"""
    return blockdiag.multiply(blocks.transpose(1, 2), x)


def _fitted_core(wanted: Tensor, h: Tensor, factors: tuple[Tensor, Tensor, Tensor], mask: Tensor, steps: int) -> Tensor:
    """S (out, in); wanted is W H (out, in). The block rows of A are problems of their own."""
    a, s, b = factors
    through, rows = b.transpose(1, 2), a.shape[:2]
    curvature = _right(_right(h, through).T.contiguous(), through)  # B H Bᵀ
    of_rows = a.transpose(1, 2) @ a
    diagonal = of_rows.diagonal(dim1=1, dim2=2)[:, :, None] * curvature.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    kept = mask.view(*rows, -1)
    return _conjugate_gradients(
        s.view(*rows, -1),
        _left(a.transpose(1, 2), _right(wanted, through)).view(*rows, -1) * kept,
        lambda x: torch.bmm(of_rows, x @ curvature) * kept,
        lambda x: x * inverse,
        steps,
        dims=(1, 2),
    ).view(s.shape)


def _fitted_left(wanted: Tensor, h: Tensor, a: Tensor, product: Tensor) -> Tensor:
    """A (out/d, d, d); product is S B (out, in)."""
    rows = a.shape[:2]
    z, image = product.view(*rows, -1), (product @ h).view(*rows, -1)
    curvature = image @ z.transpose(1, 2)
    gradient = wanted.view(*rows, -1) @ z.transpose(1, 2) - a @ curvature
    return a + _divider(curvature)(gradient.transpose(1, 2)).transpose(1, 2)


def _fitted_right(wanted: Tensor, h: Tensor, product: Tensor, b: Tensor, steps: int) -> Tensor:
    """B (in/d, d, d); product is A S (out, in)."""
    size = b.shape[1]
    y = by_column(product, size).transpose(1, 2).contiguous()  # (in/d, d, out)
    by_block = torch.stack([h[start : start + size, start : start + size] for start in range(0, len(h), size)])
    of_left, of_right = _divider(y @ y.transpose(1, 2)), _divider(by_block)
    return _conjugate_gradients(
        b,
        torch.bmm(y, by_column(wanted, size)),
        lambda x: torch.bmm(y, by_column(_right(product, x) @ h, size)),
        lambda x: of_right(of_left(x).transpose(1, 2)).transpose(1, 2),
        steps,
        dims=(0, 1, 2),
    )


def _divider(curvature: Tensor) -> Divide:
    """A function that gives (curvature + ridge)⁻¹ x, x (count, d, k); curvature (count, d, d) is semidefinite.

    The ridge is as small as Cholesky's decomposition allows.
    """
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 1)[:, :, None]
    scaled = (curvature * scale * scale.transpose(1, 2)).double()
    ones = torch.eye(curvature.shape[1], dtype=torch.float64, device=curvature.device)
    ridge = RIDGE
    root, info = torch.linalg.cholesky_ex(scaled + ridge * ones)
    while info.any() and ridge < 1:
        ridge *= 10
        root, info = torch.linalg.cholesky_ex(scaled + ridge * ones)
    root = root.float()
    return lambda x: torch.cholesky_solve(x * scale, root) * scale


def _conjugate_gradients(
    x: Tensor, goal: Tensor, curved: Divide, divided: Divide, steps: int, dims: tuple[int, ...]
) -> Tensor:
    """x (count, d, k) nearer to where `curved` of it is the goal; `divided` is an approximate inverse of `curved`.

    A problem spans the dimensions `dims`, and what is along the others are problems of their own.
    """

    def dot(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(dims, keepdim=True)

    def ratio(top: Tensor, bottom: Tensor) -> Tensor:
        return torch.where(bottom > 0, top / bottom, 0)  # zero, and less by rounding, where nothing is left to do

    rest = goal - curved(x)
    direction = divided(rest)
    size = dot(rest, direction)
    for _ in range(steps):
        image = curved(direction)
        length = ratio(size, dot(direction, image))
        x, rest = x + length * direction, rest - length * image
        scaled = divided(rest)
        before, size = size, dot(rest, scaled)
        direction = scaled + ratio(size, before) * direction
    return x
