"""From floats to integers: the factors of one linear, rounded so that the proxy loss stays small.

With √d absorbed and rows and columns normalised, the loss is a plain squared error of A·S·B. To first order an error in
one number counts by what it meets: in S by the norm of its column of A and of its row of B, in A by S·B, in B by A·S.
Scales are searched under these weights, and every number goes to the nearest.

That leaves errors that others could make up for. So S is rounded once more entry by entry, and the kept entries to come
in its row of a block take up what is missing, as in GPTQ (Frantar et al. 2023, arXiv 2210.17323) with the block's own
Hessian B D Bᵀ, cut down to what the row keeps. Then A is fitted to the rounded core by least squares and rounded in the
same way, then B. The better of the two results stays.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from armor.core import blockdiag
from armor.core.factorization import Factorization
from armor.core.integers import expand_scales, rounded
from armor.core.pattern import top_n_mask
from armor.core.quantization import LIMITS, IntegerType, Quantization
from armor.methods.solver.feedback import swept
from armor.methods.solver.objective import Objective, relative_loss

__all__ = ["held_against", "quantize"]

DAMPING = 0.01  # of the mean diagonal of a Hessian, as in SparseGPT
SLACK = 1.01  # NoWag-P's own weights lose a little more than its loss once they are stored in bfloat16


def quantize(
    weight: Tensor,
    importance: Tensor,
    factors: Factorization,
    *,
    core: IntegerType,
    blocks: str = "int8",
    group: int = 64,
    trained: bool = False,
    to_output: bool = False,
) -> Factorization:
    """`factors` of weight (out, in) under importance (in,) with integers in the place of floats.

    `core` is the type of S's numbers, of which `group` in a row share a scale; `blocks` that of A and B, int8 or
    bfloat16. U and V become bfloat16. The loss of what is returned is never above that of NoWag-P's core rounded alike,
    which is its start_loss. Not held to that are `trained` factors, and those that lose more than NoWag-P's before they
    are rounded, like SparseGPT's. These, and those that were fitted `to_output`, are rounded as they are: toward W the
    proxy loss would undo what they gained.
    """
    dtypes = dict.fromkeys(("core", "left", "right"), torch.float32) | dict.fromkeys(("up", "down"), torch.bfloat16)
    given = replace(
        factors, **{part: x.to(dtype) for part, dtype in dtypes.items() if (x := getattr(factors, part)) is not None}
    )
    objective = Objective.of(weight, importance)
    free = trained or _is_for_another_loss(weight, objective, given)
    kind = Quantization(core, "int8" if blocks == "int8" else None, factors.pattern.columns_of(group))
    d = _importance(objective)
    target = given.reconstruct() if free or to_output else weight
    candidates = [_rounded(given, kind, d)]
    if _has_feedback(given):
        candidates.append(_fitted(target, objective, given, candidates[0]))
    best = min(candidates, key=lambda each: relative_loss(target, objective, each))
    plain = _plain(weight, objective, given, kind, d)
    losses = [relative_loss(weight, objective, each) for each in (best, plain)]
    if not (free or losses[0] < losses[1]):
        best = plain
    loss = losses[0] if best is not plain else losses[1]
    return replace(best, loss=loss, start_loss=losses[1])


def held_against(factors: Factorization, weight: Tensor, importance: Tensor) -> Factorization:
    """The integers `factors` of weight (out, in) with the losses of this weight alone, as `quantize` reports them.

    For one that was rounded together with others.
    """
    objective = Objective.of(weight, importance)
    assert factors.quantization is not None
    plain = _plain(weight, objective, factors, factors.quantization, _importance(objective))
    loss, start_loss = (relative_loss(weight, objective, each) for each in (factors, plain))
    return replace(factors, loss=loss, start_loss=start_loss)


def _is_for_another_loss(weight: Tensor, objective: Objective, factors: Factorization) -> bool:
    """Whether `factors` of floats lose more than NoWag-P's weights."""
    mask = top_n_mask(objective.score(weight), factors.pattern)
    plain = Factorization(torch.where(mask, weight, 0).float(), mask, factors.pattern)
    return relative_loss(weight, objective, factors) > SLACK * relative_loss(weight, objective, plain)


def _importance(objective: Objective) -> Tensor:
    """The weight of each column's errors (in,), in the weight's own scale, the largest 1."""
    d = objective.importance / objective.column.square()
    return (d / d.amax()).float()


def _rounded(factors: Factorization, kind: Quantization, d: Tensor) -> Factorization:
    """Every number to the nearest, on scales that suit d (in,), the weight of each column's errors."""
    left, right = factors.left, factors.right
    of_core = d if right is None else torch.bmm(right.square(), d.view(len(right), -1, 1)).view(-1)
    core, core_scales = rounded(factors.core, kind.core, kind.group, of_core)
    product = factors.core if right is None else blockdiag.multiply(right.transpose(1, 2), factors.core)
    of_left = (product.square() @ d).view(-1, 1) if left is not None else None  # (out, 1), of each row of S B
    sides = _side(left, of_left, kind), _side(right, d.view(-1, 1), kind)
    return replace(
        factors,
        core=core,
        core_scales=core_scales,
        left=sides[0][0],
        left_scales=sides[0][1],
        right=sides[1][0],
        right_scales=sides[1][1],
        quantization=kind,
    )


def _has_feedback(factors: Factorization) -> bool:
    """Whether every row of a block of S keeps as many entries as any other, between blocks of A and B."""
    if factors.left is None or factors.right is None or factors.pattern.m == 0:
        return False
    return factors.right.shape[1] % factors.pattern.m == 0


def _fitted(target: Tensor, objective: Objective, factors: Factorization, start: Factorization) -> Factorization:
    """S rounded with feedback on the scales of `start`, then A, then B, each fitted to what is rounded already."""
    kind, row, column = start.quantization, objective.row.float(), objective.column.float()
    assert kind is not None and factors.left is not None and factors.right is not None
    assert start.core_scales is not None
    root = objective.importance.clamp_min(1e-8).sqrt().float()
    w = objective.normal(target) * root
    size_a, size_b = factors.left.shape[1], factors.right.shape[1]
    by_column = (root / column).view(-1, 1, size_b)
    b = factors.right * by_column
    scales = expand_scales(start.core_scales.float(), kind.group, w.shape[1])
    core = _core_with_feedback(factors, torch.bmm(b, b.transpose(1, 2)), scales, *LIMITS[kind.core])
    s = core * scales

    t = blockdiag.multiply(b.transpose(1, 2), s).view(-1, size_a, w.shape[1])  # S B by rows of blocks
    gram = torch.bmm(t, t.transpose(1, 2))
    a = _solved(gram, torch.bmm(t, w.view(t.shape).transpose(1, 2))).transpose(1, 2) * row.view(-1, size_a, 1)
    left, left_scales = _blocks_with_feedback(a, gram, gram.diagonal(dim1=1, dim2=2)[:, None], kind)
    a = (left if left_scales is None else left * left_scales.float().view(-1, size_a, 1)).float() / row.view(
        -1, size_a, 1
    )

    p = torch.bmm(a, s.view(t.shape)).view(w.shape).view(len(w), -1, size_b).transpose(0, 1)  # A S by columns of blocks
    gram = torch.bmm(p.transpose(1, 2), p)
    b = _solved(gram, torch.bmm(p.transpose(1, 2), w.view(len(w), -1, size_b).transpose(0, 1))) / by_column
    right, right_scales = _blocks_with_feedback(b, gram, by_column.square(), kind, across_rows=True)
    tensors = {"left": left, "left_scales": left_scales, "right": right, "right_scales": right_scales}
    return replace(start, core=core.to(torch.int8), **tensors)


def _damped(gram: Tensor) -> Tensor:
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    return gram + torch.diag_embed(DAMPING * diagonal.mean(-1, keepdim=True).expand_as(diagonal) + 1e-30)


def _solved(gram: Tensor, right_side: Tensor) -> Tensor:
    """The least squares of (count, d, d) problems, hardly damped: what is lost here nothing brings back."""
    return torch.linalg.solve_ex((gram + 1e-4 * (_damped(gram) - gram)).double(), right_side.double())[0].float()


def _upper(gram: Tensor) -> Tensor:
    """U (..., d, d) upper triangular, Uᵀ U the inverse of the damped gram. Row t says how the entries behind t make up
    for an error in it."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(_damped(gram).double())[0])
    return torch.linalg.cholesky_ex(inverse, upper=True)[0].float()


def _core_with_feedback(factors: Factorization, gram: Tensor, scales: Tensor, least: int, most: int) -> Tensor:
    """The integers of S (out, in), on `scales` (out, in); gram (in/d, d, d) is B D Bᵀ."""
    count, size, _ = gram.shape
    n, m = factors.pattern.group(size)
    kept, found = size // m * n, torch.zeros_like(factors.core)
    step = max(1, (1 << 23) // (count * kept * kept))
    for start in range(0, len(found), step):
        rows = slice(start, start + step)
        mask, core, own, out = (x[rows].view(-1, count, size) for x in (factors.mask, factors.core, scales, found))
        places = mask.int().argsort(dim=-1, descending=True, stable=True)[..., :kept]
        blocks = torch.arange(count, device=gram.device).view(1, -1, 1, 1)
        small = gram[blocks, places[..., :, None], places[..., None, :]]
        values, _ = swept(core.gather(2, places), _upper(small), own.gather(2, places), least, most)
        out.scatter_(2, places, values)
    return found


def _blocks_with_feedback(
    blocks: Tensor, gram: Tensor, importance: Tensor, kind: Quantization, across_rows: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`blocks` (count, d, d) as they are stored, and their scales (count · d,); importance broadcasts to them.

    gram (count, d, d) is the Hessian of each row of a block, or `across_rows` of each of its columns.
    """
    if kind.blocks is None:
        return blocks.to(torch.bfloat16), None
    size = blocks.shape[1]
    _, scales = rounded(blocks.reshape(-1, size), kind.blocks, size, importance.expand_as(blocks).reshape(-1, size))
    own = scales.float().view(-1, size, 1).expand_as(blocks)
    upper = _upper(gram)[:, None]
    if across_rows:
        numbers, _ = swept(blocks.transpose(1, 2), upper, own.transpose(1, 2), *LIMITS[kind.blocks])
        numbers = numbers.transpose(1, 2)
    else:
        numbers, _ = swept(blocks, upper, own, *LIMITS[kind.blocks])
    return numbers.contiguous().to(torch.int8), scales.view(-1)


def _side(blocks: Tensor | None, importance: Tensor | None, kind: Quantization) -> tuple[Tensor | None, Tensor | None]:
    """`blocks` (count, d, d) as they are stored, and their scales (count · d,); importance (count · d, 1) by column."""
    if blocks is None:
        return None, None
    if kind.blocks is None:
        return blocks.to(torch.bfloat16), None
    count, size, _ = blocks.shape
    weights = None if importance is None else importance.view(count, 1, size).expand(count, size, size)
    numbers, scales = rounded(
        blocks.reshape(-1, size), kind.blocks, size, None if weights is None else weights.reshape(-1, size)
    )
    return numbers.view(blocks.shape), scales.view(-1)


def _plain(
    weight: Tensor, objective: Objective, factors: Factorization, kind: Quantization, d: Tensor
) -> Factorization:
    """NoWag-P at the same bits: its core rounded alike, blocks that are exactly the identity, U and V of zeros."""
    mask = top_n_mask(objective.score(weight), factors.pattern)
    core, scales = rounded(torch.where(mask, weight, 0).float(), kind.core, kind.group, d)
    dtype = torch.int8 if kind.blocks else torch.bfloat16
    eyes = [
        None if own is None else blockdiag.identity(n, own.shape[1], dtype=dtype, device=weight.device)
        for own, n in zip((factors.left, factors.right), weight.shape, strict=True)
    ]
    ones = [
        None if eye is None or not kind.blocks else torch.ones(n, dtype=torch.bfloat16, device=weight.device)
        for eye, n in zip(eyes, weight.shape, strict=True)
    ]
    pair: dict[str, Any] = {
        name: torch.zeros_like(x) for name in ("up", "down") if (x := getattr(factors, name)) is not None
    }
    return replace(
        factors,
        core=core,
        mask=mask,
        core_scales=scales,
        left=eyes[0],
        left_scales=ones[0],
        right=eyes[1],
        right_scales=ones[1],
        quantization=kind,
        **pair,
    )
