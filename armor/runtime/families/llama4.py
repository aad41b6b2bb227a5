"""Llama 4: each expert is called with a copy of all tokens, times what the router gives them.

Rows of tokens that an expert is not given are zeros, and so is what it makes of them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from armor.runtime.experts import Experts, Routes

__all__ = ["Llama4Experts"]


class Llama4Experts(Experts):
    """The experts of one layer, called with (experts * tokens, in)."""

    OF = "Llama4TextExperts"
    LAYOUT: ClassVar[dict[str, bool]] = {"has_bias": False, "is_transposed": True, "is_concatenated": True}

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """As of other experts, but that a token's weight is in it, so that the weights are ones."""
        x = self.in_order(args, kwargs)[0]
        x = x.view(self.count, -1, x.shape[-1])  # (expert, token, in)
        index = x.any(-1).int().argmax(0)[:, None]
        return x.sum(0), index, torch.ones_like(index, dtype=x.dtype)

    def routes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routes:
        """As of other experts, but of rows of all experts, as the call has them."""
        x = self.in_order(args, kwargs)[0]
        given = x.view(self.count, -1, x.shape[-1]).any(-1)  # (expert, token)
        rows = given.flatten().nonzero()[:, 0]
        return Routes(x, rows, x.new_ones(len(rows), 1), given.sum(1).tolist())
