"""Linears that stay dense whatever a recipe says, because of what they are.

Some are not called: another module takes their weight and multiplies by itself, as Mamba's mixers do. A packed linear
has no weight to take. Such a one is found in two ways. The decoder layer runs once with stand-ins that have no weight
either, which finds what happens here. And the source of the module above is searched for uses of the weight, which
finds what happens on another path, as with kernels on a GPU. The others are routers, linears with a forward of their
own, and those that several layers share: each layer would compress them for inputs of its own.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from armor.core.errors import ArmorError
from armor.execution.log import log
from armor.runtime.experts import alike
from armor.runtime.fused import routers
from armor.runtime.no_weight import NoWeight, NoWeightError

__all__ = ["BY_HAND", "by_hand", "check_linears", "left_dense", "tell"]

BY_HAND = "another module multiplies with it"
USED = r"\bself\.{name}\.weight\b(?!\.(?:device|dtype|shape)\b)"
ABOVE = r"\.{name}\.weight\b(?!\.(?:device|dtype|shape)\b)"
"""How a model takes the weight of a linear in its layers, by the linear's name there: RWKV scales some."""


class _WithoutWeight(nn.Linear):
    """A linear that can be called and has no weight to give."""

    called = False

    def __init__(self, name: str, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self._linear = (linear,)  # a tuple hides it from nn.Module, whose child it would become
        shape = linear.out_features, linear.in_features
        self._no_weight = NoWeight(linear.weight.device, linear.weight.dtype, shape, name)

    @property
    def weight(self) -> NoWeight:  # pyright: ignore[reportIncompatibleVariableOverride]  it has none to give
        return self._no_weight

    def forward(self, input: Tensor) -> Tensor:
        self.called = True
        return self._linear[0](input)


def check_linears(layers: nn.ModuleList, model: nn.Module, where: object) -> None:
    """Raise ArmorError, naming the model as `where`, if its decoder layers hold no linear."""
    if not any(isinstance(module, nn.Linear) for module in layers.modules()):
        raise ArmorError(f"{where}: the decoder layers of {type(model).__name__} hold no linear; nothing to compress")


def left_dense(
    model: PreTrainedModel, layer: nn.Module, run: Callable[[nn.Module], object], shared: Collection[str] = ()
) -> dict[str, str]:
    """Why linears of a decoder layer of `model` stay dense, by their name in it; others can be compressed.

    `run` calls the layer, `shared` are its tensors, by their name in it, that other layers have too. Raises ArmorError
    as `by_hand` does.
    """
    taken, idle = by_hand(layer, run)
    above = "".join(map(_source, {type(module) for module in (model, model.base_model, model.get_decoder())}))
    names = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    taken += [name for name in names if re.search(ABOVE.format(name=re.escape(name)), above)]
    return (
        dict.fromkeys(taken, BY_HAND)
        | dict.fromkeys(idle, "no text passes it")
        | dict.fromkeys(_other_forward(layer), "its class has a forward of its own")
        | dict.fromkeys(routers(layer), "a router")
        | dict.fromkeys((name for name in names if f"{name}.weight" in shared), "several layers share it")
    )


def tell(left: Mapping[str, str], where: object, is_all: bool) -> None:
    """Warn of the linears, by full name with their reason, whose weight another module takes.

    Raises ArmorError, naming the model as `where`, if these are all linears that there are (`is_all`).
    """
    names = [name for name, reason in left.items() if reason == BY_HAND]
    if names:
        told = ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
        log.warning("%d linears stay dense, for another module multiplies with their weight: %s", len(names), told)
    if is_all:
        name, reason = next(iter(left.items()))
        raise ArmorError(f"{where}: every linear of the decoder layers stays dense: {name}: {reason}")


def by_hand(layer: nn.Module, run: Callable[[nn.Module], object]) -> tuple[list[str], list[str]]:
    """The names, within `layer`, of linears that other modules multiply with by themselves, and of those that nothing
    calls, as cross-attention without an image; `run` calls the layer.

    Where the layer fails as it is, its error is raised. Raises ArmorError where it runs as it is, and not with linears
    that have no weight.
    """
    other = {*_other_forward(layer), *alike(layer)}  # an expert calls its linears: armor.runtime.experts
    linears = {n: module for n, module in layer.named_modules() if isinstance(module, nn.Linear) and n not in other}
    found = {name for name in linears if _is_taken(layer, name)}
    failed: Exception | None = None
    while failed is None:
        try:
            with _replaced(layer, {name: linear for name, linear in linears.items() if name not in found}) as stand_ins:
                run(layer)
        except NoWeightError as error:
            found.add(error.module)
        except Exception as error:
            failed = error
        else:
            idle = [name for name, stand_in in stand_ins.items() if not stand_in.called]
            return [name for name in linears if name in found], idle
    run(layer)
    said = " ".join(str(failed).split())
    raise ArmorError(
        f"{type(layer).__name__}: runs, but not with linears that have no weight ({type(failed).__name__}: {said}), so "
        "a compressed model of this kind would not run"
    ) from failed


def _other_forward(layer: nn.Module) -> list[str]:
    """The names, within `layer`, of linears whose class computes something else than a linear, as some routers do."""
    return [
        name for name, module in layer.named_modules() if isinstance(module, nn.Linear) and not _is_linear(type(module))
    ]


@cache
def _is_linear(kind: type[nn.Linear]) -> bool:
    """Whether a class computes W x + b, if by code of its own, as Falcon's does: tried on a small instance."""
    if kind.forward is nn.Linear.forward:
        return True
    x, weight = torch.randn(2, 3, 5), torch.randn(4, 5)
    for bias in (torch.randn(4), None):
        probe = kind.__new__(kind)
        nn.Module.__init__(probe)
        probe.in_features, probe.out_features, probe.weight = 5, 4, nn.Parameter(weight)
        probe.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        try:
            if not torch.allclose(probe(x), F.linear(x, weight, bias), rtol=1e-4, atol=1e-5):
                return False
        except Exception:
            return False
    return True


def _is_taken(layer: nn.Module, name: str) -> bool:
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
def _replaced(layer: nn.Module, linears: dict[str, nn.Linear]) -> Iterator[dict[str, _WithoutWeight]]:
    stand_ins = {name: _WithoutWeight(name, linear) for name, linear in linears.items()}
    for name, stand_in in stand_ins.items():
        layer.set_submodule(name, stand_in)
    try:
        yield stand_ins
    finally:
        for name, linear in linears.items():
            layer.set_submodule(name, linear)
