"""Linears that are not called: another module takes their weight and multiplies by itself, as Mamba's mixers do.

A packed linear has no weight to take, so such a one must stay dense. It is found in two ways. The decoder layer runs
once on the meta device with stand-ins that have no weight either, which finds what happens here. And the source of the
module above is searched for uses of the weight, which finds what happens on another path, as with kernels on a GPU.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from armor.core.errors import ArmorError
from armor.runtime.no_weight import NoWeight, NoWeightError

__all__ = ["by_hand", "is_taken", "other_forward"]

USED = r"\bself\.{name}\.weight\b(?!\.(?:device|dtype|shape)\b)"


class _StandIn(nn.Linear):
    """A linear of the same shape on the meta device, without a weight."""

    def __init__(self, name: str, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self._no_weight = NoWeight(
            torch.device("meta"), linear.weight.dtype, (linear.out_features, linear.in_features), name
        )

    @property
    def weight(self) -> NoWeight:  # pyright: ignore[reportIncompatibleVariableOverride]  it has none to give
        return self._no_weight

    def forward(self, input: Tensor) -> Tensor:
        return input.new_empty((*input.shape[:-1], self.out_features))


def by_hand(layer: nn.Module, run: Callable[[nn.Module], object]) -> list[str]:
    """The names, within `layer`, of linears that other modules multiply with by themselves; `run` calls the layer.

    The layer is on the meta device. Where it fails as it is, its error is raised. Raises ArmorError where it runs as it
    is, and not with linears that have no weight.
    """
    own = {*other_forward(layer)}
    linears = {n: module for n, module in layer.named_modules() if isinstance(module, nn.Linear) and n not in own}
    found = {name for name in linears if is_taken(layer, name)}
    failed: Exception | None = None
    while failed is None:
        try:
            with _replaced(layer, {name: linear for name, linear in linears.items() if name not in found}):
                run(layer)
        except NoWeightError as error:
            found.add(error.module)
        except Exception as error:  # noqa: BLE001  whatever a layer does with what it is not given here
            failed = error
        else:
            return [name for name in linears if name in found]
    run(layer)
    said = " ".join(str(failed).split())
    raise ArmorError(
        f"{type(layer).__name__}: runs, but not with linears that have no weight ({type(failed).__name__}: {said}), so "
        "a compressed model of this kind would not run"
    ) from failed


def other_forward(layer: nn.Module) -> list[str]:
    """The names, within `layer`, of linears whose class computes something else than a linear, as some routers do."""
    return [
        name
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    ]


def is_taken(layer: nn.Module, name: str) -> bool:
    """Whether the source of the module above the linear `name` of `layer` takes its weight."""
    above, _, own = name.rpartition(".")
    return re.search(USED.format(name=re.escape(own)), _source(type(layer.get_submodule(above)))) is not None


@cache  # a mixture has thousands of modules of one class
def _source(kind: type) -> str:
    """The source of a class; empty for one that was made without a file."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


@contextmanager
def _replaced(layer: nn.Module, linears: dict[str, nn.Linear]) -> Iterator[None]:
    for name, linear in linears.items():
        layer.set_submodule(name, _StandIn(name, linear))
    try:
        yield
    finally:
        for name, linear in linears.items():
            layer.set_submodule(name, linear)
