"""Every weight stays, as an int8 with a scale for each output: near lossless at 8 bits. The baseline of deployment.

Each number goes to the nearest. The scale is not only the one that holds the largest number of the row: some are
tried, and the one with the least error is taken, each input weighed by its mean square.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from armor.core.quantization import Quantization
from armor.methods import method
from armor.methods.solver.memory import rounding_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from armor.core.factorization import Factorization


def _stored(shape: tuple[int, int]) -> Quantization:
    return Quantization("int8", None, shape[1])


@method("int8", source="Jacob et al. 2018, arXiv 1712.05877", memory=rounding_bytes, stored=_stored)
def int8(weight: Tensor, importance: Tensor) -> Factorization:
    """Round weight (out, in) under importance (in,), any float dtype. Raises ValueError for bad input."""
    from armor.methods.solver.nearest import to_nearest

    return to_nearest(weight, importance, _stored((weight.shape[0], weight.shape[1])))
