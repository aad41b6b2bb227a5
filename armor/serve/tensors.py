"""The tensors of a packed linear as parameters of vLLM's modules, on a CPU views of the mapped file."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LIBRARY", "PAIR", "SCALES", "SUFFIXES", "parameter", "view"]

SUFFIXES = ("core_values", "core_mask", "left", "right")
SCALES = ("core_scales", "left_scales", "right_scales")  # where these are integers
PAIR = ("down", "up")  # of low rank
LIBRARY = torch.library.Library("armor", "FRAGMENT")
"""Of what torch.compile sees as one call."""


def parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """One without a gradient, its numbers not set."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def view(own: Tensor, found: Tensor) -> bool:
    """Let `own` be a view of the mapped file that `found` is of; False where it must be copied."""
    alike = (found.shape, found.dtype, found.device) == (own.shape, own.dtype, own.device)
    if alike and found.is_contiguous():
        own.data = found
        return True
    return False
