"""A factorization W ~ A·S·B of one weight.

`core` is S, N:M sparse; `left` is A and `right` is B, block diagonal (see `armor.core.blockdiag`). Methods that only
prune have neither, and W ~ S.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from armor.core import blockdiag
from armor.core.integers import expand_scales, pack_int4, unpack_int4
from armor.core.packing import pack, unpack
from armor.core.pattern import Pattern
from armor.core.quantization import Quantization

__all__ = ["SUFFIXES", "Factorization", "kept_in"]

SUFFIXES = ("core_values", "core_scales", "core_mask", "left", "left_scales", "right", "right_scales")
"""Of the tensors that stand for a weight, in the order of a file."""


@dataclass(frozen=True)
class Factorization:
    """W ~ A·S·B, in the dtype that it is stored in.

    core (out, in), mask (out, in) bool, left (out/d, d, d) or None, right (in/d, d, d) or None. `loss` and `start_loss`
    are the proxy loss of these factors, as stored, and of plain NoWag-P pruning, both relative to that of a zero
    matrix; `trace` lists (iteration, seconds, best relative loss so far).

    With `quantization` core, and left and right too where it says so, are int8, and their numbers are these times
    core_scales (out, groups), left_scales (out,) and right_scales (in,), a scale for each row of A and B.
    """

    core: Tensor
    mask: Tensor
    pattern: Pattern
    left: Tensor | None = None
    right: Tensor | None = None
    loss: float = float("nan")
    start_loss: float = float("nan")
    trace: list[tuple[int, float, float]] = field(default_factory=list)
    quantization: Quantization | None = None
    core_scales: Tensor | None = None
    left_scales: Tensor | None = None
    right_scales: Tensor | None = None

    def to(self, device: torch.device | str) -> Factorization:
        """The same on `device`."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def in_floats(self) -> Factorization:
        """The same with all numbers as floats: those that were integers in float32, exactly."""
        if self.quantization is None:
            return self
        assert self.core_scales is not None
        scales = expand_scales(self.core_scales.float(), self.quantization.group, self.core.shape[1])
        sides = (_multiplied_out(self.left, self.left_scales), _multiplied_out(self.right, self.right_scales))
        none: dict[str, Any] = {"quantization": None, "core_scales": None, "left_scales": None, "right_scales": None}
        return replace(self, core=self.core * scales, left=sides[0], right=sides[1], **none)

    def reconstruct(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A·S·B as a dense (out, in) matrix of `dtype`, multiplied in that dtype."""
        own = self.in_floats()
        weight = own.core.to(dtype)
        if own.right is not None:
            weight = blockdiag.multiply(own.right.to(dtype).transpose(1, 2), weight)  # S B: each row s becomes Bᵀ s
        if own.left is not None:
            weight = blockdiag.multiply(own.left.to(dtype), weight.T).T
        return weight

    def tensors(self) -> dict[str, Tensor]:
        """The packed tensors by suffix, as factors files and checkpoints hold them."""
        values, bits = pack(self.core, self.mask)
        if self.quantization is not None and self.quantization.core == "int4":
            values = pack_int4(values)
        found = {
            "core_values": values,
            "core_scales": self.core_scales,
            "core_mask": None if self.pattern.is_dense else bits,
            "left": self.left,
            "left_scales": self.left_scales,
            "right": self.right,
            "right_scales": self.right_scales,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def of_tensors(
        cls, tensors: Mapping[str, Tensor], columns: int, pattern: Pattern, quantization: Quantization | None
    ) -> Factorization:
        """The factors (out, columns) whose `tensors` these are. The mask must be of the pattern."""
        others: dict[str, Any] = {k: t for k, t in tensors.items() if k not in ("core_values", "core_mask")}
        values, bits = tensors["core_values"], tensors.get("core_mask")
        if quantization is not None and quantization.core == "int4":
            values = unpack_int4(values, kept_in(columns, pattern))
        if bits is None:
            core, mask = values, torch.ones_like(values, dtype=torch.bool)
        else:
            core, mask = unpack(values, bits, columns, pattern)
        return cls(core, mask, pattern, quantization=quantization, **others)


def kept_in(columns: int, pattern: Pattern) -> int:
    """How many entries a row of `columns` keeps."""
    n, m = pattern.group(columns)
    return columns // m * n


def _multiplied_out(blocks: Tensor | None, scales: Tensor | None) -> Tensor | None:
    if blocks is None or scales is None:
        return blocks
    return blocks * scales.float().view(len(blocks), -1, 1)
