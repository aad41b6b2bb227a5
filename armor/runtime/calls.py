"""What the decoder layers of a skeleton are called with, and what comes after them, by the model's own forward.

What a layer is called with is found by recording, for masks, rotary embeddings and the like differ by layer, family and
release. Every decoder layer is replaced by a recorder that notes its arguments and passes the hidden states on. The
model's own forward runs once. Each real layer is then called with what its recorder saw. What comes after the layers is
the model's own forward too, the last recorder handing out what the last layer made. This holds for models in which a
layer's output goes straight into the next layer and layers do not talk to each other by other ways; `observe` and
`armor.model.inspect` check it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from armor.core.errors import ArmorError
from armor.format.shards import Shards
from armor.runtime.skeleton import Skeleton, filled

__all__ = ["Call", "finish", "observe", "observe_each", "readers"]


@dataclass(frozen=True)
class Call:
    """What a decoder layer is called with beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states that a decoder layer, so called, makes of `hidden`: its output or the first of it."""
        output = layer(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple | list) else output

    def tensors(self) -> list[Tensor]:
        """All tensors in it."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def map(self, function) -> Call:
        """The call with `function` applied to each of its tensors."""
        return Call(*pytree.tree_map_only(Tensor, function, (self.args, self.kwargs)))

    def equals(self, other: Call) -> bool:
        """Whether both hold the same structure with equal values."""
        mine, structure = pytree.tree_flatten((self.args, self.kwargs))
        theirs, other_structure = pytree.tree_flatten((other.args, other.kwargs))
        return structure == other_structure and all(map(_same, mine, theirs))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    return a is b or (isinstance(a, bool | int | float | str) and type(a) is type(b) and a == b)


class _StandIn(nn.Module):
    """Stands in for a decoder layer, and has its attributes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # a tuple hides it from nn.Module, whose attributes it would become

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)


class _Recorder(_StandIn):
    """Notes what it is called with, and returns what was `made`, or the hidden states, as the layer would.

    Where that is a tuple, what stands behind them has no numbers.
    """

    made: Tensor | None = None
    seen: tuple[Any, Call] | None = None
    times = 0

    def __init__(self, layer: nn.Module, beside: dict[type, tuple[Any, ...] | None], learn: bool) -> None:
        super().__init__(layer)
        self._beside, self._learn = beside, learn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, call = args[0] if args else None, Call(args[1:], kwargs)
        self.times += 1
        self.seen = hidden, call
        layer = self._layer[0]
        if self._learn and type(layer) not in self._beside and isinstance(hidden, Tensor):
            self._beside[type(layer)] = _behind(layer, hidden, call)
        behind = self._beside.get(type(layer))
        hidden = hidden if self.made is None else self.made
        return hidden if behind is None else (hidden, *behind)


def _behind(layer: nn.Module, hidden: Tensor, call: Call) -> tuple[Any, ...] | None:
    """What a decoder layer returns behind the hidden states, on the meta device; None where it returns them alone."""
    output = _on_meta(layer, hidden, call)
    return tuple(output[1:]) if isinstance(output, tuple | list) else None


@torch.no_grad()
def _on_meta(layer: nn.Module, hidden: Tensor, call: Call, watch: TorchFunctionMode | None = None) -> Any:
    """What a decoder layer returns, without numbers; `watch` is there while it runs."""
    hidden, call = hidden.to("meta"), call.map(lambda tensor: tensor.to("meta"))
    empty = {name: t.to("meta") for name, t in [*layer.named_parameters(), *layer.named_buffers()]}
    with watch or contextlib.nullcontext():
        return functional_call(layer, empty, (hidden, *call.args), call.kwargs)


class _Reader(_StandIn):
    """Reads the layer when it is called, and drops it after."""

    def __init__(self, layer: nn.Module, name: str, shards: Shards, device: str) -> None:
        super().__init__(layer)
        self._source = name, shards, device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return filled(self._layer[0], *self._source)(*args, **kwargs)


@contextlib.contextmanager
def _replaced(skeleton: Skeleton, stand_ins: Sequence[_StandIn]) -> Iterator[None]:
    """The stand-ins are in the decoder layers' place for as long as the context lasts."""
    layers = list(skeleton.layers)
    try:
        for index, stand_in in enumerate(stand_ins):
            skeleton.layers[index] = stand_in
        yield
    finally:
        for index, layer in enumerate(layers):
            skeleton.layers[index] = layer


@contextlib.contextmanager
def _recorders(skeleton: Skeleton, learn: bool = False) -> Iterator[list[_Recorder]]:
    """Recorders in the decoder layers' place; they `learn` what these return by running one of each class."""
    recorders = [_Recorder(layer, skeleton.beside_hidden, learn) for layer in skeleton.layers]
    with _replaced(skeleton, recorders):
        yield recorders


@contextlib.contextmanager
def readers(skeleton: Skeleton, shards: Shards, device: str = "cpu") -> Iterator[PreTrainedModel]:
    """The model as one that runs whole, on `device`: its decoder layers are read when they are called, dropped after.

    What is outside of the layers must be loaded and placed. A forward pass raises ArmorError where `load_layer` does.
    """
    named = [(layer, f"{skeleton.prefix}.{index}") for index, layer in enumerate(skeleton.layers)]
    with _replaced(skeleton, [_Reader(layer, name, shards, device) for layer, name in named]):
        yield skeleton.model


def observe(skeleton: Skeleton, tokens: Tensor) -> tuple[Tensor, list[Call]]:
    """The hidden states (batch, length, hidden) before the first decoder layer, and what every layer is called with.

    tokens (batch, length) int64. What is outside of the layers must be loaded. Raises ArmorError if the model does
    something else with hidden states between two layers than to pass them on.
    """
    if not skeleton.beside_hidden and len(skeleton.layers) > 1:
        with contextlib.suppress(Exception):  # of a model that wants more of its layers than a tensor
            return _observed(skeleton, tokens, learn=False)
    return _observed(skeleton, tokens, learn=True)


def _observed(skeleton: Skeleton, tokens: Tensor, learn: bool) -> tuple[Tensor, list[Call]]:
    """As `observe`."""
    with _recorders(skeleton, learn) as recorders, torch.no_grad():
        skeleton.model.base_model(input_ids=tokens, use_cache=False)
    hidden: Any = recorders[0].seen[0] if recorders[0].seen else None
    calls = []
    for index, recorder in enumerate(recorders):
        if recorder.seen is None or not isinstance(hidden, Tensor) or recorder.seen[0] is not hidden:
            raise ArmorError(
                f"{skeleton.prefix}.{index}: {type(skeleton.model).__name__} does not simply pass hidden states from "
                "one decoder layer to the next; its layers cannot be run one by one, and the model is not supported"
            )
        if recorder.times > 1:
            raise ArmorError(
                f"{skeleton.prefix}.{index}: {type(skeleton.model).__name__} calls it {recorder.times} times in one "
                "pass; its layers cannot be run one by one, and the model is not supported"
            )
        call = recorder.seen[1]
        if any(leaf.is_meta for leaf in call.tensors()):
            if index not in skeleton.takes_more:
                skeleton.takes_more[index] = _takes_more(skeleton.layers[index], hidden, call)
            if skeleton.takes_more[index]:
                raise ArmorError(
                    f"{skeleton.prefix}.{index}: takes more of an earlier decoder layer than hidden states; its layers "
                    "cannot be run one by one, and the model is not supported"
                )
            call = call.map(lambda tensor: None if tensor.is_meta else tensor)
        calls.append(call)
    return hidden, calls


class _Watch(TorchFunctionMode):
    """Notes whether anything is computed with one of the `tensors`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors, self.seen = tensors, False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = pytree.tree_leaves((args, kwargs))
        self.seen |= any(leaf is tensor for leaf in given for tensor in self.tensors)
        return function(*args, **(kwargs or {}))


def _takes_more(layer: nn.Module, hidden: Tensor, call: Call) -> bool:
    """Whether a decoder layer computes with what stood behind an earlier one's hidden states; some hand it on alone."""
    watch = _Watch([tensor for tensor in call.tensors() if tensor.is_meta])
    _on_meta(layer, hidden, call, watch)
    return watch.seen


def observe_each(skeleton: Skeleton, tokens: Tensor) -> Iterator[tuple[Tensor, list[Call]]]:
    """`observe` of one sequence after the other, tokens (sequences, length).

    Sequences of one length are mostly called with equal masks and rotary embeddings: those are one object.
    """
    shared: list[Call] = []
    for row in tokens:
        hidden, calls = observe(skeleton, row[None])
        shared = shared or calls
        yield hidden, [a if a.equals(b) else b for a, b in zip(shared, calls, strict=True)]


def finish(skeleton: Skeleton, tokens: Tensor, hidden: Tensor) -> Tensor:
    """The logits (batch, length, vocabulary) from the hidden states (batch, length, hidden) after the last layer.

    tokens (batch, length) int64. What is outside of the layers must be loaded, the head too. A gradient goes through
    if `hidden` wants one.
    """
    with _recorders(skeleton) as recorders:
        recorders[-1].made = hidden
        return skeleton.model(input_ids=tokens, use_cache=False).logits
