"""The settings of the optimiser and of groups of integers, for a configuration; without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from armor.core.typed import Typed

__all__ = ["Algorithm", "GroupSettings", "Selection", "SolverSettings"]

Algorithm = Literal["fast", "published"]
Selection = Literal["l1-random", "l2-random", "uniform", "l1-greedy"]


class SolverSettings(Typed):
    """The optimiser behind armor and armor_gram."""

    iterations: int = Field(default=300, ge=1)
    """The budget. The schedule adapts to it."""
    algorithm: Algorithm = "fast"
    """fast is this project's. published is the paper's joint Adam, kept for comparison; the paper gives it 20,000."""
    selection: Selection | None = None
    """How published chooses the group of each block that it improves next. l1-random and l2-random draw a group; the
    larger the 1-norm or 2-norm of its gradient, the likelier it is. l1-greedy takes the group with the largest 1-norm.
    uniform draws any. Unset: l1-random, the paper's choice."""


class GroupSettings(Typed):
    """The groups of a method that rounds to int4."""

    group: int = Field(default=128, ge=1)
    """How many consecutive weights of a row share a scale. A scale takes 16 bits."""
