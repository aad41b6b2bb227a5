"""Fit A, S and B to the output of their linear: the mask stays, and ‖(W − A·S·B) X‖² falls.

With H = XXᵀ and E = W − A·S·B this error is the trace of E H Eᵀ, quadratic in each factor while the other two stay. So
they take turns. S and B take some steps of conjugate gradients from where they are, A one of Newton's, for its normal
equations are small: d × d for each block. Gradients are −Aᵀ E H Bᵀ on the mask, −E H (S B)ᵀ and −(A S)ᵀ E H. What
multiplies them is near the inverse of each curvature:

- of S, the diagonals of AᵀA and of B H Bᵀ
- of A, (S B) H (S B)ᵀ by block, exact but for a ridge
- of B, (A S)ᵀ(A S) on the left and H on the right, both by block

The error falls with every turn. Most of what can be had comes with the first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from armor.core import blockdiag
from armor.core.factorization import Factorization

__all__ = ["fitted", "output_error"]

ROUNDS = 6
STEPS = 10  # of conjugate gradients, of S and of B in every round
RIDGE = 1e-6  # of the mean diagonal, in curvatures that are inverted


def fitted(weight: Tensor, gram: Tensor, factors: Factorization) -> tuple[Tensor, Tensor, Tensor]:
    """A (out/d, d, d), S (out, in) and B (in/d, d, d) of weight (out, in), float32, from `factors` on their mask.

    gram (in, in) is the mean of x xᵀ, positive definite.
    """
    assert factors.left is not None and factors.right is not None
    w, h = weight.float(), (gram / gram.diagonal().mean()).float()
    a, s, b = (x.float() for x in (factors.left, factors.core, factors.right))
    mask, wanted = factors.mask.float(), w @ h
    for _ in range(ROUNDS):
        s = _fitted_core(wanted, h, a, s, b, mask)
        a = _fitted_left(wanted, h, a, _right(s, b))
        b = _fitted_right(wanted, h, _left(a, s), b)
    return a, s, b


def output_error(weight: Tensor, gram: Tensor, factors: Factorization) -> float:
    """The trace of E H Eᵀ of `factors` as they are stored, for weight (out, in) and gram (in, in)."""
    error = weight.float() - factors.reconstruct()
    return float((error @ gram.float() * error).sum(dtype=torch.float64))


def _left(blocks: Tensor, x: Tensor) -> Tensor:
    """diag(blocks) x"""
    return torch.bmm(blocks, x.view(*blocks.shape[:2], -1)).view(x.shape)


def _right(x: Tensor, blocks: Tensor) -> Tensor:
    """x diag(blocks)"""
    return blockdiag.multiply(blocks.transpose(1, 2), x)


def _by_column(x: Tensor, size: int) -> Tensor:
    """x (rows, columns) as blocks of B meet it: (columns/size, rows, size)."""
    return x.view(len(x), -1, size).transpose(0, 1)


def _fitted_core(wanted: Tensor, h: Tensor, a: Tensor, s: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """S; wanted is W H (out, in)."""
    through = b.transpose(1, 2)
    curvature = _right(_right(h, through).T.contiguous(), through)  # B H Bᵀ
    of_rows = a.transpose(1, 2) @ a
    diagonal = of_rows.diagonal(dim1=1, dim2=2).reshape(-1, 1) * curvature.diagonal()
    goal = _left(a.transpose(1, 2), _right(wanted, through)) * mask
    return _conjugate_gradients(
        s,
        goal,
        lambda x: _left(of_rows, x @ curvature) * mask,
        lambda x: x / diagonal.clamp_min(torch.finfo(torch.float32).tiny),
    )


def _fitted_left(wanted: Tensor, h: Tensor, a: Tensor, product: Tensor) -> Tensor:
    """A; product is S B (out, in)."""
    blocks = a.shape[:2]
    z, image = product.view(*blocks, -1), (product @ h).view(*blocks, -1)
    curvature = image @ z.transpose(1, 2)
    gradient = wanted.view(*blocks, -1) @ z.transpose(1, 2) - a @ curvature
    return a + torch.cholesky_solve(gradient.transpose(1, 2), _root(curvature)).transpose(1, 2)


def _fitted_right(wanted: Tensor, h: Tensor, product: Tensor, b: Tensor) -> Tensor:
    """B; product is A S (out, in)."""
    count, size = b.shape[:2]
    y = _by_column(product, size).transpose(1, 2).contiguous()  # (in/d, d, out)
    diagonal = torch.stack([h[start : start + size, start : start + size] for start in range(0, len(h), size)])
    roots = _root(y @ y.transpose(1, 2)), _root(diagonal)

    def divided(x: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(x, roots[0]).transpose(1, 2), roots[1]).transpose(1, 2)

    return _conjugate_gradients(
        b,
        torch.bmm(y, _by_column(wanted, size)),
        lambda x: torch.bmm(y, _by_column(_right(product, x) @ h, size)),
        divided,
    )


def _root(curvature: Tensor) -> Tensor:
    """The Cholesky factor of curvature (count, d, d), with a ridge."""
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    return torch.linalg.cholesky(curvature + torch.diag_embed(ridge.expand_as(diagonal)))


def _conjugate_gradients(
    x: Tensor, goal: Tensor, curved: Callable[[Tensor], Tensor], divided: Callable[[Tensor], Tensor]
) -> Tensor:
    """x nearer to where `curved` of it is the goal; `divided` is an approximate inverse of `curved`."""
    rest = goal - curved(x)
    direction = divided(rest)
    size = (rest * direction).sum()
    for _ in range(STEPS):
        image = curved(direction)
        length = size / (direction * image).sum().clamp_min(torch.finfo(torch.float32).tiny)
        x, rest = x + length * direction, rest - length * image
        scaled = divided(rest)
        before, size = size, (rest * scaled).sum()
        direction = scaled + size / before.clamp_min(torch.finfo(torch.float32).tiny) * direction
    return x
