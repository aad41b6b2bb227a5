"""Numbers as small integers, or floats of a byte, with a scale for each group of a row: q·s.

A row is cut into groups of consecutive columns, the last of which may be shorter, and every group has one scale. int8
holds −127 to 127, int4 −8 to 7, fp8 the floats of e4m3 (Micikevicius et al. 2022, arXiv 2209.05433) without its NaN. So
q·s, with a scale in bfloat16, is exact in float32: that is what is meant by the numbers of a quantized matrix,
everywhere. Two int4 share a byte, the first of them in its low half.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from armor.core.quantization import LIMITS, NumberType, groups_of

__all__ = ["DTYPES", "expand_scales", "nearest", "pack_int4", "round_", "rounded", "unpack_int4"]

DTYPES: dict[NumberType, torch.dtype] = {"int8": torch.int8, "int4": torch.int8, "fp8": torch.float8_e4m3fn}
"""What numbers of a type are held as, one by one."""
SHARES: dict[NumberType, tuple[float, ...]] = {
    "int8": (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.87),
    "int4": tuple(8 / 7 - 0.04 * i for i in range(16)),
    "fp8": tuple(2 ** (i / 8) for i in range(-1, 8)),  # twice a scale has the same floats, but for the least
}
"""Of the scale that just holds a group's largest number: the scales that are tried."""


def expand_scales(scales: Tensor, group: int, columns: int) -> Tensor:
    """`scales` (rows, groups) as the scale of every entry, (rows, columns)."""
    return scales.repeat_interleave(group, 1)[:, :columns]


def rounded(values: Tensor, kind: NumberType, group: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`values` (rows, columns) as numbers of type `kind` (rows, columns) and scales (rows, groups) bfloat16.

    Each number goes to the nearest. Of some scales for each group the one with the least squared error is taken, every
    column weighed by `importance` (columns,) or (rows, columns), and then fitted to the numbers by least squares where
    that helps. A group of zeros has the scale 0.
    """
    rows, columns = values.shape
    count = groups_of(columns, group)
    short = count * group - columns
    w = F.pad(values.float(), (0, short)).view(rows, count, group)
    h = torch.ones(1, columns, device=values.device) if importance is None else importance.float().view(-1, columns)
    h = h / h.mean().clamp_min(1e-38)
    h = F.pad(h.clamp_min(1e-4), (0, short)).view(-1, count, group)  # a floor, so that no number counts for nothing
    least, most = LIMITS[kind]
    high, low = w.amax(2), w.amin(2)
    # Where there is one number more below zero than above, the larger side may have it, by a scale of its sign.
    top = torch.where(high > -low, high, low) / (least if -least > most else most)
    if -least == most:
        top = top.abs()
    best_scale, best_error = torch.zeros_like(top), (h * w.square()).sum(2)
    for share in SHARES[kind]:
        scale = top * share
        for _ in range(2):
            scale = scale.to(torch.bfloat16).float()
            q = nearest(w, scale[..., None], kind)
            error = (h * (w - q * scale[..., None]).square()).sum(2)
            better = error < best_error
            best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
            size = (h * q.square()).sum(2)
            scale = torch.where(size > 0, (h * w * q).sum(2) / size.clamp_min(1e-38), scale)
    q = nearest(w, best_scale[..., None], kind)
    return q.view(rows, -1)[:, :columns].to(DTYPES[kind]), best_scale.to(torch.bfloat16)


def nearest(values: Tensor, scale: Tensor, kind: NumberType) -> Tensor:
    """The numbers of type `kind` whose product with `scale` is nearest to `values`, in float32; 0 for a scale of 0."""
    return torch.where(scale == 0, 0.0, round_(values / torch.where(scale == 0, 1.0, scale), kind))


def round_(values: Tensor, kind: NumberType) -> Tensor:
    """Put the nearest number of type `kind` in the place of every one of `values` float32, which is returned."""
    values.clamp_(*LIMITS[kind])
    return values.copy_(values.to(DTYPES[kind])) if DTYPES[kind].is_floating_point else values.round_()


def pack_int4(values: Tensor) -> Tensor:
    """int4 `values` (rows, n) int8 as bytes (rows, ⌈n / 2⌉) uint8."""
    pairs = F.pad(values, (0, values.shape[1] % 2)).view(torch.uint8).view(len(values), -1, 2)
    return (pairs[..., 0] & 15) | (pairs[..., 1] << 4)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """The int4 numbers (rows, columns) int8 in `packed` (rows, ⌈columns / 2⌉) uint8."""
    halves = torch.stack((packed & 15, packed >> 4), 2).view(len(packed), -1)[:, :columns]
    return ((halves ^ 8).to(torch.int8) - 8).contiguous()
