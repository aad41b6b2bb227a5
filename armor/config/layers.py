"""Settings of how one decoder layer and one linear of it are compressed."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, create_model

from armor.config.common import nearest
from armor.core.errors import ArmorError
from armor.core.pattern import Pattern
from armor.core.typed import Typed
from armor.methods import DEFAULT, METHODS, UNCHANGED, Method
from armor.methods.solver.settings import Algorithm, Selection, SolverSettings

__all__ = [
    "Choice",
    "LayerSettings",
    "MethodName",
    "ModuleSettings",
    "Override",
    "Sharing",
    "check_patterns",
    "methods_of",
    "sharing_patterns",
]


def _known_method(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"{name!r} is unknown{nearest(name, METHODS)}")
    return name


MethodName = Annotated[str, AfterValidator(_known_method), Field(json_schema_extra={"enum": list(METHODS)})]


def _of_base_60(value: Any) -> Any:
    """YAML 1.1 reads 2:4 without quotes as a number of base 60, 124."""
    return f"{value // 60}:{value % 60}" if isinstance(value, int) and value >= 60 else value


def _pattern(value: str) -> str:
    pattern = Pattern.parse(value)
    if pattern.is_dense:
        of_integers = ", ".join(name for name, method in METHODS.items() if method.stored is not None)
        raise ValueError(
            f"pattern {value}: keeps every weight, and prunes nothing; take the method {of_integers} or {UNCHANGED}"
        )
    return str(pattern)


PatternText = Annotated[str, BeforeValidator(_of_base_60), AfterValidator(_pattern)]


class SolverChange(Typed):
    """The part of SolverSettings that an override changes."""

    iterations: int | None = Field(default=None, ge=1)
    """Another budget."""
    algorithm: Algorithm | None = None
    """Another optimiser."""
    selection: Selection | None = None
    """Another rule of choice."""


_OWN: dict[str, Any] = {
    name: (type(method.own) | None, Field(default=None, description=f"What {name} alone takes; unset: its defaults."))
    for name, method in METHODS.items()
    if method.own is not None
}
"""The settings that methods bring themselves, as fields of a recipe under their names."""


class ModuleSettings(create_model("ModuleSettings", __base__=Typed, **_OWN)):
    """How one linear is compressed."""

    method: MethodName = DEFAULT
    """How a weight is compressed; dense leaves it as it is. The methods have a table of their own."""
    pattern: PatternText = "2:4"
    """n:m keeps at most n of every m consecutive weights of a row; 50% keeps that share of each row."""
    block_size: int = Field(default=128, ge=1)
    """Size of the blocks around the core. Where it does not divide a dimension, the largest divisor below it serves."""
    rank: int = Field(default=64, ge=0)
    """Rank of the pair U·V of methods with one, at most the smaller dimension. r takes as many bits as blocks of r."""
    solver: SolverSettings = SolverSettings()
    """The optimiser of armor and armor_gram."""

    @property
    def how(self) -> Method:
        """Its method, as that is registered."""
        return METHODS[self.method]

    @property
    def is_dense(self) -> bool:
        """Whether the weight stays as it is."""
        return self.method == UNCHANGED

    @property
    def priced(self) -> ModuleSettings:
        """What a budget tries in its place, to learn what it costs."""
        return self.replace(method=self.how.priced_by or self.method)

    def takes(self, name: str) -> bool:
        """Whether its method takes this statistic of the input, or this setting."""
        return name in (*self.how.statistics, *self.how.settings)


class Choice(Typed):
    """What decides the bits of a linear. What is left out stays as the recipe says."""

    method: MethodName | None = None
    """Another method; unset: that of the recipe."""
    pattern: PatternText | None = None
    """Another pattern; unset: that of the recipe."""
    block_size: int | None = Field(default=None, ge=1)
    """Another block size; unset: that of the recipe."""
    rank: int | None = Field(default=None, ge=0)
    """Another rank; unset: that of the recipe."""

    def given(self) -> dict[str, str | int]:
        """What it changes, by key."""
        found = {key: getattr(self, key) for key in Choice.model_fields}
        return {key: value for key, value in found.items() if value is not None}

    def apply(self, settings: ModuleSettings) -> ModuleSettings:
        """`settings` with what is given here put in their place."""
        return settings.replace(**self.given())


class Override(Choice):
    """A change for some decoder layers, some modules, or some modules of some layers."""

    solver: SolverChange | None = None
    """Other settings of the optimiser; those left out are those of the recipe."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Numbers of decoder layers, from 0; unset: all."""
    modules: str = "*"
    """A shell-style pattern over full module names, like *.down_proj."""

    def apply(self, settings: ModuleSettings) -> ModuleSettings:
        """`settings` with what is given here put in their place."""
        settings = super().apply(settings)
        if self.solver is None:
            return settings
        solver = settings.solver.replace(**self.solver.model_dump(exclude_none=True))
        return settings.replace(solver=solver)


def _check_groups(groups: bool | list[list[str]]) -> bool | list[list[str]]:
    names = [] if isinstance(groups, bool) else [name for group in groups for name in group]
    if isinstance(groups, list) and any(len(group) < 2 for group in groups) or "" in names:
        raise ValueError(f"found {groups!r}, expected lists of two names and more, like [[gate_proj, up_proj]]")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is named twice; a linear has one B")
    return groups


Sharing = Annotated[bool | list[list[str]], AfterValidator(_check_groups)]
"""Which linears share B: true, false, or lists of the last parts of their names."""


class LayerSettings(ModuleSettings):
    """A recipe resolved for one decoder layer."""

    share_right: Sharing = False
    """Which of its linears share B."""
    seed: int = 0
    """The seed of every random choice."""
    overrides: list[Override] = []
    """Those that concern this layer, their layer numbers dropped; later ones win."""
    over: list[Choice] = []
    """What the recipe's budget chooses from; empty without one."""

    def methods(self) -> list[Method]:
        """The methods that it names, each once."""
        return [METHODS[name] for name in methods_of(self.method, [*self.overrides, *self.over])]

    def code(self) -> list[str]:
        """The modules of the methods, for the hash of the code that a layer's job executes."""
        return sorted({module for method in self.methods() for module in method.code})

    def for_module(self, name: str) -> ModuleSettings:
        """The settings of the linear with the full module name `name`."""
        settings = ModuleSettings(**{key: getattr(self, key) for key in ModuleSettings.model_fields})
        for override in self.overrides:
            if fnmatch.fnmatchcase(name, override.modules):
                settings = override.apply(settings)
        return settings

    def choices(self, name: str) -> list[Choice]:
        """What the budget may choose for this linear; one that changes nothing where an override decides its bits."""
        decided = any(fnmatch.fnmatchcase(name, override.modules) for override in self.overrides if override.given())
        return [Choice()] if decided or not self.over else self.over


def methods_of(own: str, changes: Iterable[Choice]) -> list[str]:
    return sorted({own, *(change.method for change in changes if change.method)})


def sharing_patterns(groups: Sharing) -> list[str]:
    """The names in the lists of `share_right` as patterns over full module names."""
    return [] if isinstance(groups, bool) else [f"*.{name}" for group in groups for name in group]


def check_patterns(where: str, patterns: Iterable[str], modules: Iterable[str]) -> None:
    """Raise ArmorError for the first of `patterns` that matches none of the full names `modules`: likely a typo."""
    modules = list(modules)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in modules):
            ends = sorted({f"*.{name.rpartition('.')[2]}" for name in modules})
            raise ArmorError(f"{where}: {pattern!r} matches no linear of the model{nearest(pattern, ends)}")
