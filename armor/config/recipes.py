"""Settings of how a model is compressed: a recipe, and what it comes to for one decoder layer and one linear."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from armor.config.common import Name, PatternText, nearest
from armor.config.training import RefineSettings, TrainingSettings, TuneSettings
from armor.core.errors import ArmorError
from armor.core.typed import Typed
from armor.methods import METHODS
from armor.methods.solver.settings import Algorithm, Selection, SolverSettings

__all__ = [
    "BudgetSettings",
    "Choice",
    "LayerSettings",
    "MethodName",
    "ModuleSettings",
    "Override",
    "PriceSettings",
    "Recipe",
    "check_patterns",
]


def _known_method(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"{name!r} is unknown{nearest(name, METHODS)}")
    return name


MethodName = Annotated[str, AfterValidator(_known_method), Field(json_schema_extra={"enum": list(METHODS)})]


class SolverChange(Typed):
    """The part of SolverSettings that an override changes."""

    iterations: int | None = Field(default=None, ge=1)
    """Another budget."""
    algorithm: Algorithm | None = None
    """Another optimiser."""
    selection: Selection | None = None
    """Another rule of choice."""


class ModuleSettings(Typed):
    """How one linear is compressed."""

    method: MethodName = "armor"
    """How a weight is compressed; dense leaves it as it is. The methods have a table of their own."""
    pattern: PatternText = "2:4"
    """n:m keeps at most n of every m consecutive weights of a row; 50% keeps that share of each row."""
    block_size: int = Field(default=128, ge=1)
    """Size of the blocks around the core. Where it does not divide a dimension, the largest divisor below it serves."""
    solver: SolverSettings = SolverSettings()
    """The optimiser of the method armor."""


class Choice(Typed):
    """What decides the bits of a linear, where it is another than the recipe says."""

    method: MethodName | None = None
    """Another method; unset: that of the recipe."""
    pattern: PatternText | None = None
    """Another pattern; unset: that of the recipe."""
    block_size: int | None = Field(default=None, ge=1)
    """Another block size; unset: that of the recipe."""

    def given(self) -> dict[str, str | int]:
        """What it changes, by key."""
        found = {key: getattr(self, key) for key in Choice.model_fields}
        return {key: value for key, value in found.items() if value is not None}

    def apply(self, settings: ModuleSettings) -> ModuleSettings:
        """`settings` with what is given here put in their place."""
        return settings.model_copy(update=self.given())


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
        solver = settings.solver.model_copy(update=self.solver.model_dump(exclude_none=True))
        return settings.model_copy(update={"solver": solver})


class BudgetSettings(Typed):
    """Bits to spend: the choice for each linear that costs the least KL divergence, as predicted, is looked for.

    Linears whose bits `overrides` or `keep_dense` decide stay as these say; their bits count.
    """

    bits: float = Field(gt=0)
    """The stored bits per weight of all linears together, in the mean and at most: the report's bits/weight."""
    over: list[Choice] = Field(
        default=[*(Choice(block_size=d) for d in (16, 32, 64, 128)), Choice(method="nowag"), Choice(method="dense")],
        min_length=1,
    )
    """What each linear may become. Unset: blocks of 16, 32, 64 and 128, nowag, dense."""
    sequences: int = Field(default=8, ge=1)
    """How many token sequences of the recipe's calibration the sensitivities are measured on."""
    sequence_length: int | None = Field(default=None, ge=2)
    """Tokens in each; unset: as the calibration says, or else the model's context length."""
    iterations: int = Field(default=30, ge=3)
    """The solver's iterations where a choice is tried: once with these and once with a third of them. What those of the
    recipe would come to is extrapolated."""


class LayerSettings(ModuleSettings):
    """A recipe resolved for one decoder layer."""

    seed: int = 0
    """The seed of every random choice."""
    overrides: list[Override] = []
    """Those that concern this layer, their layer numbers dropped; later ones win."""
    over: list[Choice] = []
    """What the recipe's budget chooses from; empty without one."""

    def methods(self) -> list[str]:
        """The methods that it names, each once."""
        return _methods(self.method, [*self.overrides, *self.over])

    def code(self) -> list[str]:
        """The modules of the methods, for the hash of the code that a layer's job executes."""
        return sorted({module for name in self.methods() for module in METHODS[name].modules})

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


class PriceSettings(LayerSettings):
    """A recipe resolved for one decoder layer, whose choices are priced."""

    iterations: int = Field(ge=3)
    """The solver's iterations where a choice is tried."""


class Recipe(ModuleSettings):
    """A way to compress a model: a method with its settings, a calibration, and exceptions.

    Or, with `base`, a way to go on from what another recipe makes, by refine, tune or both.
    """

    budget: BudgetSettings | None = None
    """Choose method, pattern and block size for each linear within so many bits; unset: the same for all."""
    base: Name | None = None
    """The recipe to start from: its factors are trained further, and it says everything about how they are made."""
    refine: RefineSettings | None = None
    """Train each decoder layer against the dense one; unset: don't."""
    tune: TuneSettings | None = None
    """Then train the whole model against the dense one's predictions; unset: don't."""
    calibration: Name | None = None
    """The calibration whose statistics serve; unset: the only one there is."""
    keep_dense: list[str] = []
    """Shell-style patterns over full module names; what matches stays as it is."""
    overrides: list[Override] = []
    """Exceptions by layer number and module pattern; later ones win."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        solvers = [self.solver, *(override.solver for override in self.overrides if override.solver)]
        if any(s.selection for s in solvers) and all(s.algorithm != "published" for s in solvers):
            raise ValueError("solver.selection: goes with algorithm: published")
        if self.base is not None:
            own = [key for key in Recipe.model_fields if key not in ("base", "refine", "tune")]
            if given := [key for key in own if getattr(self, key) != Recipe.model_fields[key].default]:
                raise ValueError(f"{given[0]}: is what the base says; leave it out, or leave base out")
            if not self.training():
                raise ValueError("base: goes with refine or tune; without both this is the recipe that it names")
        elif self.method == "dense" and self.training():
            raise ValueError(f"{[*self.training()][0]}: a dense recipe has nothing to train")
        elif self.method == "dense" and self.budget is not None:
            raise ValueError("budget: a dense recipe has none; choose a method, and list dense in over")
        return self

    def training(self) -> dict[str, TrainingSettings]:
        """The stages of training that it asks for, in order."""
        return {name: found for name, found in (("refine", self.refine), ("tune", self.tune)) if found is not None}

    def methods(self) -> list[str]:
        """The methods that it names, each once."""
        dense = [Choice(method="dense") for _ in self.keep_dense]
        return _methods(self.method, [*self.overrides, *dense, *(self.budget.over if self.budget else [])])

    def for_layer(self, layer: int, seed: int = 0) -> LayerSettings:
        """The recipe resolved for decoder layer `layer`."""
        overrides = [o for o in self.overrides if o.layers is None or layer in o.layers]
        overrides = [Override(**o.model_dump(exclude_unset=True, exclude={"layers"})) for o in overrides]
        overrides += [Override(modules=pattern, method="dense") for pattern in self.keep_dense]
        base = {key: getattr(self, key) for key in ModuleSettings.model_fields}
        return LayerSettings(**base, seed=seed, overrides=overrides, over=self.budget.over if self.budget else [])


def _methods(own: str, changes: Iterable[Choice]) -> list[str]:
    return sorted({own, *(change.method for change in changes if change.method)})


def check_patterns(where: str, patterns: Iterable[str], modules: Iterable[str]) -> None:
    """Raise ArmorError for the first of `patterns` that matches none of the full names `modules`: likely a typo."""
    modules = list(modules)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in modules):
            ends = sorted({f"*.{name.rpartition('.')[2]}" for name in modules})
            raise ArmorError(f"{where}: {pattern!r} matches no linear of the model{nearest(pattern, ends)}")
