"""LoRA beside a pruned weight, S + U·V: S is SparseGPT's, U starts at zero and V at random numbers, to be trained.

Untrained it is SparseGPT. `refine` and `tune` train U and V: with `core: false` and `norm_rate: 0` these alone, as LoRA
does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from armor.core.pattern import PatternLike
from armor.methods import method
from armor.methods.sparsegpt import peak_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from armor.core.factorization import Factorization


def _peak_bytes(shape: tuple[int, int], itemsize: int, *, pattern: PatternLike, rank: int) -> int:
    return peak_bytes(shape, itemsize, pattern=pattern) + 4 * min(rank, *shape) * sum(shape)


@method("SparseGPT + LoRA", source="Hu et al. 2021, arXiv 2106.09685", memory=_peak_bytes)
def lora(
    weight: Tensor,
    importance: Tensor,
    gram: Tensor,
    *,
    pattern: PatternLike = "2:4",
    rank: int = 64,
    seed: int = 0,
) -> Factorization:
    """Prune weight (out, in) under gram (in, in) and put a pair of rank `rank` beside it.

    importance (in,) serves only the loss. V has the size at which U of that size makes a product of the weight's. So
    both may be trained at one rate. Raises ValueError for bad input.
    """
    import torch

    from armor.methods.sparsegpt import sparsegpt

    pruned = sparsegpt(weight, importance, gram, pattern=pattern)
    rank = min(rank, *weight.shape)
    if not rank:
        return pruned
    generator = torch.Generator(weight.device).manual_seed(seed)
    down = torch.randn(rank, weight.shape[1], generator=generator, device=weight.device)
    size = weight.float().square().mean().sqrt() / rank**0.5
    return replace(pruned, up=weight.new_zeros(len(weight), rank), down=(down * size.sqrt()).to(weight.dtype))
