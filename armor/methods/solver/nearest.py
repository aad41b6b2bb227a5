"""Every weight as an integer, rounded to the nearest: quantization without pruning."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from armor.core.factorization import Factorization
from armor.core.integers import rounded
from armor.core.pattern import DENSE
from armor.core.quantization import Quantization
from armor.methods.solver.objective import Objective, check, relative_loss

__all__ = ["held", "to_nearest"]


def to_nearest(weight: Tensor, importance: Tensor, kind: Quantization) -> Factorization:
    """Round weight (out, in) on scales of the least error under importance (in,). Raises ValueError for bad input."""
    check(weight, importance, DENSE)
    return held(weight, importance, kind, *rounded(weight, kind.core, kind.group, importance))


def held(
    weight: Tensor, importance: Tensor, kind: Quantization, numbers: Tensor, scales: Tensor, start: float | None = None
) -> Factorization:
    """The integers `numbers` (out, in) with `scales` (out, groups) in the place of weight, with their loss.

    `start` is the loss of rounding to the nearest; None: these are so rounded.
    """
    found = Factorization(
        numbers, torch.ones_like(numbers, dtype=torch.bool), DENSE, quantization=kind, core_scales=scales
    )
    loss = relative_loss(weight, Objective.of(weight, importance), found)
    return replace(found, loss=loss, start_loss=loss if start is None else start)
