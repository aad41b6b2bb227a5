"""What the decoder layers of a skeleton are called with, and what comes after them, by the model's own forward.

What a layer is called with is found by recording, for masks, rotary embeddings and the like differ by layer, family and
release. Every decoder layer is replaced by a recorder that notes its arguments and passes the hidden states on. The
model's own forward runs once. Each real layer is then called with what its recorder saw. What comes after the layers is
the model's own forward too, the last recorder handing out what the last layer made. This holds for models in which a
layer's hidden states go straight into the next layer; `observe` checks it.

Some layers take more of earlier ones: keys and values, the tokens that an indexer chose, what a router thought. They
find it among their arguments. The earlier layer has returned it, or put it into a dictionary that layers share. In such
a model each layer runs once without numbers, on the meta device. What it makes are tensors that can be told apart, and
the calls of later layers show which of them these compute with. They are carried with the hidden states: `State`.
"""

from __future__ import annotations

import contextlib
from collections import UserDict
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from armor.core.errors import ArmorError
from armor.format.shards import Shards
from armor.runtime.apart import Apart
from armor.runtime.filling import filled
from armor.runtime.skeleton import Made, Skeleton, State

__all__ = ["Call", "State", "finish", "moved", "observe", "observe_each", "readers", "states_of"]


@dataclass(frozen=True)
class _Carried:
    """Stands in a call for a tensor that an earlier layer made: number `place` of the state."""

    place: int


@dataclass(frozen=True)
class Call:
    """What a decoder layer is called with beside its state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    carried: State = ()
    """What the state has behind the hidden states, without numbers: tensors on the meta device."""
    handed: tuple[int, ...] = ()
    """What the next state has there: numbers in this state, and behind it in the leaves of the layer's output and
    arguments after the run."""

    def run(self, layer: nn.Module, state: State) -> State:
        """The next state, by a decoder layer so called, from `state`, which is on its device.

        Hidden states (batch, length, hidden) come first in both: they are the layer's output or the first of it.
        """
        args, kwargs = pytree.tree_map_only(_Carried, lambda it: state[it.place], (self.args, self.kwargs))
        made = pytree.tree_leaves((layer(state[0], *args, **kwargs), args, kwargs))
        return (made[0], *([*state, *made][number] for number in self.handed))

    def empty(self, hidden: Tensor, device: torch.device | str = "cpu") -> State:
        """A state that fits the call, on `device`: `hidden`, and zeros for what is carried."""
        return (hidden.to(device), *(torch.zeros_like(tensor, device=device) for tensor in self.carried))

    def tensors(self) -> list[Tensor]:
        """All tensors in it."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def map(self, function: Callable[[Tensor], Any]) -> Call:
        """The call with `function` applied to each of its tensors."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def sharing(self, other: Call) -> Call:
        """The call with the tensors of `other` where they are equal; those that differ keep no larger one alive."""
        mine, structure = pytree.tree_flatten((self.args, self.kwargs))
        theirs, other_structure = pytree.tree_flatten((other.args, other.kwargs))
        if structure != other_structure:
            return self.map(_alone)
        leaves = (b if _same(a, b) else _alone(a) for a, b in zip(mine, theirs, strict=True))
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        return replace(self, args=args, kwargs=kwargs)


def states_of(hidden: Tensor, calls: Sequence[Call]) -> list[State]:
    """The states before every decoder layer and after the last, on the meta device; `hidden` are those of the first."""
    return [call.empty(hidden, "meta") for call in calls] + [(hidden.to("meta"),)]


def moved(state: State, device: torch.device | str, dtype: torch.dtype | None = None) -> State:
    """The state on `device`, its floats in `dtype` if one is given."""
    return tuple(tensor.to(device, dtype if tensor.is_floating_point() else None) for tensor in state)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    return a is b or (isinstance(a, bool | int | float | str | _Carried) and type(a) is type(b) and a == b)


def _alone(value: Any) -> Any:
    """The value; a copy of a tensor that is a part of a larger one: Gemma 3n has one for all layers."""
    is_part = isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes
    return value.clone() if is_part else value


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

    What the layer makes beside them has no numbers. It is known from the first time, if that was to `learn` it.
    """

    made: Tensor | None = None
    seen: tuple[Any, Call] | None = None
    containers: Sequence[MutableMapping | MutableSequence] = ()
    times = 0

    def __init__(self, layer: nn.Module, index: int, layers: dict[int, Made], learn: bool) -> None:
        super().__init__(layer)
        self._index, self._layers, self._learn = index, layers, learn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args:
            named = ", ".join(key for key, value in kwargs.items() if isinstance(value, Tensor))
            raise ArmorError(
                f"{type(self._layer[0]).__name__}: is called with {named or 'no tensor'}; expected a tensor of hidden "
                "states first; decoder layers cannot be run one by one, and the model is not supported"
            )
        hidden, call = args[0], _recorded(args[1:], kwargs)
        self.times += 1
        self.containers = _containers(args[1:], kwargs)
        self.seen = hidden, call
        if self._learn and self._index not in self._layers and isinstance(hidden, Tensor):
            self._layers[self._index] = _made(self._layer[0], hidden, call)
        hidden = hidden if self.made is None else self.made
        known = self._layers.get(self._index)
        if known is None:
            return hidden
        for mapping, added in zip(_mappings(args[1:], kwargs), known.added, strict=True):
            mapping.update(added)
        return hidden if known.behind is None else (hidden, *known.behind)


def _recorded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call as it is now: later layers may add to its dictionaries."""
    plain = [dict(value) if isinstance(value, UserDict) else value for value in args]
    named = {key: dict(value) if isinstance(value, UserDict) else value for key, value in kwargs.items()}
    return Call(tuple(plain), named).map(lambda tensor: tensor)


def _containers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[MutableMapping | MutableSequence]:
    """What a layer is handed and may put something into."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, MutableMapping | MutableSequence)]


def _mappings(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[MutableMapping]:
    return [value for value in _containers(args, kwargs) if isinstance(value, MutableMapping)]


@torch.no_grad()
def _made(layer: nn.Module, hidden: Tensor, call: Call) -> Made:
    """What a decoder layer makes, by a run without numbers."""
    hidden, call = hidden.to("meta"), call.map(lambda tensor: tensor.to("meta"))
    empty = {name: t.to("meta") for name, t in [*layer.named_parameters(), *layer.named_buffers()]}
    mappings, given = _mappings(call.args, call.kwargs), call.tensors()
    before = [dict(mapping) for mapping in mappings]
    lists = {id(one): len(one) for one in _containers(call.args, call.kwargs) if isinstance(one, MutableSequence)}
    with _Watch() as watch:
        output = functional_call(layer, empty, (hidden, *call.args), call.kwargs)
    if any(len(one) != lists.get(id(one), len(one)) for one in _containers(call.args, call.kwargs)):
        raise ArmorError(
            f"{type(layer).__name__}: puts something for later layers into a list; decoder layers cannot be run one by "
            "one, and the model is not supported"
        )
    return Made(
        behind=tuple(output[1:]) if isinstance(output, tuple | list) else None,
        added=[
            {key: value for key, value in now.items() if key not in old or value is not old[key]}
            for now, old in zip(mappings, before, strict=True)
        ],
        leaves=pytree.tree_leaves((output, call.args, call.kwargs)),
        used=[tensor for tensor in given if id(tensor) in watch.seen],
    )


class _Watch(TorchFunctionMode):
    """Notes the tensors that something is computed with, by id."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= {id(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if getattr(function, "__name__", "") == "_grouped_mm":  # without numbers torch has it in bfloat16 alone
            rows, weights, *_ = args
            return rows.new_empty(len(rows), weights.shape[-1])
        return function(*args, **(kwargs or {}))


class _Reader(_StandIn):
    """Reads the layer when it is called, and drops it after; its experts one by one, if it is to take it `apart`."""

    def __init__(self, layer: nn.Module, name: str, shards: Shards, device: str, apart: bool) -> None:
        super().__init__(layer)
        self._source, self._apart = (name, shards, device), apart

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer = filled(self._layer[0], *self._source, experts=not self._apart)
        if not self._apart:
            return layer(*args, **kwargs)
        (output,) = Apart(layer, *self._source).run([lambda layer: layer(*args, **kwargs)])
        return output


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
    """Recorders in the decoder layers' place; they `learn` what layers make by running each once."""
    recorders = [_Recorder(layer, index, skeleton.made, learn) for index, layer in enumerate(skeleton.layers)]
    with _replaced(skeleton, recorders):
        yield recorders


@contextlib.contextmanager
def readers(skeleton: Skeleton, shards: Shards, device: str = "cpu", apart: bool = False) -> Iterator[PreTrainedModel]:
    """The model as one that runs whole, on `device`: its decoder layers are read when they are called, dropped after.

    `apart`: experts are read one at a time, those that a token is sent to.

    What is outside of the layers must be loaded and placed. A forward pass raises ArmorError where `load_layer` does.
    """
    named = [(layer, f"{skeleton.prefix}.{index}") for index, layer in enumerate(skeleton.layers)]
    with _replaced(skeleton, [_Reader(layer, name, shards, device, apart) for layer, name in named]):
        yield skeleton.model


def observe(skeleton: Skeleton, tokens: Tensor) -> tuple[Tensor, list[Call]]:
    """The hidden states (batch, length, hidden) before the first decoder layer, and what every layer is called with.

    tokens (batch, length) int64. What is outside of the layers must be loaded. Raises ArmorError if the model does
    something else with hidden states between two layers than to pass them on.
    """
    if not skeleton.made and len(skeleton.layers) > 1:
        with contextlib.suppress(Exception):  # of a model that wants more of its layers than a tensor
            recorders = _recorded_pass(skeleton, tokens, learn=False)
            if not _share_containers(recorders):
                return _calls(skeleton, recorders)
    return _calls(skeleton, _recorded_pass(skeleton, tokens, learn=not skeleton.made))


def _recorded_pass(skeleton: Skeleton, tokens: Tensor, learn: bool) -> list[_Recorder]:
    """The recorders after the model's own forward."""
    with _recorders(skeleton, learn) as recorders, torch.no_grad():
        skeleton.model.base_model(input_ids=tokens, use_cache=False)
    return recorders


def _share_containers(recorders: Sequence[_Recorder]) -> bool:
    """Whether two layers are handed one empty dictionary or list: it is there for one to tell the other something."""
    handed = [id(one) for recorder in recorders for one in recorder.containers if not one]
    return len(handed) > len(set(handed))


def _calls(skeleton: Skeleton, recorders: Sequence[_Recorder]) -> tuple[Tensor, list[Call]]:
    """As `observe`, from what recorders saw."""
    hidden: Any = recorders[0].seen[0] if recorders[0].seen else None
    model, calls = type(skeleton.model).__name__, []
    for index, recorder in enumerate(recorders):
        where = f"{skeleton.prefix}.{index}"
        if recorder.times > 1:
            raise ArmorError(
                f"{where}: {model} calls it {recorder.times} times in one pass; its layers cannot be run one by one, "
                "and the model is not supported"
            )
        if recorder.seen is None or not _is_view(recorder.seen[0], hidden):
            raise ArmorError(
                f"{where}: {model} does not simply pass hidden states from one decoder layer to the next; its layers "
                "cannot be run one by one, and the model is not supported"
            )
        calls.append(recorder.seen[1])
    if skeleton.made and not skeleton.links:
        skeleton.links.extend(_links(skeleton, calls))
    if skeleton.made:
        calls = [_linked(call, *link) for call, link in zip(calls, skeleton.links, strict=True)]
    return hidden, calls


def _is_view(seen: Any, hidden: Any) -> bool:
    """Whether `seen` is `hidden`, or a view of all of it: Gemma 4 has it from a slice."""
    if not (isinstance(seen, Tensor) and isinstance(hidden, Tensor)):
        return False
    a, b = ((x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()) for x in (seen, hidden))
    return a == b


def _links(skeleton: Skeleton, calls: Sequence[Call]) -> Iterator[tuple[State, tuple[int, ...]]]:
    """For each layer `Call.carried` and `Call.handed`: a tensor is carried until the last layer that computes with it.

    Raises ArmorError where a layer computes with what the model made of such a tensor between the layers.
    """
    last = {id(tensor): index for index in range(len(calls)) for tensor in skeleton.made[index].used}
    carried: State = ()
    for index, call in enumerate(calls):
        made = skeleton.made[index]
        known, used = ({id(tensor) for tensor in tensors} for tensors in (carried, made.used))
        if any(tensor.is_meta and id(tensor) in used - known for tensor in call.tensors()):
            raise ArmorError(
                f"{skeleton.prefix}.{index}: takes what {type(skeleton.model).__name__} computes between its decoder "
                "layers; they cannot be run one by one, and the model is not supported"
            )
        found = [None, *carried, *made.leaves]
        alive: dict[int, int] = {}
        for number, tensor in enumerate(found):
            if last.get(id(tensor), -1) > index:
                alive.setdefault(id(tensor), number)
        yield carried, tuple(alive.values())
        carried = tuple(found[number] for number in alive.values())


def _linked(call: Call, carried: State, handed: tuple[int, ...]) -> Call:
    """The call with places in the state for what is carried, and nothing for what no layer computes with."""
    places = {id(tensor): _Carried(number) for number, tensor in enumerate(carried, 1)}
    return replace(
        call.map(lambda tensor: places.get(id(tensor)) if tensor.is_meta else tensor), carried=carried, handed=handed
    )


def observe_each(skeleton: Skeleton, tokens: Tensor) -> Iterator[tuple[Tensor, list[Call]]]:
    """`observe` of one sequence after the other, tokens (sequences, length).

    Sequences of one length are mostly called with equal masks and rotary embeddings: those are there once.
    """
    shared: list[Call] = []
    for row in tokens:
        hidden, calls = observe(skeleton, row[None])
        shared = shared or calls
        yield hidden, [own.sharing(first) for own, first in zip(calls, shared, strict=True)]


def finish(skeleton: Skeleton, tokens: Tensor, hidden: Tensor) -> Tensor:
    """The logits (batch, length, vocabulary) from the hidden states (batch, length, hidden) after the last layer.

    tokens (batch, length) int64. What is outside of the layers must be loaded, the head too. A gradient goes through
    if `hidden` wants one.
    """
    with _recorders(skeleton) as recorders:
        recorders[-1].made = hidden
        return skeleton.model(input_ids=tokens, use_cache=False).logits
