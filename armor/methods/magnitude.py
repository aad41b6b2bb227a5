"""The largest |W| of every group stay. It looks at no input: the baseline of all baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from armor.methods import method
from armor.methods.solver.memory import pruning_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from armor.core.factorization import Factorization
    from armor.core.pattern import PatternLike


@method("magnitude", source="Han et al. 2015, arXiv 1506.02626", memory=pruning_bytes(16))
def magnitude(weight: Tensor, importance: Tensor, *, pattern: PatternLike = "2:4") -> Factorization:
    """Keep the n largest |W| of every group; importance serves only the loss.

    weight (out, in), importance (in,), any float dtype. Raises ValueError for bad input.
    """
    from armor.methods.solver.pruning import prune

    return prune(weight, importance, pattern, lambda _, w: w.abs())
