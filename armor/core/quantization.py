"""How the factors of a linear are held in few bits: the types, without torch. `armor.core.integers` has the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["LIMITS", "STORED", "NumberType", "Quantization", "groups_of"]

NumberType = Literal["int8", "int4", "fp8"]
LIMITS: dict[NumberType, tuple[int, int]] = {"int8": (-127, 127), "int4": (-8, 7), "fp8": (-448, 448)}
"""The least and the largest number of a type. fp8 is a float of four bits of exponent and three of mantissa (e4m3)."""
STORED: dict[NumberType, str] = {"int8": "int8", "int4": "uint8", "fp8": "float8_e4m3fn"}
"""The dtype in which a packed core holds numbers of a type; two int4 share a byte."""


@dataclass(frozen=True)
class Quantization:
    """How the factors of a linear are held: the type of S's numbers and of those of A and B.

    `group` is the number of columns of S that share a scale; every row of a block of A or B has one scale. `blocks`
    None: A and B hold floats.
    """

    core: NumberType
    blocks: Literal["int8"] | None
    group: int


def groups_of(columns: int, group: int) -> int:
    """How many groups a row of `columns` has."""
    return -(-columns // group)
