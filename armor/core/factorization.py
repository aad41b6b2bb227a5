"""A factorization W ~ A·S·B of one weight.

`core` is S, N:M sparse; `left` is A and `right` is B, block diagonal (see `armor.core.blockdiag`). Methods that only
prune have neither, and W ~ S.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from armor.core import blockdiag
from armor.core.packing import pack
from armor.core.pattern import Pattern

__all__ = ["Factorization"]


@dataclass(frozen=True)
class Factorization:
    """W ~ A·S·B, in the dtype that it is stored in.

    core (out, in), mask (out, in) bool, left (out/d, d, d) or None, right (in/d, d, d) or None. `loss` and `start_loss`
    are the proxy loss of these factors, as stored, and of plain NoWag-P pruning, both relative to that of a zero
    matrix; `trace` lists (iteration, seconds, best relative loss so far).
    """

    core: Tensor
    mask: Tensor
    pattern: Pattern
    left: Tensor | None = None
    right: Tensor | None = None
    loss: float = float("nan")
    start_loss: float = float("nan")
    trace: list[tuple[int, float, float]] = field(default_factory=list)

    def reconstruct(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A·S·B as a dense (out, in) matrix of `dtype`, multiplied in that dtype."""
        weight = self.core.to(dtype)
        if self.right is not None:
            weight = blockdiag.multiply(self.right.to(dtype).transpose(1, 2), weight)  # S B: each row s becomes Bᵀ s
        if self.left is not None:
            weight = blockdiag.multiply(self.left.to(dtype), weight.T).T
        return weight

    def tensors(self) -> dict[str, Tensor]:
        """The packed tensors by suffix, as factors files and checkpoints hold them."""
        values, bits = pack(self.core, self.mask)
        wrappers = {"left": self.left, "right": self.right}
        return {"core_values": values, "core_mask": bits} | {k: v for k, v in wrappers.items() if v is not None}
