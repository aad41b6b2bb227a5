"""Every weight stays, as an int4 with a scale for each group of a row, rounded to the nearest.

Of some scales for each group the one with the least error is taken, each input weighed by its mean square.
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


def _stored(shape: tuple[int, int], *, settings: GroupSettings) -> Quantization:
    return Quantization("int4", None, settings.group)


@method("int4", source="Dettmers and Zettlemoyer 2023, arXiv 2212.09720", memory=rounding_bytes, stored=_stored)
def int4(
    weight: Tensor,
    importance: Tensor,
    *,
    settings: GroupSettings = GroupSettings(),
) -> Factorization:
    """Round weight (out, in) under importance (in,), any float dtype. Raises ValueError for bad input."""
    from armor.methods.solver.nearest import to_nearest

    return to_nearest(weight, importance, _stored((weight.shape[0], weight.shape[1]), settings=settings))
