"""Pruning without wrappers: choose a mask, keep the weight's own values there. The baselines of every comparison.

magnitude keeps the largest |W|; Wanda (Sun et al. 2023) the largest |W|·√d, d the mean square of the input; NoWag-P
(Liu et al. 2025) the largest W̄²·d, W̄ having columns and rows of unit norm. All compare within a group of the pattern,
which for a percentage is the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from armor.core.factors import Factorization
from armor.core.nm import Pattern, top_n_mask
from armor.factorize.objective import Objective, check, relative_loss

__all__ = ["magnitude", "nowag", "wanda"]

PatternLike: TypeAlias = Pattern | str | tuple[int, int]


def magnitude(weight: Tensor, importance: Tensor, *, pattern: PatternLike = (2, 4)) -> Factorization:
    """Keep the n largest |W| of every group; importance serves only the loss.

    weight (out, in), importance (in,), any float dtype. Raises ValueError for bad input.
    """
    return _prune(weight, importance, pattern, lambda _, w: w.abs())


def wanda(weight: Tensor, importance: Tensor, *, pattern: PatternLike = (2, 4)) -> Factorization:
    """Keep the n largest |W|·√importance of every group.

    weight (out, in), importance (in,), any float dtype. Raises ValueError for bad input.
    """
    return _prune(weight, importance, pattern, lambda o, w: w.abs().double() * o.importance.sqrt())


def nowag(weight: Tensor, importance: Tensor, *, pattern: PatternLike = (2, 4)) -> Factorization:
    """Keep the n largest W̄²·importance of every group.

    weight (out, in), importance (in,), any float dtype. Raises ValueError for bad input.
    """
    return _prune(weight, importance, pattern, Objective.score)


def _prune(
    weight: Tensor, importance: Tensor, pattern: PatternLike, score: Callable[[Objective, Tensor], Tensor]
) -> Factorization:
    pattern = check(weight, importance, pattern)
    objective = Objective.of(weight, importance)
    kept = _keep(weight, top_n_mask(score(objective, weight), pattern), pattern)
    start = _keep(weight, top_n_mask(objective.score(weight), pattern), pattern)
    loss, start_loss = (relative_loss(weight, objective, x) for x in (kept, start))
    return replace(kept, loss=loss, start_loss=start_loss)


def _keep(weight: Tensor, mask: Tensor, pattern: Pattern) -> Factorization:
    return Factorization(torch.where(mask, weight, 0), mask, pattern)
