"""Rounding with feedback: entries of a row go one after the other, and those behind make up for each error.

The rule is that of Frantar et al. 2023 (GPTQ, arXiv 2210.17323). It needs U, upper triangular, with Uᵀ U the inverse of
the row's Hessian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from armor.core.integers import nearest
from armor.core.quantization import NumberType

__all__ = ["swept"]


def swept(values: Tensor, upper: Tensor, scales: Tensor, kind: NumberType) -> tuple[Tensor, Tensor]:
    """`values` (..., k) as numbers of type `kind`, of `scales` alike, and the errors that they make.

    `upper` (..., k, k) is U. An error is what is lost of an entry by the diagonal of U: with the row of U it says what
    the entries behind are to take up, those beyond the k too.
    """
    rest, found, errors = values.clone(), torch.empty_like(values), torch.empty_like(values)
    for t in range(values.shape[-1]):
        scale = scales[..., t]
        found[..., t] = q = nearest(rest[..., t], scale, kind)
        errors[..., t] = error = (rest[..., t] - q * scale) / upper[..., t, t]
        rest[..., t + 1 :] -= error[..., None] * upper[..., t, t + 1 :]
    return found, errors
