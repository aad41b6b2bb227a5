"""A decoder layer whose experts do not fit into memory together: they are read one after the other.

Several calls of the layer wait for each other at its mixture. Each runs until the mixture is called. There it is
stopped, and what it asks of the experts is kept. Then every expert is read once, and takes its tokens of one call after
the other. With what the experts made, each call runs again, now to its end. A call by itself need not wait: its mixture
reads the experts that it needs, and goes on. So does a second mixture in a layer.

What comes out is what the whole layer makes, bit by bit but where few tokens would go through all experts in one call
of a kernel. The price is that what comes before the experts runs twice, and room on the host for what goes into the
mixture and comes out of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from armor.execution.machine import host_memory_bytes
from armor.format.shards import Shards
from armor.runtime.experts import Expert, Experts
from armor.runtime.filling import fill

__all__ = ["HOST_SHARE", "Apart", "Whole"]

T = TypeVar("T")
Calls = Sequence[Callable[[nn.Module], T]]
"""Each calls the layer that it is given."""
Within = Callable[[], AbstractContextManager[Any]]
Asked = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a call of a mixture."""

HOST_SHARE = 0.25
"""Of the host's memory: what hidden states take that wait for a layer, and what calls take that wait in one."""


class Whole:
    """Runs `layer`, which has all its tensors."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def run(self, calls: Calls[T], to_the_end: Within = contextlib.nullcontext) -> Iterator[T]:
        """What each of `calls` returns, in order, run in the context `to_the_end`."""
        with to_the_end():
            for call in calls:
                yield call(self.layer)


class Apart:
    """Runs `layer`, a decoder layer that has all its tensors but those of its experts, on `device`.

    `prefix` is its name in `shards`. `see` is called with every expert when it is there, whatever is sent to it, and
    with all tokens of each call, on the host.
    """

    def __init__(
        self,
        layer: nn.Module,
        prefix: str,
        shards: Shards,
        device: str,
        see: Callable[[Experts, Expert, Tensor], None] | None = None,
    ) -> None:
        self.layer, self._see, self._source = layer, see, (prefix, shards, device)
        found = {path: module for path, module in layer.named_modules() if isinstance(module, Experts)}
        self._mixtures = {path: _Mixture(self, path, module) for path, module in found.items()}

    def run(self, calls: Calls[T], to_the_end: Within = contextlib.nullcontext) -> Iterator[T]:
        """What each of `calls` returns, in order. A call may run twice, to its end only in the context `to_the_end`."""
        with self._in_place():
            start = 0
            while start < len(calls):
                made = self._wait(calls[start:]) if len(calls) - start > 1 else [None]
                with to_the_end():
                    for call, own in zip(calls[start:], made, strict=False):
                        self._give(own, stops=False)
                        yield call(self.layer)
                start += len(made)

    def through(self, path: str, asked: Sequence[Asked]) -> list[Tensor]:
        """What the mixture at `path` makes of each call, on the host as they are; an expert is read once."""
        mixture, (prefix, shards, device) = self._mixtures[path].mixture, self._source
        routes = [mixture.routes(*one) for one in asked]
        tokens = [None if self._see is None else mixture.arguments(*one)[0] for one in asked]
        outputs = [torch.zeros_like(one.x) for one in routes]
        starts = [0] * len(asked)
        for number, expert in mixture.experts():
            if self._see is None and not any(one.counts[number] for one in routes):
                continue
            fill(expert, f"{prefix}.{path}.{number}", shards, device)
            for index, (x, rows, given, counts) in enumerate(routes):
                if self._see is not None and (all_tokens := tokens[index]) is not None:
                    self._see(mixture, expert, all_tokens)
                own = slice(starts[index], starts[index] + counts[number])
                if counts[number]:
                    y = expert(x[rows[own]].to(device), given[own].to(device), mixture.between)
                    outputs[index].index_add_(0, rows[own], y.to(x.device, x.dtype))
                starts[index] = own.stop
            expert.to("meta")
        for index, one in enumerate(asked):
            outputs[index] = mixture.with_rest(outputs[index], *one)
        return outputs

    def _wait(self, calls: Calls[Any]) -> list[tuple[str, Tensor] | None]:
        """What the mixture makes that each call comes to, with its path: of as many calls as there is room for.

        None for a call that comes to none.
        """
        asked: dict[str, dict[int, Asked]] = {}
        room, number = HOST_SHARE * host_memory_bytes(), -1
        for number, call in enumerate(calls):
            self._give(None, stops=True)
            try:
                call(self.layer)
            except _Stopped as stopped:
                asked.setdefault(stopped.path, {})[number] = stopped.asked
                room -= 2 * sum(x.nbytes for x in pytree.tree_leaves(stopped.asked) if isinstance(x, Tensor))
            if room < 0:
                break
        made: list[tuple[str, Tensor] | None] = [None] * (number + 1)
        for path, own in asked.items():
            for number, output in zip(own, self.through(path, [*own.values()]), strict=True):
                made[number] = path, output
        return made

    def _give(self, made: tuple[str, Tensor] | None, stops: bool) -> None:
        """Let the mixture return what is `made` for it, once; others stop the call if it `stops`, or read and go on."""
        for path, mixture in self._mixtures.items():
            mixture.stops, mixture.made = stops, made[1] if made and made[0] == path else None

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        """The mixtures of the layer have stand-ins."""
        try:
            for path, mixture in self._mixtures.items():
                self.layer.set_submodule(path, mixture)
            yield
        finally:
            for path, mixture in self._mixtures.items():
                self.layer.set_submodule(path, mixture.mixture)


class _Stopped(Exception):
    """A call has come to the mixture at `path`, and has `asked` for this."""

    def __init__(self, path: str, asked: Asked) -> None:
        super().__init__(path)
        self.path, self.asked = path, asked


class _Mixture(nn.Module):
    """Stands in for a mixture, and has its attributes."""

    made: Tensor | None = None
    stops = False

    def __init__(self, apart: Apart, path: str, mixture: Experts) -> None:
        super().__init__()
        self._own = apart, path, mixture  # a tuple hides them from nn.Module

    @property
    def mixture(self) -> Experts:
        """What it stands in for."""
        return self._own[2]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._own[2], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        apart, path, mixture = self._own
        device = mixture.in_order(args, kwargs)[0].device
        if (made := self.made) is not None:
            self.made = None
            return made.to(device)
        asked = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("cpu"), (args, kwargs))
        if self.stops:
            raise _Stopped(path, asked)
        return apart.through(path, [asked])[0].to(device)
