"""Settings of what factors are rounded to after they are found."""

from __future__ import annotations

import fnmatch
from typing import Annotated, Literal

from pydantic import Field

from armor.core.quantization import NumberType
from armor.core.typed import Typed

__all__ = ["QuantizeOverride", "QuantizeSettings"]


class QuantizeOverride(Typed):
    """Another quantization for some decoder layers, some modules, or some modules of some layers."""

    core: NumberType | None = None
    """Another type of S's numbers; unset: that of the recipe."""
    blocks: Literal["int8", "bfloat16"] | None = None
    """Another type of the numbers of A and B; unset: that of the recipe."""
    group: int | None = Field(default=None, ge=1)
    """Other groups; unset: those of the recipe."""
    leave: bool = False
    """Leave these linears in floats."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Numbers of decoder layers, from 0; unset: all."""
    modules: str = "*"
    """A shell-style pattern over full module names, like *.down_proj."""


class QuantizeSettings(Typed):
    """Store the factors as integers or fp8 with scales, after everything else that makes them.

    It rounds what the stages before stored, so a change here runs none of them again. Scales are bfloat16.
    """

    core: NumberType = "int8"
    """The type of S's numbers. fp8 is e4m3, and loses more than int8 in as many bits."""
    blocks: Literal["int8", "bfloat16"] = "int8"
    """The type of the numbers of A and B. int8 has a scale for each of their rows."""
    group: int = Field(default=64, ge=1)
    """How many consecutive numbers of a row of S share a scale; with 2:4 they span twice as many columns."""
    overrides: list[QuantizeOverride] = []
    """Exceptions by layer number and module pattern; later ones win."""

    def for_layer(self, layer: int) -> QuantizeSettings:
        """The same for decoder layer `layer`: the overrides that concern it, their layer numbers dropped."""
        own = [o for o in self.overrides if o.layers is None or layer in o.layers]
        return self.replace(overrides=[o.replace(layers=None) for o in own])

    def for_module(self, name: str) -> QuantizeSettings | None:
        """The same for the linear with the full module name `name`, without overrides; None: it stays in floats."""
        found, leave = self.replace(overrides=[]), False
        for override in self.overrides:
            if fnmatch.fnmatchcase(name, override.modules):
                leave = override.leave
                given = override.model_dump(exclude_none=True)
                found = found.replace(**{key: given[key] for key in QuantizeSettings.model_fields if key in given})
        return None if leave else found
