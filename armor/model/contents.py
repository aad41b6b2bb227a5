"""What decoder layers are made of, in a table: kinds of matrices, and whether each is compressed or why it is not.

Nothing is left out in silence: if less than ENOUGH of the decoder's weights can be compressed, one line names the
largest of the rest.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import nn

from armor.execution.table import text_table
from armor.runtime.fused import mixtures

__all__ = ["Contents"]

ENOUGH = 0.9
SMALL = "norms, biases and the like"


@dataclass
class _Kind:
    """Matrices of one name within their layers, of one shape and one fate."""

    name: str
    shape: tuple[int, ...]
    why_not: str | None
    count: int = 0
    numbers: int = 0


def _other(name: str, parameter: torch.Tensor, owner: nn.Module | None, experts: dict[str, int]) -> str:
    """What a weight of `owner` is that is not a linear's; `experts` has how many each mixture of its layer holds."""
    for path, count in experts.items():
        if name.startswith(f"{path.rpartition('.')[0]}.") and not name.startswith(path) and len(parameter) == count:
            return "a router"
    if "experts" in name.split(".") or "Experts" in type(owner).__name__:
        return "experts in a form that is not read"
    return "not the weight of a linear"


@dataclass
class Contents:
    """The parameters of decoder layers, added layer by layer."""

    _kinds: dict[tuple, _Kind] = field(default_factory=dict)

    def add(self, layer: nn.Module, why_not: dict[str, str], but: Collection[str] = ()) -> None:
        """Add a decoder layer, without the parameters `but`, which are in an earlier one.

        `why_not` has the reason, by name in it, for each linear that is not compressed.
        """
        experts = mixtures(layer)
        modules = dict(layer.named_modules())
        for name, parameter in layer.named_parameters():
            if name in but:
                continue
            if parameter.dim() < 2:
                self._count(SMALL, (), "small", parameter)
                continue
            module = name.removesuffix(".weight")
            if isinstance(owner := modules.get(module), nn.Linear):
                reason = why_not.get(module)
            else:
                reason = _other(module, parameter, owner, experts)
            self._count(re.sub(r"\.\d+(?=\.|$)", ".*", module), tuple(parameter.shape), reason, parameter)

    def _count(self, name: str, shape: tuple[int, ...], why_not: str | None, parameter: torch.Tensor) -> None:
        kind = self._kinds.setdefault((name, shape, why_not), _Kind(name, shape, why_not))
        kind.count += 1
        kind.numbers += parameter.numel()

    def share(self) -> float:
        """The share of the decoder layers' weights that can be compressed."""
        compressed = sum(kind.numbers for kind in self._kinds.values() if kind.why_not is None)
        return compressed / max(self.total(), 1)

    def total(self) -> int:
        """The number of the decoder layers' weights."""
        return sum(kind.numbers for kind in self._kinds.values())

    def table(self) -> list[str]:
        """A line for each kind: name, count and shape, share of the decoder layers' weights, compressed or why not."""
        rows = [
            (
                kind.name,
                " x ".join(map(str, (kind.count, *(kind.shape or ("–",))))),
                f"{kind.numbers / self.total():.1%}",
                f"dense: {kind.why_not}" if kind.why_not else "compressed",
            )
            for kind in sorted(self._kinds.values(), key=lambda kind: -kind.numbers)
        ]
        return text_table(rows, align="llrl").splitlines()

    def warning(self) -> str | None:
        """One line if little can be compressed: how much, and the largest kind of what cannot."""
        if self.share() >= ENOUGH:
            return None
        most = max((kind for kind in self._kinds.values() if kind.why_not), key=lambda kind: kind.numbers)
        return (
            f"{self.share():.1%} of the decoder layers' weights can be compressed; the largest rest is {most.name} "
            f"({most.numbers / self.total():.1%}), {most.why_not}; no setting changes this"
        )
