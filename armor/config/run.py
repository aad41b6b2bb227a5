"""The whole configuration: what there is, and what of it goes together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field, model_validator

from armor.config.budget import BudgetSettings, PriceSettings
from armor.config.common import Name, nearest
from armor.config.layers import LayerSettings
from armor.config.measures import BenchmarkSettings, EvaluationSettings
from armor.config.quantization import QuantizeSettings
from armor.config.recipes import Recipe
from armor.config.report import ReportPair, ReportSettings
from armor.config.sample import Sample, SensitivityJob
from armor.config.sources import CalibrationSettings, ModelSettings, overlap
from armor.config.tasks import asked_tasks
from armor.config.training import RefineJob, TrainingStage, TuneJob, check_held_out
from armor.core.errors import ArmorError
from armor.core.typed import Typed
from armor.format.layout import RESERVED
from armor.methods import METHODS, UNCHANGED

__all__ = ["Asked", "Config", "Run"]


@dataclass(frozen=True)
class Asked:
    """What is asked for of one model and recipe, by name.

    That is perplexities on texts, evaluations on tasks, benchmarks in one process, and those behind a server.
    """

    texts: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    benchmarks: list[str] = field(default_factory=list)
    serving: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(vars(self).values())

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
    def _check(self) -> Config:
        for index, run in enumerate(self.runs):
            for kind in Run.model_fields:
                for name in getattr(run, kind) or []:
                    _known(f"runs.{index}.{kind}", name, getattr(self, kind))
        for kind, reserved in RESERVED.items():
            for name in {*reserved} & set(getattr(self, kind)):
                raise ValueError(f"{kind}.{name}: this name is a folder of the pipeline itself; choose another")
        for name, evaluation in self.evaluations.items():
            try:
                asked_tasks(evaluation)
            except ArmorError as error:
                raise ValueError(f"evaluations.{name}.{error}") from None
        for name in self.recipes:
            self._check_recipe(name)
        for name in self.recipes:
            self._check_training(name)
        pairs = self.pairs()
        if not pairs:
            raise ValueError("runs: no model goes with any recipe; nothing to do")
        if all(self.is_dense(recipe) and not asked for (_, recipe), asked in pairs.items()):
            raise ValueError("runs: dense recipes alone, no evaluation and no benchmark; nothing to do")
        return self

    def _check_recipe(self, name: str) -> None:
        """A recipe has the calibration that it needs."""
        recipe = self.recipes[name]
        if name == UNCHANGED and not self.is_dense(name):
            raise ValueError(f"recipes.{name}: benchmarks call the model itself so; choose another name")
        if recipe.base is not None:
            self._check_base(name)
            return
        if recipe.is_dense and recipe.overrides:
            raise ValueError(
                f"recipes.{name}.overrides: a dense recipe has none; to compress a part of the model, choose a "
                "method and list the other modules in keep_dense"
            )
        if recipe.calibration is not None:
            _known(f"recipes.{name}.calibration", recipe.calibration, self.calibrations)
        elif not recipe.is_dense and len(self.calibrations) != 1:
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

    def _check_base(self, name: str) -> None:
        line = [name]
        while (base := self.recipes[line[-1]].base) is not None:
            _known(f"recipes.{line[-1]}.base", base, self.recipes)
            if base in line:
                raise ValueError(f"recipes.{name}.base: {' -> '.join([*line, base])}: goes round in a circle")
            if (method := self.recipes[base].integers()) is not None:
                raise ValueError(
                    f"recipes.{line[-1]}.base: {base} has {method}'s integers of whole weights, which nothing trains "
                    "or rounds again; name a recipe in floats"
                )
            line.append(base)
        quantized = [recipe for recipe in line if self.recipes[recipe].quantize is not None]
        if len(quantized) > 1:
            raise ValueError(
                f"recipes.{quantized[0]}.quantize: {quantized[1]}, from which it starts, is quantized already; leave "
                "quantize out, or name a recipe in floats as base"
            )
        if self.is_dense(name):
            raise ValueError(f"recipes.{name}.{self.recipes[name].stages()[0]}: a dense recipe has no factors")

    def _check_training(self, name: str) -> None:
        """The texts that a recipe is trained on are there, and none that it is evaluated on, or what starts from it."""
        for stage, settings in self.recipes[name].training().items():
            if settings.calibration is not None:
                _known(f"recipes.{name}.{stage}.calibration", settings.calibration, self.calibrations)
            text = self.sample(name, stage).text
            trained = [asked for (_, recipe), asked in self.pairs().items() if (stage, name) in self.chain(recipe)]
            for evaluation in (e for asked in trained for e in (*asked.texts, *asked.tasks)):
                evaluated = self.evaluations[evaluation].text
                if evaluated is not None and overlap(text, evaluated):
                    raise ValueError(
                        f"recipes.{name}.{stage}: trains on documents of evaluations.{evaluation}; keep them apart by "
                        "documents, or name a calibration on another text"
                    )
        try:
            check_held_out([self._training(*step) for step in self.chain(name) if step[0] in ("refine", "tune")])
        except ArmorError as error:
            raise ValueError(str(error)) from None

    def _training(self, stage: str, recipe: str) -> TrainingStage:
        settings = self.recipes[recipe].training()[stage]
        return TrainingStage(f"recipes.{recipe}.{stage}", settings, self.sample(recipe, stage))

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
                        benchmarks=[n for n in self.names("benchmarks", run) if not self.benchmarks[n].engine],
                        serving=[n for n in self.names("benchmarks", run) if self.benchmarks[n].engine],
                    )
                    found[model, recipe] = known.with_those_of(added)
        return found

    def is_dense(self, recipe: str) -> bool:
        """Whether `recipe` leaves the model as it is, so that there is nothing to factorize."""
        return self.factorized(recipe).is_dense

    def chain(self, recipe: str) -> list[tuple[str, str]]:
        """The stages that make the factors of `recipe` one after the other, each with the recipe that asks for it."""
        settings = self.recipes[recipe]
        before = [("factorize", recipe)] if settings.base is None else self.chain(settings.base)
        return [*before, *((stage, recipe) for stage in settings.stages())]

    def owner(self, recipe: str) -> str:
        """The recipe whose factors `recipe` starts from: the first of its chain, or itself."""
        return self.chain(recipe)[0][1]

    def before(self, stage: str, recipe: str) -> tuple[str, str]:
        """What makes the factors that the `stage` of `recipe` starts from: a stage and a recipe."""
        line = self.chain(recipe)
        return line[line.index((stage, recipe)) - 1]

    def factorized(self, recipe: str) -> Recipe:
        """The recipe that says how the factors of `recipe` are made: its own, or its base's."""
        return self.recipes[self.owner(recipe)]

    def sample(self, recipe: str, stage: str) -> Sample:
        """The sequences that `stage` (refine or tune) of `recipe` trains on, the held-out ones at the end."""
        settings = self.recipes[recipe].training()[stage]
        calibration = self.calibrations[settings.calibration or self.calibration_of(recipe)]
        return Sample(
            text=calibration.text,
            sequences=settings.sequences + settings.held_out,
            sequence_length=settings.sequence_length or calibration.sequence_length,
        )

    def states_of(self, recipe: str) -> str:
        """The name of the dense model's hidden states that `recipe` is refined on: recipes with one sample share it."""
        settings = self.recipes[recipe].refine
        assert settings is not None
        return _sample_name(settings.calibration or self.calibration_of(recipe), self.sample(recipe, "refine"))

    def states(self) -> dict[str, Sample]:
        """What hidden states there are to make, by name."""
        refined = [name for name, recipe in self.recipes.items() if recipe.refine is not None]
        return {self.states_of(name): self.sample(name, "refine") for name in refined}

    def sensitivity_of(self, recipe: str) -> str:
        """The name of the sensitivities that the budget of `recipe` goes by: recipes with one sample share them."""
        return _sample_name(self.calibration_of(recipe), self._budget_sample(recipe))

    def sensitivities(self) -> dict[str, SensitivityJob]:
        """What sensitivities there are to measure, by name."""
        asking = [name for name, recipe in self.recipes.items() if recipe.budget is not None]
        return {self.sensitivity_of(n): SensitivityJob(sample=self._budget_sample(n), seed=self.seed) for n in asking}

    def _budget_sample(self, recipe: str) -> Sample:
        budget, calibration = self.budget(recipe), self.calibrations[self.calibration_of(recipe)]
        length = budget.sequence_length or calibration.sequence_length
        return Sample(text=calibration.text, sequences=budget.sequences, sequence_length=length)

    def budget(self, recipe: str) -> BudgetSettings:
        """The budget of `recipe`, which has one."""
        budget = self.recipes[recipe].budget
        assert budget is not None
        return budget

    def price_settings(self, recipe: str, layer: int) -> PriceSettings:
        """`recipe` resolved for decoder layer `layer`, whose choices are priced."""
        return PriceSettings(**dict(self.layer_settings(recipe, layer)), iterations=self.budget(recipe).iterations)

    def refine_settings(self, recipe: str) -> RefineJob:
        """What the refinement of a decoder layer reads."""
        settings = self.recipes[recipe].refine
        assert settings is not None
        own = settings.replace(calibration=None)  # a name; the sample is what it stands for
        return RefineJob(refine=own, sample=self.sample(recipe, "refine"), seed=self.seed)

    def tune_settings(self, recipe: str) -> TuneJob:
        """What tuning reads."""
        settings = self.recipes[recipe].tune
        assert settings is not None
        own = settings.replace(calibration=None)
        return TuneJob(tune=own, sample=self.sample(recipe, "tune"), seed=self.seed)

    def quantize_settings(self, recipe: str, layer: int) -> QuantizeSettings:
        """What the quantization of decoder layer `layer` reads."""
        settings = self.recipes[recipe].quantize
        assert settings is not None
        return settings.for_layer(layer)

    def benchmarked(self, model: str, benchmark: str) -> list[str]:
        """The compressing recipes of `model` that `benchmark` times, beside the dense model."""
        asked = {recipe: asked for (name, recipe), asked in self.pairs().items() if name == model}
        asking = [name for name, own in asked.items() if benchmark in (*own.benchmarks, *own.serving)]
        return [name for name in asking if not self.is_dense(name)]

    def served(self) -> list[str]:
        """The evaluations and benchmarks behind a server that are asked for, each once: evaluations.bbh, say."""
        asked = self.pairs().values()
        tasks = [f"evaluations.{name}" for one in asked for name in one.tasks if self.evaluations[name].engine]
        return list(dict.fromkeys([*tasks, *(f"benchmarks.{name}" for one in asked for name in one.serving)]))

    def calibration_of(self, recipe: str) -> str:
        """The name of the calibration that `recipe` uses."""
        return self.factorized(recipe).calibration or next(iter(self.calibrations))

    def report_settings(self) -> ReportSettings:
        """What the report is about: every pair, in order."""
        pairs = [self._reported(*names, asked) for names, asked in self.pairs().items()]
        return ReportSettings(pairs=pairs, config=self.model_dump(mode="json", exclude_defaults=True))

    def _reported(self, model: str, recipe: str, asked: Asked) -> ReportPair:
        made = self.factorized(recipe)
        return ReportPair(
            model=model,
            recipe=recipe,
            method=made.method,
            title=made.how.title,
            pattern=str(made.how.pattern(made)),
            block_size=None if made.budget else made.block_size,
            chain=self.chain(recipe),
            calibration=self.calibration_of(recipe) if self.calibrations else None,
            evaluations=asked.texts,
            tasks={evaluation: [*asked_tasks(self.evaluations[evaluation])] for evaluation in asked.tasks},
            benchmarks=asked.benchmarks,
            serving=asked.serving,
        )

    def check_model(self, recipe: str, model: str, modules: Iterable[str], layers: int) -> None:
        """Raise ArmorError for a pattern or layer of `recipe` that `model`, with these modules and layers, has not."""
        modules = list(modules)
        for own in (self.factorized(recipe), self.recipes[recipe]):
            own.check_model(f"recipes.{recipe}, model {model}", modules, layers)

    def layer_settings(self, recipe: str, layer: int) -> LayerSettings:
        """`recipe` resolved for decoder layer `layer`."""
        return self.factorized(recipe).for_layer(layer, self.seed)


def _sample_name(calibration: str, sample: Sample) -> str:
    return f"{calibration}-{sample.sequences}x{sample.sequence_length or 'context'}"


def _known(where: str, name: str, known: dict[str, Any]) -> None:
    if name not in known:
        raise ValueError(f"{where}: {name!r} is not defined{nearest(name, known)}")
