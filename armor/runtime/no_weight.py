"""What a packed linear has in the place of a dense weight: all that can be said of one without having it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from armor.core.errors import ArmorError

__all__ = ["NoWeight", "NoWeightError"]


class NoWeightError(ArmorError, AttributeError):
    """Both, so that hasattr and getattr with a default may ask a weight that is not there for anything.

    `module` is the name of the linear, if the weight was given one.
    """

    module = ""


class NoWeight:
    """The weight of an ArmorLinear to libraries that ask for one: its device, dtype and shape (out, in)."""

    def __init__(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int], module: str = "") -> None:
        self.device, self.dtype, self.shape, self._module = device, dtype, torch.Size(shape), module

    def __getattr__(self, name: str) -> None:
        error = NoWeightError(
            f"weight.{name}: an ArmorLinear holds A, S and B, no dense weight to read or change; to merge an adapter, "
            "load the model anew, call its dequantize(), and put the adapter on that"
        )
        error.module = self._module
        raise error

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> None:
        """A function of torch was given it: the same error."""
        leaves, _ = pytree.tree_flatten((args, kwargs))
        getattr(next(leaf for leaf in leaves if isinstance(leaf, cls)), getattr(function, "__name__", "product"))
