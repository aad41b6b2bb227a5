"""Pruning without wrappers: choose a mask by a score, keep the weight's own values there.

Every method of pruning compares within a group of the pattern, which for a percentage is the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from armor.core.factorization import Factorization
from armor.core.pattern import Pattern, PatternLike, top_n_mask
from armor.methods.solver.objective import Objective, check, relative_loss

__all__ = ["prune"]


def prune(
    weight: Tensor, importance: Tensor, pattern: PatternLike, score: Callable[[Objective, Tensor], Tensor]
) -> Factorization:
    """Keep the n entries of largest `score` in every group of weight (out, in) under importance (in,).

    `score(objective, weight)` gives (out, in), any float dtype. Raises ValueError for bad input.
    """
    pattern = check(weight, importance, pattern)
    objective = Objective.of(weight, importance)
    kept = _keep(weight, top_n_mask(score(objective, weight), pattern), pattern)
    start = _keep(weight, top_n_mask(objective.score(weight), pattern), pattern)
    loss, start_loss = (relative_loss(weight, objective, x) for x in (kept, start))
    return replace(kept, loss=loss, start_loss=start_loss)


def _keep(weight: Tensor, mask: Tensor, pattern: Pattern) -> Factorization:
    return Factorization(torch.where(mask, weight, 0), mask, pattern)
