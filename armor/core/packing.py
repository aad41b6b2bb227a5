"""The packed core: the kept values of each row in column order, and one bit per position.

A core (out, in) under a pattern n:m becomes `values` (out, in·n/m) and `bits` (out, ceil(in/8)) uint8. Bit b of byte j,
least significant first, tells whether column 8j+b is kept. Bits past the last column are zero. A kept position may hold
a zero. For 2:4 in bf16 that is 8 + 1 bits a weight, 0.5625 of dense. One bit a position costs 2:4 nothing over the
two-bit indices of sparse tensor cores (4 bits a group either way) and serves every other pattern too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from armor.core.pattern import Pattern

__all__ = ["pack", "pack_mask", "unpack", "unpack_mask"]


def pack_mask(mask: Tensor) -> Tensor:
    """`mask` (out, in) bool as bits (out, ceil(in/8)) uint8."""
    rows, columns = mask.shape
    bytes_ = F.pad(mask.to(torch.uint8), (0, -columns % 8)).reshape(rows, -1, 8)
    weights = torch.tensor([1 << b for b in range(8)], dtype=torch.uint8, device=mask.device)
    return (bytes_ * weights).sum(-1, dtype=torch.uint8)


# For every byte: its bits, and the positions of those that are set, in order, before those that are not.
_BITS = ((torch.arange(256, dtype=torch.uint8, device="cpu").unsqueeze(1) >> torch.arange(8, device="cpu")) & 1).bool()
_PLACES = _BITS.int().argsort(dim=1, descending=True, stable=True)


def unpack_mask(bits: Tensor, columns: int) -> Tensor:
    """The mask (out, columns) bool of `bits` (out, ceil(columns/8)) uint8."""
    mask = _BITS.to(bits.device).index_select(0, bits.flatten().int())
    return mask.view(bits.shape[0], -1)[:, :columns]


def pack(core: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pack `core` (out, in), any dtype, under `mask` (out, in) bool, the same count in every row: (values, bits)."""
    return core[mask].reshape(core.shape[0], -1), pack_mask(mask)


def unpack(values: Tensor, bits: Tensor, columns: int, pattern: Pattern | None = None) -> tuple[Tensor, Tensor]:
    """The (core, mask) that were packed, both (out, columns).

    Faster where `pattern` is given and no group crosses a byte; the mask must then be of that pattern.
    """
    if values.dtype == torch.float8_e4m3fn:  # which torch cannot scatter: its bytes can be
        core, mask = unpack(values.view(torch.int8), bits, columns, pattern)
        return core.view(values.dtype), mask
    mask = unpack_mask(bits, columns)
    core = values.new_zeros(mask.shape)
    if pattern is not None and pattern.m and 8 % pattern.m == 0 and columns % 8 == 0:
        kept = 8 * pattern.n // pattern.m  # in every byte
        places = _PLACES[:, :kept].to(bits.device).index_select(0, bits.flatten().int())
        core.view(-1, 8).scatter_(1, places, values.reshape(-1, kept))
    else:  # not core[mask] = ..., whose count of ones torch.compile cannot know
        core.masked_scatter_(mask, values)
    return core, mask
