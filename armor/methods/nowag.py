"""The largest W̄²·d of every group stay; W̄ is the weight with columns, then rows of norm 1, d the input's mean square.

Equal rows count alike, whatever their scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from armor.methods import method
from armor.methods.solver.memory import pruning_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from armor.core.factorization import Factorization
    from armor.core.pattern import PatternLike


@method("NoWag-P", source="Liu et al. 2025, arXiv 2504.14569", memory=pruning_bytes(16))
def nowag(weight: Tensor, importance: Tensor, *, pattern: PatternLike = "2:4") -> Factorization:
    """Keep the n largest W̄²·importance of every group.

    weight (out, in), importance (in,), any float dtype. Raises ValueError for bad input.
    """
    from armor.methods.solver.pruning import prune

    return prune(weight, importance, pattern, lambda o, w: o.score(w))
