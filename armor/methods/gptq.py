"""GPTQ keeps every weight as an int4 and rounds column by column; the columns to come make up for the error.

It is SparseGPT's step with rounding in the place of pruning: with H = XXᵀ, and Uᵀ U its inverse, an error of an entry
moves those behind it by the row of U. It needs Gram matrices. The scales of a group are searched when it is reached,
from weights that have moved already. Columns keep their order. Updates beyond 128 columns wait until the 128 are done
and are then one matrix product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from armor.core.quantization import Quantization
from armor.methods import method
from armor.methods.solver.memory import rounding_bytes
from armor.methods.solver.settings import GroupSettings

if TYPE_CHECKING:
    from torch import Tensor

    from armor.core.factorization import Factorization

WIDTH = 128  # columns between two products


def _stored(shape: tuple[int, int], *, settings: GroupSettings) -> Quantization:
    return Quantization("int4", None, settings.group)


def _peak_bytes(shape: tuple[int, int], itemsize: int, *, settings: GroupSettings) -> int:
    """That of the inverse factor of the Gram matrix, of which a float64 copy and two results; or that of the end."""
    rows, columns = shape
    entries = rows * columns
    start = 32 * columns**2 + entries * (itemsize + 2)
    return max(start, 8 * columns**2 + rounding_bytes(shape, itemsize) + 6 * entries)


@method("GPTQ", source="Frantar et al. 2023, arXiv 2210.17323", memory=_peak_bytes, stored=_stored)
def gptq(
    weight: Tensor,
    importance: Tensor,
    gram: Tensor,
    *,
    settings: GroupSettings = GroupSettings(),
) -> Factorization:
    """Round weight (out, in) under gram (in, in), the mean of x xᵀ; importance (in,) weighs the errors of scales.

    Any float dtype; computed in float32, the inverse in float64. Raises ValueError for bad input.
    """
    import torch

    from armor.core.integers import expand_scales, rounded
    from armor.methods.solver.feedback import swept
    from armor.methods.solver.nearest import held, to_nearest
    from armor.methods.sparsegpt import inverse_factor

    kind = _stored((weight.shape[0], weight.shape[1]), settings=settings)
    nearest = to_nearest(weight, importance, kind)
    columns = weight.shape[1]
    upper, dead = inverse_factor(gram.to(weight.device), columns)
    w = weight.float().masked_fill(dead, 0)
    numbers, scales = torch.empty_like(nearest.core), []
    for start in range(0, columns, kind.group):
        end = min(start + kind.group, columns)
        _, own = rounded(w[:, start:end], kind.core, kind.group, importance[start:end])
        scales.append(own)
        for first in range(start, end, WIDTH):
            here = slice(first, min(first + WIDTH, end))
            spread = expand_scales(own.float(), kind.group, here.stop - here.start)
            found, errors = swept(w[:, here], upper[here, here], spread, kind.core)
            numbers[:, here] = found.to(torch.int8)
            w[:, here.stop :] -= errors @ upper[here, here.stop :]
    return held(weight, importance, kind, numbers, torch.cat(scales, 1), start=nearest.loss)
