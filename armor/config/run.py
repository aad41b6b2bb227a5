"""The whole configuration: what there is, and what of it goes together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import Field, model_validator

from armor.config.common import Name, nearest
from armor.config.measures import BenchmarkSettings, EvaluationSettings
from armor.config.recipes import LayerSettings, Recipe
from armor.config.report import ReportPair, ReportSettings
from armor.config.sources import CalibrationSettings, ModelSettings
from armor.core.typed import Typed
from armor.format.layout import RESERVED
from armor.methods import METHODS

__all__ = ["Asked", "Config", "Run"]


@dataclass(frozen=True)
class Asked:
    """What is asked for of one model and recipe: perplexities on texts, evaluations on tasks, benchmarks, by name."""

    texts: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    benchmarks: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any((self.texts, self.tasks, self.benchmarks))

    def with_those_of(self, other: Asked) -> Asked:
        """Both, each name once."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Asked(*(list(dict.fromkeys([*own, *more])) for own, more in pairs))


class Run(Typed):
    """Models, recipes, evaluations and benchmarks that go together; a list left out means all of them."""

    models: list[Name] | None = None
    """The models, by name."""
    recipes: list[Name] | None = None
    """The recipes, by name."""
    evaluations: list[Name] | None = None
    """The evaluations, by name."""
    benchmarks: list[Name] | None = None
    """The benchmarks, by name."""


class Config(Typed):
    """Everything that a run of the pipeline needs to know."""

    seed: int = 0
    """The seed of every random choice."""
    models: dict[Name, ModelSettings] = Field(min_length=1)
    """Where each model comes from."""
    calibrations: dict[Name, CalibrationSettings] = {}
    """The texts that statistics are taken on."""
    recipes: dict[Name, Recipe] = Field(min_length=1)
    """The ways to compress."""
    evaluations: dict[Name, EvaluationSettings] = {}
    """The ways to measure quality."""
    benchmarks: dict[Name, BenchmarkSettings] = {}
    """The ways to measure speed and memory."""
    runs: list[Run] = Field(default=[Run()], min_length=1)
    """Which of the above go together; left out: everything with everything."""

    @model_validator(mode="after")
    def _check(self) -> Config:  # noqa: C901  one check after another, each of a line or two
        for index, run in enumerate(self.runs):
            for kind in Run.model_fields:
                for name in getattr(run, kind) or []:
                    _known(f"runs.{index}.{kind}", name, getattr(self, kind))
        for kind, reserved in RESERVED.items():
            for name in {*reserved} & set(getattr(self, kind)):
                raise ValueError(f"{kind}.{name}: this name is a folder of the pipeline itself; choose another")
        for name, recipe in self.recipes.items():
            if recipe.method == "dense" and recipe.overrides:
                raise ValueError(
                    f"recipes.{name}.overrides: a dense recipe has none; to compress a part of the model, choose a "
                    "method and list the other modules in keep_dense"
                )
            if recipe.calibration is not None:
                _known(f"recipes.{name}.calibration", recipe.calibration, self.calibrations)
            elif recipe.method != "dense" and len(self.calibrations) != 1:
                raise ValueError(
                    f"recipes.{name}.calibration: not given, and there are {len(self.calibrations)} calibrations to "
                    "choose from; name one"
                )
            needing = [method for method in recipe.methods() if "gram" in METHODS[method].statistics]
            if needing and not self.calibrations[self.calibration_of(name)].gram:
                raise ValueError(
                    f"recipes.{name}: {needing[0]} needs the Gram matrices of the inputs; set "
                    f"calibrations.{self.calibration_of(name)}.gram: true"
                )
        pairs = self.pairs()
        if not pairs:
            raise ValueError("runs: no model goes with any recipe; nothing to do")
        if all(self.is_dense(recipe) and not asked for (_, recipe), asked in pairs.items()):
            raise ValueError("runs: dense recipes alone, no evaluation and no benchmark; nothing to do")
        return self

    def names(self, kind: str, run: Run) -> list[str]:
        """The names of `kind` (models, recipes, ...) that take part in `run`."""
        chosen = getattr(run, kind)
        return list(getattr(self, kind)) if chosen is None else chosen

    def pairs(self) -> dict[tuple[str, str], Asked]:
        """Every (model, recipe) that is asked for, with its evaluations and benchmarks, in the order of the config."""
        found: dict[tuple[str, str], Asked] = {}
        for run in self.runs:
            for model in self.names("models", run):
                for recipe in self.names("recipes", run):
                    known = found.get((model, recipe), Asked())
                    added = Asked(
                        texts=[n for n in self.names("evaluations", run) if not self.evaluations[n].tasks],
                        tasks=[n for n in self.names("evaluations", run) if self.evaluations[n].tasks],
                        benchmarks=self.names("benchmarks", run),
                    )
                    found[model, recipe] = known.with_those_of(added)
        return found

    def is_dense(self, recipe: str) -> bool:
        """Whether `recipe` leaves the model as it is, so that there is nothing to factorize."""
        return self.recipes[recipe].method == "dense"

    def benchmarked(self, model: str, benchmark: str) -> list[str]:
        """The compressing recipes of `model` that `benchmark` times, beside the dense model."""
        asked = {recipe: asked for (name, recipe), asked in self.pairs().items() if name == model}
        return [name for name, own in asked.items() if benchmark in own.benchmarks and not self.is_dense(name)]

    def calibration_of(self, recipe: str) -> str:
        """The name of the calibration that `recipe` uses."""
        return self.recipes[recipe].calibration or next(iter(self.calibrations))

    def report_settings(self) -> ReportSettings:
        """What the report is about: every pair, in order."""
        pairs = [
            ReportPair(
                model=model,
                recipe=name,
                method=self.recipes[name].method,
                pattern=self.recipes[name].pattern,
                block_size=self.recipes[name].block_size,
                calibration=self.calibration_of(name) if self.calibrations else None,
                evaluations=asked.texts,
                tasks={evaluation: self.evaluations[evaluation].task_names() for evaluation in asked.tasks},
                benchmarks=asked.benchmarks,
            )
            for (model, name), asked in self.pairs().items()
        ]
        return ReportSettings(pairs=pairs, config=self.model_dump(mode="json", exclude_defaults=True))

    def module_patterns(self, recipe: str) -> list[str]:
        """The patterns over module names that `recipe` has, each of which should match something."""
        settings = self.recipes[recipe]
        return [*settings.keep_dense, *(override.modules for override in settings.overrides)]

    def layer_settings(self, recipe: str, layer: int) -> LayerSettings:
        """`recipe` resolved for decoder layer `layer`."""
        return self.recipes[recipe].for_layer(layer, self.seed)


def _known(where: str, name: str, known: dict[str, Any]) -> None:
    if name not in known:
        raise ValueError(f"{where}: {name!r} is not defined{nearest(name, known)}")
