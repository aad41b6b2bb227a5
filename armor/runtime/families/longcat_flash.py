"""LongCat-Flash: beside its experts there are some that hand a token on as it is."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from armor.runtime.experts import Experts

__all__ = ["LongcatFlashExperts"]


class LongcatFlashExperts(Experts):
    """The experts of one layer; numbers from `count` on are those that hand a token on."""

    OF = "LongcatFlashExperts"
    LAYOUT: ClassVar[dict[str, bool]] = {"has_bias": False, "is_transposed": False, "is_concatenated": True}

    def with_rest(self, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """With each token times what the router gives such experts."""
        x, index, weights = self.arguments(args, kwargs)
        kept = (weights * (index >= self.count)).sum(-1, keepdim=True)
        return output + (x * kept).to(x.dtype)
