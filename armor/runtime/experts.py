"""The experts of a mixture as linears of their own, so that each is inspected, compressed and loaded like any other.

`Experts` stands for transformers' fused module (`armor.runtime.fused`) and is called in the same way: with the tokens,
and for each token the numbers of its experts and what the router gives them. It gathers the tokens of each expert and
calls the expert's linears on them. What lies between the linears is the fused module's own. So dense linears, packed
ones and ones in training all work, and no expert is ever made dense. Of few tokens, as in decoding, the kernel of a CPU
takes all experts in one call for what comes before the activation and one for what comes after.

The price on a GPU is a few small products where transformers has one grouped product.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Expert", "Experts", "Routes", "alike"]

TOGETHER = 1024  # rows at most, of all experts, that go through them in one call: more would take memory for nothing


class Expert(nn.Module):
    """One expert: its linears under the names that checkpoints have for them, gate (or None), up and down.

    While it runs, `weights` (tokens, 1) is what the router gives the tokens that pass, or None.
    """

    weights: Tensor | None = None

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        super().__init__()
        self._names = tuple(linears)
        for name, linear in linears.items():
            self.add_module(name, linear)

    def forward(self, x: Tensor, weights: Tensor | None, between: Callable[..., Tensor]) -> Tensor:
        """x (tokens, in) -> (tokens, in), each token multiplied by its weight."""
        self.weights = weights
        *first, down = (self.get_submodule(name) for name in self._names)
        y = down(between(*(linear(x) for linear in first)))
        self.weights = None
        return y if weights is None else y * weights


class Routes(NamedTuple):
    """What a mixture sends to its experts."""

    x: Tensor
    """(tokens, in): its rows go to experts."""
    rows: Tensor
    """(sent,) int64, the rows that are sent, those of one expert after those of the other."""
    given: Tensor
    """(sent, 1), what the router gives each."""
    counts: list[int]
    """How many each expert has."""


class Experts(nn.Module):
    """The experts of one mixture, as modules 0, 1, ..., called as transformers' fused module is.

    `fused` is that module, without its tensors: it has the activation and the way to combine gate and up. Checkpoints
    have tensors as it had, if `is_stored_fused`.
    """

    OF = ""
    """The name of transformers' class that an adapter stands for (`armor.runtime.families`)."""
    LAYOUT: ClassVar[dict[str, bool]] = {}
    """How the tensors lie in a class that does not say so: its `FLAGS` (`armor.runtime.fused`)."""

    def __init__(self, fused: nn.Module, experts: Sequence[Expert], is_stored_fused: bool) -> None:
        super().__init__()
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
        self.fused = fused
        self.count, self.is_stored_fused = len(experts), is_stored_fused
        fused._is_hf_initialized = True  # pyright: ignore[reportArgumentType]  for transformers: it has no weight to draw

    def experts(self) -> Iterator[tuple[int, Expert]]:
        """Every expert with its number."""
        for index in range(self.count):
            yield index, self._expert(index)

    def _expert(self, index: int) -> Expert:
        expert = self._modules[str(index)]
        assert isinstance(expert, Expert)
        return expert

    def between(self, *parts: Tensor) -> Tensor:
        """What goes into the down projection, from the outputs of gate and up (tokens, out), or of up alone."""
        fused: Any = self.fused
        if len(parts) == 1:
            return fused.act_fn(parts[0])
        if not hasattr(fused, "_apply_gate"):  # it is no part of the experts interface
            gate, up = parts
            return up * fused.act_fn(gate)
        joined = torch.cat(parts, -1) if fused.is_concatenated else torch.stack(parts, -1).flatten(-2)
        return fused._apply_gate(joined)

    def in_order(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of a call in the order that transformers' module has them."""
        if kwargs:
            args = inspect.signature(type(self.fused).forward).bind(self.fused, *args, **kwargs).args[1:]
        return args

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (tokens, in), the numbers of their experts and the weights of these (tokens, k), as it is called."""
        x, index, weights = self.in_order(args, kwargs)
        return x, index, weights

    def routes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routes:
        """What is sent to which expert, by a call."""
        x, index, weights = self.arguments(args, kwargs)
        counts = index.flatten().bincount(minlength=self.count)[: self.count].tolist()
        order = index.flatten().argsort(stable=True)[: sum(counts)]  # those of no expert are the last
        return Routes(x, order // index.shape[-1], weights.flatten()[order, None], counts)

    def with_rest(self, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What a call returns: `output`, what the experts make of their rows of x, and what is no expert's."""
        return output

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # (tokens, in) -> (tokens, in)
        x = self.in_order(args, kwargs)[0]
        if x.is_meta:  # no token goes to any expert; one shows the shapes, for they are alike
            self._expert(0)(x.clone(), None, self.between)
            return torch.zeros_like(x)
        routes = self.routes(args, kwargs)
        return self.with_rest(self._added(routes), args, kwargs)

    def _added(self, routes: Routes) -> Tensor:
        """The sum of what the experts make of their rows of x, times what they are given, (tokens, in)."""
        x, rows, given, counts = routes
        output = torch.zeros_like(x)
        routed = [(self._expert(number), count) for number, count in enumerate(counts) if count]
        if 0 < len(rows) <= TOGETHER:
            y = self._together([expert for expert, _ in routed], [count for _, count in routed], x[rows])
            if y is not None:
                return output.index_add_(0, rows, (y * given).to(output.dtype))
        start = 0
        for expert, count in routed:
            own = slice(start, start := start + count)
            y = expert(x[rows[own]], given[own], self.between)
            output.index_add_(0, rows[own], y.to(output.dtype))
        return output

    def _together(self, experts: Sequence[Expert], counts: Sequence[int], x: Tensor) -> Tensor | None:
        """x (rows, in), the rows of each expert one after the other, through all in two calls into C: (rows, in).

        None where each must be called by itself.
        """
        linears = [[*expert.children()] for expert in experts]
        grouped = getattr(linears[0][0], "grouped", None)  # packed linears have it; dense ones know no such call
        if grouped is None or any(map(_is_hooked, itertools.chain(experts, *linears))):
            return None
        parts = grouped(x, counts, [own[:-1] for own in linears])
        y = parts and grouped(self.between(*parts), counts, [own[-1:] for own in linears])
        return y[0] if y else None


def _is_hooked(module: nn.Module) -> bool:
    """Whether something looks on when `module` is called, or stands in for its forward, as accelerate's offloading."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def alike(layer: nn.Module) -> dict[str, tuple[str, str]]:
    """For each linear of an expert, by its name within `layer`: its expert, and the same linear of the first expert."""
    return {
        f"{path}.{number}.{leaf}": (f"{path}.{number}", f"{path}.0.{leaf}")
        for path, module in layer.named_modules()
        if isinstance(module, Experts)
        for number, expert in module.experts()
        for leaf, _ in expert.named_children()
    }
