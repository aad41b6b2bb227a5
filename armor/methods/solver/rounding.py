"""From floats to integers: the factors of one linear, rounded so that little of what they do is lost.

With √d absorbed and rows and columns normalised, the proxy loss is a plain squared error of A·S·B. To first order an
error in one number counts by what it meets: in S by its column of A and its row of B, in A by its row of S·B, in B by
its column of A·S and its input. What all numbers of a group share is left out. Scales are searched under these weights,
and every number goes to the nearest. From there `armor.methods.solver.integers` searches, and the best of all results
stays.

What is best depends on what the factors are for. Those of the proxy loss are judged by it. Where a Gram matrix of the
inputs is known, those that were made by it or trained are judged by the error of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from armor.core import blockdiag
from armor.core.factorization import Factorization
from armor.core.integers import rounded
from armor.core.pattern import top_n_mask
from armor.core.quantization import NumberType, Quantization
from armor.methods.solver.integers import searched
from armor.methods.solver.objective import Objective, relative_loss
from armor.methods.solver.output import damped, output_error

__all__ = ["column_weights", "held_against", "pruned_plainly", "quantize", "to_nearest"]

SLACK = 1.01  # NoWag-P's own weights lose a little more than its loss once they are stored in bfloat16


def quantize(
    weight: Tensor,
    importance: Tensor,
    factors: Factorization,
    *,
    core: NumberType,
    blocks: str = "int8",
    group: int = 64,
    gram: Tensor | None = None,
    trained: bool = False,
    to_output: bool = False,
) -> Factorization:
    """`factors` of weight (out, in) under importance (in,) with integers in the place of floats.

    `core` is the type of S's numbers, of which `group` in a row share a scale; `blocks` that of A and B, int8 or
    bfloat16. U and V become bfloat16. gram (in, in), the mean of x xᵀ, serves factors that were fitted `to_output` and
    `trained` ones.

    The loss of what is returned is never above that of NoWag-P's core rounded alike, which is its start_loss; where the
    search finds nothing below, that core is returned. Not held to it are `trained` factors, and those that lose more
    than SLACK times NoWag-P's loss before they are rounded, like SparseGPT's.

    With a Gram matrix factors `to_output` are brought close to W, and trained ones to what they are in floats. Without
    one, those that minimise the proxy loss are brought close to W. All others are brought close to their floats, for
    toward W the proxy loss would undo what they gained.
    """
    dtypes = dict.fromkeys(("core", "left", "right"), torch.float32) | dict.fromkeys(("up", "down"), torch.bfloat16)
    given = replace(
        factors, **{part: x.to(dtype) for part, dtype in dtypes.items() if (x := getattr(factors, part)) is not None}
    )
    objective = Objective.of(weight, importance)
    free = trained or _is_for_another_loss(weight, objective, given)
    kind = Quantization(core, "int8" if blocks == "int8" else None, factors.pattern.columns_of(group))
    d, row = column_weights(objective), objective.row.float()
    start, plain = to_nearest(given, kind, d), pruned_plainly(weight, objective, given, kind, d)
    start_loss = relative_loss(weight, objective, plain)

    def kept(candidates: Iterable[Factorization]) -> list[Factorization]:
        known = [replace(each, loss=relative_loss(weight, objective, each)) for each in candidates]
        return [each for each in known if free or each.loss <= start_loss]

    error: Callable[[Factorization], float] = attrgetter("loss")
    if gram is not None and (trained or to_output):
        h = damped(gram.to(weight.device)).float()
        target = given.reconstruct() if trained else weight.float()
        error = partial(output_error, target, h)
        found = kept(searched(target, torch.ones_like(row), h, given, start))
        if not found:  # what is close to the floats by the proxy loss breaks the promise last
            found = kept(searched(given.reconstruct(), row, d, given, start))
        found += kept([start])
    elif free or to_output:
        target = given.reconstruct()
        error = partial(relative_loss, target, objective)
        found = kept([start, *searched(target, row, d, given, start)])
    else:
        found = kept([start, *searched(weight, row, d, given, start)])
    best = min(found, key=error, default=replace(plain, loss=start_loss))
    return replace(best, start_loss=start_loss)


def held_against(factors: Factorization, weight: Tensor, importance: Tensor) -> Factorization:
    """The integers `factors` of weight (out, in) with the losses of this weight alone, as `quantize` reports them.

    For one that was rounded together with others.
    """
    objective = Objective.of(weight, importance)
    assert factors.quantization is not None
    plain = pruned_plainly(weight, objective, factors, factors.quantization, column_weights(objective))
    loss, start_loss = (relative_loss(weight, objective, each) for each in (factors, plain))
    return replace(factors, loss=loss, start_loss=start_loss)


def _is_for_another_loss(weight: Tensor, objective: Objective, factors: Factorization) -> bool:
    """Whether `factors` of floats lose more than NoWag-P's weights."""
    mask = top_n_mask(objective.score(weight), factors.pattern)
    plain = Factorization(torch.where(mask, weight, 0).float(), mask, factors.pattern)
    return relative_loss(weight, objective, factors) > SLACK * relative_loss(weight, objective, plain)


def column_weights(objective: Objective) -> Tensor:
    """The weight of each column's errors (in,), in the weight's own scale, the largest 1."""
    d = objective.importance / objective.column.square()
    return (d / d.amax()).float()


def to_nearest(factors: Factorization, kind: Quantization, d: Tensor) -> Factorization:
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


def pruned_plainly(
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
