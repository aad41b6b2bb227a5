"""The largest |W|·√d of every group stay, d the mean square of the input: what a weight adds to the output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from armor.methods import method
from armor.methods.solver.memory import pruning_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from armor.core.factorization import Factorization
    from armor.core.pattern import PatternLike


@method("Wanda", source="Sun et al. 2023, arXiv 2306.11695", memory=pruning_bytes(24))
def wanda(weight: Tensor, importance: Tensor, *, pattern: PatternLike = "2:4") -> Factorization:
    """Keep the n largest |W|·√importance of every group.

    weight (out, in), importance (in,), any float dtype. Raises ValueError for bad input.
    """
    from armor.methods.solver.pruning import prune

    return prune(weight, importance, pattern, lambda o, w: w.abs().double() * o.importance.sqrt())
