"""Fit A, S and B to the output of their linear: the mask stays, and ‖(W − A·S·B) X‖² falls.

With H = XXᵀ and E = W − A·S·B this error is the trace of E H Eᵀ, quadratic in each factor while the other two stay. So
they take turns. S and B take some steps of conjugate gradients from where they are, A one of Newton's, for its normal
equations are small: d × d for each block. The gradients are −Aᵀ E H Bᵀ on the mask, −E H (S B)ᵀ and −(A S)ᵀ E H. Each
is preconditioned by the inverse of:

- for S, the diagonals of AᵀA and of B H Bᵀ
- for A, (S B) H (S B)ᵀ by block, exact but for a ridge
- for B, (A S)ᵀ(A S) on the left and H on the right, both by block

But for rounding the error falls with every turn. Most of what can be had comes with the first.

With a vector in the place of H, its diagonal, the same is done for inputs that are taken one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from armor.core import blockdiag
from armor.core.factorization import Factorization

__all__ = [
    "between",
    "damped",
    "diagonal_of",
    "fitted",
    "fitted_core",
    "fitted_left",
    "fitted_right",
    "output_error",
    "times",
    "times_left",
    "times_right",
]

DAMPING = 0.01  # as in SparseGPT
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
        s = fitted_core(wanted, h, (a, s, b), mask, steps)
        a, _ = fitted_left(wanted, h, a, times_right(s, b))
        b, _ = fitted_right(wanted, h, times_left(a, s), b, steps)
    return a.double() * scale, s, b


def damped(gram: Tensor) -> Tensor:
    """H (in, in) float64 of a Gram matrix (in, in): its live diagonal is 1 in the mean, with `DAMPING` added.

    An input that never fires has the damping alone.
    """
    diagonal = gram.diagonal().double()
    live = diagonal[diagonal > 0]
    h = gram.to(torch.float64, copy=True).div_(live.mean() if len(live) else 1.0)
    h.diagonal().add_(DAMPING)
    return h


def output_error(weight: Tensor, gram: Tensor, factors: Factorization) -> float:
    """The trace of E H Eᵀ of `factors` as they are stored, by the square of weight's largest entry.

    weight (out, in), gram (in, in).
    """
    top = float(weight.abs().amax()) or 1.0
    error = (weight.float() - factors.reconstruct()) / top
    return float((error @ gram.float()).mul_(error).sum(dtype=torch.float64))


def times(x: Tensor, curvature: Tensor) -> Tensor:
    """x (rows, in) times a matrix (in, in), given whole, as blocks on its diagonal (in/d, d, d), or as that (in,)."""
    if curvature.dim() == 1:
        return x * curvature
    return x @ curvature if curvature.dim() == 2 else times_right(x, curvature)


def between(b: Tensor, h: Tensor) -> Tensor:
    """B H Bᵀ (in, in), or its blocks (in/d, d, d) where h is a diagonal (in,); b (in/d, d, d)."""
    through = b.transpose(1, 2)
    if h.dim() == 1:
        return (b * h.view(len(b), 1, -1)) @ through
    return times_right(times_right(h, through).T.contiguous(), through)


def diagonal_of(curvature: Tensor) -> Tensor:
    """The diagonal (in,) of a matrix as `times` has it."""
    return curvature if curvature.dim() == 1 else curvature.diagonal(dim1=-2, dim2=-1).reshape(-1)


def times_left(blocks: Tensor, x: Tensor) -> Tensor:
    """diag(blocks) x"""
    return torch.bmm(blocks, x.view(*blocks.shape[:2], -1)).view(x.shape)


def times_right(x: Tensor, blocks: Tensor) -> Tensor:
    """x diag(blocks)"""
    return blockdiag.multiply(blocks.transpose(1, 2), x)


def fitted_core(wanted: Tensor, h: Tensor, factors: tuple[Tensor, Tensor, Tensor], mask: Tensor, steps: int) -> Tensor:
    """S (out, in); wanted is W H (out, in). The block rows of A are problems of their own."""
    a, s, b = factors
    through, rows = b.transpose(1, 2), a.shape[:2]
    curvature = between(b, h)
    of_rows = a.transpose(1, 2) @ a
    diagonal = of_rows.diagonal(dim1=1, dim2=2)[:, :, None] * diagonal_of(curvature)
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    kept = mask.view(*rows, -1)
    return _conjugate_gradients(
        s.view(*rows, -1),
        times_left(a.transpose(1, 2), times_right(wanted, through)).view(*rows, -1) * kept,
        lambda x: torch.bmm(of_rows, times(x.reshape(s.shape), curvature).view(x.shape)) * kept,
        lambda x: x * inverse,
        steps,
        dims=(1, 2),
    ).view(s.shape)


def fitted_left(wanted: Tensor, h: Tensor, a: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """A (out/d, d, d), and the curvature of each row of a block (out/d, d, d); product is S B (out, in)."""
    rows = a.shape[:2]
    z, image = product.view(*rows, -1), times(product, h).view(*rows, -1)
    curvature = image @ z.transpose(1, 2)
    gradient = wanted.view(*rows, -1) @ z.transpose(1, 2) - a @ curvature
    return a + _divider(curvature)(gradient.transpose(1, 2)).transpose(1, 2), curvature


def fitted_right(wanted: Tensor, h: Tensor, product: Tensor, b: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """B (in/d, d, d), and the curvature of each column of a block (in/d, d, d) but for what its input weighs.

    product is A S (out, in).
    """
    size = b.shape[1]
    y = blockdiag.by_column(product, size).transpose(1, 2).contiguous()  # (in/d, d, out)
    if h.dim() == 1:
        by_block = torch.diag_embed(h.view(-1, size))
    else:
        by_block = torch.stack([h[start : start + size, start : start + size] for start in range(0, len(h), size)])
    curvature = y @ y.transpose(1, 2)
    of_left, of_right = _divider(curvature), _divider(by_block)
    found = _conjugate_gradients(
        b,
        torch.bmm(y, blockdiag.by_column(wanted, size)),
        lambda x: torch.bmm(y, blockdiag.by_column(times(times_right(product, x), h), size)),
        lambda x: of_right(of_left(x).transpose(1, 2)).transpose(1, 2),
        steps,
        dims=(0, 1, 2),
    )
    return found, curvature


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
