"""A decoder layer whose experts do not fit into memory together: they are read one after the other.

Several calls of the layer wait for each other at its mixture. Each runs until the mixture is called. There it is
stopped, and what it asks of the experts is kept. Then every expert is read once, and takes its tokens of one call after
the other. With what the experts made, each call runs again, now to its end. A call by itself need not wait: its mixture
reads the experts that it needs, and goes on.

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
from armor.runtime.skeleton import fill

__all__ = ["HELD", "HIDDEN_STATES", "Apart", "calls_at_once"]

T = TypeVar("T")
Asked = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a call of a mixture."""
Seen = Callable[[Experts, Expert, Tensor], None]
"""What looks at an expert that is there, and at all tokens of a call, which are on the host."""

HIDDEN_STATES = 0.25
"""Of the host's memory: for those that wait for a layer, or in it for the experts."""
HELD = 2
"""What a call that waits in a layer holds: as much as its hidden states twice."""


def calls_at_once(state_bytes: int) -> int:
    """How many calls wait together, from the bytes of the hidden states of one."""
    return max(int(HIDDEN_STATES * host_memory_bytes() / (HELD * state_bytes)), 1)


class Apart:
    """Runs `layer`, a decoder layer that has all its tensors but those of its experts, on `device`.

    `prefix` is its name in `shards`. `see` is called with every expert, whatever tokens are sent to it.
    """

    def __init__(self, layer: nn.Module, prefix: str, shards: Shards, device: str, see: Seen | None = None) -> None:
        self.layer, self._see, self._source = layer, see, (prefix, shards, device)
        found = {path: module for path, module in layer.named_modules() if isinstance(module, Experts)}
        self._mixtures = {path: _Mixture(self, path, module) for path, module in found.items()}

    def run(
        self,
        calls: Sequence[Callable[[nn.Module], T]],
        at_once: int = 1,
        to_the_end: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> Iterator[T]:
        """What each of `calls` returns when it is given the layer, in order; `at_once` of them wait together.

        A call may run more than once, to its end only in the context `to_the_end`.
        """
        with self._in_place():
            for start in range(0, len(calls), at_once):
                group = calls[start : start + at_once]
                made: list[dict[str, Tensor]] = [{} for _ in group]
                if len(group) > 1:
                    for _ in self._mixtures:
                        self._wait(group, made)
                with to_the_end():
                    for call, own in zip(group, made, strict=True):
                        self._give(own, stops=False)
                        yield call(self.layer)
                        own.clear()

    def through(self, path: str, asked: Sequence[Asked]) -> list[Tensor]:
        """What the mixture at `path` makes of each call, on the host as they are; an expert is read once."""
        mixture, (prefix, shards, device) = self._mixtures[path].mixture, self._source
        routes = [mixture.routes(*one) for one in asked]
        outputs = [torch.zeros_like(one.x) for one in routes]
        starts = [0] * len(asked)
        for number, expert in mixture.experts():
            if self._see is None and not any(one.counts[number] for one in routes):
                continue
            fill(expert, f"{prefix}.{path}.{number}", shards, device)
            for index, (x, rows, given, counts) in enumerate(routes):
                if self._see is not None:
                    self._see(mixture, expert, mixture.arguments(*asked[index])[0])
                own = slice(starts[index], starts[index] + counts[number])
                if counts[number]:
                    y = expert(x[rows[own]].to(device), given[own].to(device), mixture.between)
                    outputs[index].index_add_(0, rows[own], y.to(x.device, x.dtype))
                starts[index] = own.stop
            expert.to("meta")
        return [mixture.with_rest(output, *one) for output, one in zip(outputs, asked, strict=True)]

    def _wait(self, calls: Sequence[Callable[[nn.Module], Any]], made: Sequence[dict[str, Tensor]]) -> None:
        """Run each call up to the next mixture, and add what that makes to what is `made` for the call."""
        asked: dict[str, dict[int, Asked]] = {}
        for number, call in enumerate(calls):
            self._give(made[number], stops=True)
            try:
                call(self.layer)
            except _Stopped as stopped:
                asked.setdefault(stopped.path, {})[number] = stopped.asked
        for path, own in asked.items():
            for number, output in zip(own, self.through(path, [*own.values()]), strict=True):
                made[number][path] = output

    def _give(self, made: dict[str, Tensor], stops: bool) -> None:
        """Let each mixture return what is `made` for it; else it `stops` the call, or reads its experts."""
        for path, mixture in self._mixtures.items():
            mixture.stops, mixture.made = stops, made.get(path)

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
        if self.made is not None:
            return self.made.to(device)
        asked = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("cpu"), (args, kwargs))
        if self.stops:
            raise _Stopped(path, asked)
        return apart.through(path, [asked])[0].to(device)
