"""What one rank of a tensor-parallel group holds of a linear, packed or dense.

A block of A or B cannot be cut. So a linear can be divided over ranks where the cuts meet the ends of blocks: those of
A where the output channels are divided, those of B, and bytes of the mask, where the input channels are. With the
output channels divided every rank multiplies by all of B; with the input channels divided, by all of A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from armor.core.errors import ArmorError
from armor.format.checkpoint import PackedLinear

__all__ = ["MAX_RANKS", "Part", "cut"]

MAX_RANKS = 64  # up to which a refusal names the sizes that would do


@dataclass(frozen=True)
class Part:
    """Ranges of the output channels and one range of the input channels of a linear.

    `layout` is that of the whole linear, None if it is dense.
    """

    rows: tuple[range, ...]
    columns: range
    layout: PackedLinear | None

    @cached_property
    def out_features(self) -> int:
        return sum(map(len, self.rows))

    @cached_property
    def packed(self) -> PackedLinear | None:
        """The layout of the part itself."""
        return self.layout and replace(self.layout, out_features=self.out_features, in_features=len(self.columns))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the part by its suffix."""
        return self.packed.shapes() if self.packed else {"weight": (self.out_features, len(self.columns))}

    def take(self, suffix: str, tensor: Tensor) -> Tensor:
        """This part of the tensor that is `suffix` of the whole linear; a view where the rows are one range."""
        layout = self.layout
        if suffix != "right":
            size = layout.left_block_size or 1 if layout and suffix == "left" else 1
            pieces = [tensor[rows.start // size : rows.stop // size] for rows in self.rows]
            tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if suffix == "left":
            return tensor
        n, m = 1, 1
        if layout and suffix == "core_values":
            n, m = layout.pattern.group(layout.in_features)
        elif layout and suffix == "core_mask":
            m = 8
        elif layout and suffix == "right":
            m = layout.right_block_size or 1
        start, stop = self.columns.start * n // m, -(-self.columns.stop * n // m)
        return tensor[start:stop] if suffix == "right" else tensor[:, start:stop]


def cut(name: str, layout: PackedLinear | None, rows: tuple[range, ...], columns: range, ranks: int) -> Part:
    """The part of linear `name` with these channels, for one of `ranks` ranks.

    Raises ArmorError where a cut does not meet the ends of blocks; it names the numbers of ranks that would do.
    """
    joined: list[range] = []
    for part in rows:
        if joined and joined[-1].stop == part.start:
            joined[-1] = range(joined[-1].start, part.stop)
        else:
            joined.append(part)
    if layout is not None:
        n, m = layout.pattern.group(layout.in_features)
        row_step = layout.left_block_size or 1
        column_step = math.lcm(layout.right_block_size or 1, m, 8)
        if any(end % row_step for part in joined for end in (part.start, part.stop) if end != layout.out_features):
            pieces, step, what = {len(part) * ranks for part in rows}, row_step, f"A of {row_step} output"
        elif any(end % column_step for end in (columns.start, columns.stop) if end != layout.in_features):
            pieces, step, what = {layout.in_features}, column_step, f"B, its pattern or its mask, {column_step} input"
        else:
            return Part(tuple(joined), columns, layout)
        sizes = [size for size in range(1, MAX_RANKS + 1) if all(piece % (size * step) == 0 for piece in pieces)]
        raise ArmorError(
            f"{name}: {ranks} ranks would cut a block of {what} channels; expected a tensor parallel size of "
            f"{', '.join(map(str, sizes or [1]))} (this linear is {layout.out_features} x {layout.in_features})"
        )
    return Part(tuple(joined), columns, layout)
