"""prices/layer_{k}.json and budget.json: what each choice for a linear takes and costs, and what was chosen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from armor.core.typed import Typed
from armor.execution.files import atomic_path
from armor.format.records.base import Made

__all__ = ["BudgetRecord", "LinearPrices", "Price", "PricesRecord"]


class Price(Typed):
    """What a choice for a linear takes and costs."""

    choice: dict[str, str | int]
    """What it changes of the recipe, with the keys of an override: method, pattern, block_size, rank; empty: none."""
    bits: float
    """Stored bits per weight of the linear."""
    predicted_kl: float
    """What it is predicted to add to the KL divergence from the dense model, in nats per token."""


class LinearPrices(Typed):
    """The choices for one linear. Choices that give the same factors are listed once."""

    weights: int
    """The entries of its weight."""
    prices: tuple[Price, ...]
    """The choices, in the order of the configuration."""


class PricesRecord(Made):
    """`{model}/{recipe}/prices/layer_{layer}.json`, by `armor price`: what each choice for a linear takes and costs."""

    AGAIN: ClassVar[str] = "run armor price for this layer again"

    format_version: Literal[1] = 1
    layer: int
    """Its number, from 0."""
    fingerprint: str
    """That of the model."""
    modules: dict[str, LinearPrices]
    """The linears by full name."""

    def content(self) -> str:
        """A fingerprint of the prices alone."""
        return _fingerprint(self.modules)


class BudgetRecord(Made):
    """`{model}/{recipe}/budget.json`, by `armor budget`: the choice for each linear, one a line.

    `armor factorize` reads the choices. Another choice may be written into it by hand. The numbers beside it, and the
    sums, then stay as they were. `seconds` are those of all prices.
    """

    AGAIN: ClassVar[str] = "run armor budget again"

    format_version: Literal[1] = 1
    fingerprint: str
    """That of the model."""
    bits: float
    """Stored bits per weight of all linears together; never above those that were asked for."""
    predicted_kl: float
    """The sum over the linears, in nats per token."""
    modules: dict[str, Price]
    """The linears by full name, layer by layer."""

    def content(self) -> str:
        """A fingerprint of the choices alone."""
        return _fingerprint({name: price.choice for name, price in self.modules.items()})

    def write(self, path: Path | str) -> None:
        """Write it as `Record.write` does, but each linear on a line of its own, layer by layer."""
        lines = [f"  {json.dumps(name)}: {json.dumps(price.model_dump())}" for name, price in self.modules.items()]
        text = json.dumps(self.as_json() | {"modules": {}}, indent=1, sort_keys=True, allow_nan=False)
        listed = ",\n".join(lines)
        with atomic_path(path) as temporary:
            temporary.write_text(text.replace('"modules": {}', f'"modules": {{\n{listed}\n }}', 1) + "\n")


def _fingerprint(modules: Mapping[str, Typed | dict[str, str | int]]) -> str:
    said = {name: value.model_dump() if isinstance(value, Typed) else value for name, value in modules.items()}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
