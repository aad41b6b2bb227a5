"""N:M patterns: which entries of a row may be nonzero.

A pattern n:m lets at most n of every m consecutive entries of a row be nonzero. Unstructured sparsity ("50%") is the
pattern whose group is the whole row, as in Wanda (Sun et al. 2023): n is then a share of the row's length. Hence every
pattern keeps the same number of entries in each row, and one packed form (see `armor.core.packing`) serves them all.
1:1 is the dense core of methods that quantize and do not prune; no mask is stored for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["DENSE", "Pattern", "PatternLike", "is_nm", "top_n_mask"]


@dataclass(frozen=True)
class Pattern:
    """At most `n` nonzeros in every `m` consecutive entries; with `m` 0, `n` percent of each row."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if self.m == 0 and 0 < self.n < 100 or self.is_dense:
            return
        if not 0 < self.n < self.m:
            raise ValueError(
                f"pattern {self.n}:{self.m}: expected n:m with 0 < n < m, like 2:4, or a percentage, like 50%"
            )

    @classmethod
    def parse(cls, value: PatternLike) -> Pattern:
        """Read "2:4", "50%", (2, 4) or a Pattern. Raises ValueError for anything else."""
        if isinstance(value, Pattern):
            return value
        if isinstance(value, str):
            if match := re.fullmatch(r"(\d+):(\d+)", value):
                if match[2] != "0":
                    return cls(int(match[1]), int(match[2]))
            elif match := re.fullmatch(r"(\d+)%", value):
                return cls(int(match[1]), 0)
        elif isinstance(value, (tuple, list)) and len(value) == 2:
            return cls(*value)
        raise ValueError(f"pattern {value!r}: expected n:m with 0 < n < m, like 2:4, or a percentage, like 50%")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.m else f"{self.n}%"

    @property
    def is_dense(self) -> bool:
        """Whether every entry is kept."""
        return self.n == self.m == 1

    def group(self, columns: int) -> tuple[int, int]:
        """The (n, m) of a row of `columns` entries; m divides columns. Raises ValueError where none does."""
        if self.m == 0:
            kept = columns * self.n // 100
            if kept == 0:
                raise ValueError(f"pattern {self}: a row of {columns} entries would keep nothing")
            return kept, columns
        if columns % self.m:
            raise ValueError(f"pattern {self}: a row of {columns} entries is not a multiple of {self.m}")
        return self.n, self.m

    def fits(self, columns: int) -> bool:
        """Whether rows of `columns` entries can hold this pattern."""
        return columns * self.n >= 100 if self.m == 0 else columns % self.m == 0

    def columns_of(self, kept: int) -> int:
        """In how many columns of a row about `kept` entries are kept: exactly so many where the pattern allows it."""
        return kept * 100 // self.n if self.m == 0 else kept * self.m // self.n


DENSE = Pattern(1, 1)
"""The pattern that keeps every entry."""
PatternLike: TypeAlias = Pattern | str | tuple[int, int]


def top_n_mask(score, pattern: Pattern):
    """The mask (out, in) bool that keeps, in every group, the n entries of largest `score` (out, in).

    Exactly n are kept in each group; among equal scores the leftmost wins.
    """
    import torch

    rows, columns = score.shape
    n, m = pattern.group(columns)
    grouped = score.reshape(rows, columns // m, m)
    kept = grouped.argsort(dim=-1, descending=True, stable=True)[..., :n]
    mask = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, kept, True)
    return mask.reshape(rows, columns)


def is_nm(mask, pattern: Pattern) -> bool:
    """Whether `mask` (out, in) bool keeps exactly n positions in every group."""
    rows, columns = mask.shape
    n, m = pattern.group(columns)
    return bool((mask.reshape(rows, columns // m, m).sum(-1) == n).all())
