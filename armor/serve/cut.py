"""What one rank of a tensor-parallel group holds of a linear, packed or dense.

A block of A or B cannot be cut. So a linear can be divided over ranks where the cuts meet the ends of blocks: those of
A where the output channels are divided, those of B, bytes of the mask, and groups of integers, where the input channels
are. With the output channels divided every rank multiplies by all of B; with the input channels divided, by all of A.
A pair of low rank is cut anywhere: U with the output channels, V with the input channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from armor.core.errors import ArmorError
from armor.format.checkpoint import PackedLinear

__all__ = ["MAX_RANKS", "Piece", "cut"]

MAX_RANKS = 64  # up to which a refusal names the sizes that would do


@dataclass(frozen=True)
class Piece:
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
        if suffix == "down":
            return tensor[:, self.columns.start : self.columns.stop]
        if suffix in ("right", "right_scales"):
            size = layout.right_block_size or 1 if layout and suffix == "right" else 1
            return tensor[self.columns.start // size : -(-self.columns.stop // size)]
        size = layout.left_block_size or 1 if layout and suffix == "left" else 1
        pieces = [tensor[rows.start // size : rows.stop // size] for rows in self.rows]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if suffix in ("left", "left_scales", "up"):
            return tensor
        n, m = 1, 1  # of its columns for m input channels
        if layout and suffix == "core_values":
            n, m = layout.pattern.group(layout.in_features)
            if layout.dtypes().get(suffix) == "uint8":  # two int4 in a byte
                m *= 2
        elif layout and suffix == "core_mask":
            m = 8
        elif layout and layout.quantization and suffix == "core_scales":
            m = layout.quantization.group
        return tensor[:, self.columns.start * n // m : -(-self.columns.stop * n // m)]


def cut(name: str, layout: PackedLinear | None, rows: tuple[range, ...], columns: range, ranks: int) -> Piece:
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
        if own := layout.quantization:
            scales = own.group if own.group < layout.in_features else 1
            column_step = math.lcm(column_step, scales, 2 * m if own.core == "int4" else 1)
        if any(end % row_step for part in joined for end in (part.start, part.stop) if end != layout.out_features):
            pieces, step, what = {len(part) * ranks for part in rows}, row_step, f"A of {row_step} output"
        elif any(end % column_step for end in (columns.start, columns.stop) if end != layout.in_features):
            pieces, step, what = (
                {layout.in_features},
                column_step,
                f"B, its pattern, mask or scales, {column_step} input",
            )
        else:
            return Piece(tuple(joined), columns, layout)
        sizes = [size for size in range(1, MAX_RANKS + 1) if all(piece % (size * step) == 0 for piece in pieces)]
        raise ArmorError(
            f"{name}: {ranks} ranks would cut a block of {what} channels; expected a tensor parallel size of "
            f"{', '.join(map(str, sizes or [1]))} (this linear is {layout.out_features} x {layout.in_features})"
        )
    return Piece(tuple(joined), columns, layout)
