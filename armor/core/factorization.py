"""A factorization W ~ A·S·B + U·V of one weight.

`core` is S, N:M sparse; `left` is A and `right` is B, block diagonal (see `armor.core.blockdiag`); `up` is U and `down`
is V, of low rank. Methods that only prune have W ~ S, those of sparse plus low rank W ~ S + U·V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from armor.core import blockdiag
from armor.core.integers import expand_scales, pack_int4, unpack_int4
from armor.core.packing import pack, unpack
from armor.core.pattern import Pattern
from armor.core.quantization import Quantization

__all__ = ["SUFFIXES", "Factorization", "kept_in", "owner"]

SUFFIXES = ("core_values", "core_scales", "core_mask", "left", "left_scales", "right", "right_scales", "up", "down")
"""Of the tensors that stand for a weight, in the order of a file."""


@dataclass(frozen=True)
class Factorization:
    """W ~ A·S·B + U·V, in the dtype that it is stored in.

    core (out, in), mask (out, in) bool, left (out/d, d, d) or None, right (in/d, d, d) or None, up (out, rank) and down
    (rank, in) or None. `loss` and `start_loss` are the proxy loss of these factors, as stored, and of plain NoWag-P
    pruning, both relative to that of a zero matrix; `trace` lists (iteration, seconds, best relative loss so far).

    With `quantization` core is int8 or float8_e4m3fn, and left and right are int8 where it says so; their numbers are
    these times core_scales (out, groups), left_scales (out,) and right_scales (in,), a scale for each row of A and B.
    up and down are floats always.

    Linears with the same input may share B. One of them holds it. The others have the last part of its name in
    `right_of`, as q_proj, and B and its scales are not among their `tensors()`.
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
    right_of: str | None = None
    up: Tensor | None = None
    down: Tensor | None = None

    def to(self, device: torch.device | str) -> Factorization:
        """The same on `device`."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def in_floats(self) -> Factorization:
        """The same with all numbers as floats: those that had scales in float32, exactly."""
        if self.quantization is None:
            return self
        assert self.core_scales is not None
        scales = expand_scales(self.core_scales.float(), self.quantization.group, self.core.shape[1])
        sides = (_multiplied_out(self.left, self.left_scales), _multiplied_out(self.right, self.right_scales))
        none: dict[str, Any] = {"quantization": None, "core_scales": None, "left_scales": None, "right_scales": None}
        return replace(self, core=self.core.float() * scales, left=sides[0], right=sides[1], **none)

    def reconstruct(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A·S·B + U·V as a dense (out, in) matrix of `dtype`, multiplied in that dtype."""
        own = self.in_floats()
        weight = own.core.to(dtype)
        if own.right is not None:
            weight = blockdiag.multiply(own.right.to(dtype).transpose(1, 2), weight)  # S B: each row s becomes Bᵀ s
        if own.left is not None:
            weight = blockdiag.multiply(own.left.to(dtype), weight.T).T
        if own.up is not None and own.down is not None:
            weight = weight + own.up.to(dtype) @ own.down.to(dtype)
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
            "right": None if self.right_of else self.right,
            "right_scales": None if self.right_of else self.right_scales,
            "up": self.up,
            "down": self.down,
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

    @classmethod
    def stacked(cls, parts: Sequence[Factorization]) -> Factorization:
        """The factors of the weights of `parts`, which share B, one below the other; without losses."""
        first, found = parts[0], {}
        for name in ("core", "mask", "left", "core_scales", "left_scales"):
            own = [getattr(part, name) for part in parts]
            found[name] = None if own[0] is None else torch.cat(own)
        return cls(
            **found,
            pattern=first.pattern,
            right=first.right,
            right_scales=first.right_scales,
            quantization=first.quantization,
        )

    def split(self, names: Sequence[str], rows: Sequence[int]) -> list[Factorization]:
        """The factors of weights that are stacked here, `rows` of each; the first of `names` (full) holds B."""
        parts, start = [], 0
        for name, count in zip(names, rows, strict=True):
            own, stop = {}, start + count
            for key in ("core", "mask", "left", "core_scales", "left_scales"):
                if (tensor := getattr(self, key)) is not None:
                    size = self.core.shape[0] // len(tensor)
                    own[key] = tensor[start // size : stop // size].clone()
            parts.append(replace(self, **own, right_of=None if name == names[0] else names[0].rpartition(".")[2]))
            start = stop
        return parts


def kept_in(columns: int, pattern: Pattern) -> int:
    """How many entries a row of `columns` keeps."""
    n, m = pattern.group(columns)
    return columns // m * n


def owner(name: str, suffix: str, right_of: str | None) -> str:
    """The full name of the linear that holds `suffix` of linear `name`: of a shared B the one that `right_of` says."""
    parent, dot, _ = name.rpartition(".")
    return f"{parent}{dot}{right_of}" if right_of and suffix in ("right", "right_scales") else name


def _multiplied_out(blocks: Tensor | None, scales: Tensor | None) -> Tensor | None:
    if blocks is None or scales is None:
        return blocks
    return blocks * scales.float().view(len(blocks), -1, 1)
