"""Integers in the place of A, S and B, found in rounds so that they make up for each other's errors.

As in `armor.methods.solver.output` E = W − A·S·B, and the error is the trace of E H Eᵀ. A round rounds S by coordinate
descent: one column after the other takes the integers that are best while all others stay, as in QuantEase (Behdin et
al. 2023, arXiv 2309.01885). A is fitted to that and rounded with feedback, and so is B after it. The next round begins
with S in floats, fitted to A and B as they are now.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from armor.core.factorization import Factorization
from armor.core.integers import DTYPES, expand_scales, round_, rounded
from armor.core.quantization import NumberType, Quantization
from armor.methods.solver.feedback import swept
from armor.methods.solver.output import (
    DAMPING,
    between,
    diagonal_of,
    fitted_core,
    fitted_left,
    fitted_right,
    times,
    times_left,
    times_right,
)

__all__ = ["descended", "rounded_core", "searched"]

ROUNDS = 4
STEPS = 10  # of conjugate gradients, of S and of B in every round
SWEEPS = 4  # of coordinate descent over all columns
WIDTH = 64  # columns of a sweep between two products with the whole of H


def searched(
    target: Tensor, row: Tensor, h: Tensor, factors: Factorization, start: Factorization
) -> Iterator[Factorization]:
    """`start`, the integers of `factors`, as each round leaves them.

    target (out, in) is W. h is H (in, in), or its diagonal (in,). Errors of a row are divided by its entry of row
    (out,): the norms of the proxy loss, or ones for the output.
    """
    kind = start.quantization
    assert kind is not None
    target = target.float()
    if factors.up is not None and factors.down is not None:
        target = target - factors.up.float() @ factors.down.float()
    if factors.left is None or factors.right is None:
        assert factors.left is factors.right
        if h.dim() == 2:  # without correlations the nearest integers are the best
            yield rounded_core(target, h, factors.core, factors, start)[0]
        return
    row = row.view(len(factors.left), -1, 1)
    a, s, b = factors.left / row, factors.core, factors.right
    wanted, mask, found = times(target / row.view(-1, 1), h), factors.mask.float(), start
    for number in range(ROUNDS):
        if number:
            s = fitted_core(wanted, h, (a, s, b), mask, STEPS)
        found, core = rounded_core(s, between(b, h), s, factors, found)
        a, curvature = fitted_left(wanted, h, a, times_right(core, b))
        weights = curvature.diagonal(dim1=1, dim2=2)[:, None].expand_as(a)
        left, left_scales, a = _side_with_feedback(a * row, curvature, weights, kind)
        a = a / row
        b, curvature = fitted_right(wanted, h, times_left(a, core), b, STEPS)
        weights = diagonal_of(h).view(len(b), 1, -1).expand_as(b)
        right, right_scales, b = _side_with_feedback(b, curvature, weights, kind, across_rows=True)
        sides = {"left": left, "left_scales": left_scales, "right": right, "right_scales": right_scales}
        yield (found := replace(found, **sides))


def rounded_core(
    wanted: Tensor, curvature: Tensor, near: Tensor, factors: Factorization, start: Factorization
) -> tuple[Factorization, Tensor]:
    """`start` with the integers on its mask that come close to wanted (out, in), and their numbers (out, in).

    The search begins at the integers that are nearest to near (out, in).
    """
    kind = start.quantization
    assert kind is not None
    numbers, scales = rounded(near, kind.core, kind.group, diagonal_of(curvature))
    own = expand_scales(scales.float(), kind.group, near.shape[1]) * factors.mask
    numbers = descended(numbers.float(), own, wanted, curvature, kind.core)
    return replace(start, core=numbers.to(DTYPES[kind.core]), core_scales=scales), numbers * own


def descended(numbers: Tensor, scales: Tensor, wanted: Tensor, curvature: Tensor, kind: NumberType) -> Tensor:
    """`numbers` (out, in) of type `kind`, of `scales` (out, in), after sweeps of coordinate descent.

    With E = numbers · scales − wanted the trace of E C Eᵀ never rises. curvature is C (in, in), or the blocks on its
    diagonal (in/d, d, d). Where a scale is zero the number becomes zero.
    """
    numbers = numbers.T.clone(memory_format=torch.contiguous_format)  # so that a column lies in one piece
    scales, wanted = scales.T.contiguous(), wanted.T.contiguous()
    error, divisors = numbers * scales - wanted, torch.where(scales == 0, 1.0, scales)
    width, curves = WIDTH if curvature.dim() == 2 else curvature.shape[1], diagonal_of(curvature).tolist()
    for _ in range(SWEEPS):
        for start in range(0, len(numbers), width):
            part = slice(start, start + width)
            if curvature.dim() == 2:
                own, slope = curvature[part, part], curvature[part] @ error
            else:
                own = curvature[start // width]
                slope = own @ error[part]
            columns = zip(*(x[part] for x in (numbers, scales, divisors, wanted, error)), strict=True)
            for t, (number, scale, divisor, goal, off) in enumerate(columns):
                best = goal + off
                if (curve := curves[start + t]) > 0:
                    best -= slope[t] / curve
                round_(torch.div(best, divisor, out=number), kind)
                after = (number * scale).sub_(goal)
                slope[t + 1 :].addr_(own[t, t + 1 :], after - off)
                off.copy_(after)
    return torch.where(scales == 0, 0.0, numbers).T.contiguous()


def _side_with_feedback(
    blocks: Tensor, curvature: Tensor, importance: Tensor, kind: Quantization, across_rows: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`blocks` (count, d, d) as they are stored, their scales (count · d,), and their numbers.

    importance (count, d, d). curvature (count, d, d) is the Hessian of each row of a block, or `across_rows` of each
    of its columns.
    """
    if kind.blocks is None:
        stored = blocks.to(torch.bfloat16)
        return stored, None, stored.float()
    size = blocks.shape[1]
    _, scales = rounded(blocks.reshape(-1, size), kind.blocks, size, importance.reshape(-1, size))
    own = scales.float().view(-1, size, 1)
    each, upper = own.expand_as(blocks), _upper(curvature)[:, None]
    if across_rows:
        numbers, _ = swept(blocks.transpose(1, 2), upper, each.transpose(1, 2), kind.blocks)
        numbers = numbers.transpose(1, 2)
    else:
        numbers, _ = swept(blocks, upper, each, kind.blocks)
    return numbers.contiguous().to(torch.int8), scales.view(-1), numbers * own


def _upper(gram: Tensor) -> Tensor:
    """U (count, d, d) upper triangular, Uᵀ U the inverse of the damped gram."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    ridge = DAMPING * diagonal.mean(-1, keepdim=True).expand_as(diagonal) + 1e-30
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex((gram + torch.diag_embed(ridge)).double())[0])
    return torch.linalg.cholesky_ex(inverse, upper=True)[0].float()
