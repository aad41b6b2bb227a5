"""How the factors of a linear are held as integers: the types, without torch. `armor.core.integers` has the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["LIMITS", "IntegerType", "Quantization", "groups_of"]

IntegerType = Literal["int8", "int4"]
LIMITS: dict[IntegerType, tuple[int, int]] = {"int8": (-127, 127), "int4": (-8, 7)}
"""The integers of a type, from the least to the largest."""


@dataclass(frozen=True)
class Quantization:
    """How the factors of a linear are held: the type of S's numbers and of those of A and B.

    `group` is the number of columns of S that share a scale; every row of a block of A or B has one scale. `blocks`
    None: A and B hold floats.
    """

    core: IntegerType
    blocks: Literal["int8"] | None
    group: int


def groups_of(columns: int, group: int) -> int:
    """How many groups a row of `columns` has."""
    return -(-columns // group)
