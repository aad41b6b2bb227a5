"""The one table of jobs: what the workflow can do, stage by stage, in the order of the data.

A stage is one row: its outputs, the names of its jobs, what they read of others and of the configuration, the entry of
its code. The rules, `armor status`, `armor explain`, `armor plan`, the line of progress and the fork server read it.
The paths come from `armor.format.layout`. `armor.run.jobs` makes the jobs from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from armor.config.run import Config
from armor.core.typed import Typed
from armor.format.names import beside, factors_beside
from armor.format.records.base import Input

__all__ = ["CLUSTER_CORES", "STAGES", "Names", "Needed", "Stage"]

CLUSTER_CORES = 8
"""What a rule that takes all cores asks of a cluster, which has no number of them."""
Names = tuple[str, ...]
"""What tells a job from the others of its stage, in the order of the rule's wildcards."""
Needed = tuple[str, str, Names]
"""What a rule calls one of its inputs, the stage that makes it, and that job's names."""


@dataclass(frozen=True)
class Stage:
    """One stage of the workflow: a rule of the same name.

    `outputs(results, *names)` are the files that prove a job done, first of all that which others read; the JSON among
    them is its record, which says what made it. `asked(config)` are the names of its jobs, without those that the model
    decides. `entry` is the module whose code it executes. `inputs(config, *names)` are the jobs that it reads
    from, `settings(config, *names)` what of the configuration it reads, `also(config, *names)` modules beside entry.
    """

    outputs: Callable[..., tuple[str, ...]]
    asked: Callable[[Config], Iterable[Names]]
    entry: str
    seconds: float
    """What a job takes where nothing is known of the machine; the line of progress guesses the time left from it."""
    inputs: Callable[..., list[Needed]] = lambda config, *names: []
    settings: Callable[..., Typed | None] = lambda config, *names: None
    also: Callable[..., list[str]] = lambda config, *names: []
    by_layer: bool = False
    """Whether there are jobs for each decoder layer, whose number is the third of their names."""
    by_group: bool = False
    """Whether they are one for each group of experts of a layer, the fourth name."""
    reported: bool = False
    """Whether the report reads its records."""
    forked: bool = True
    """Whether the fork server imports its entry before there is a job, and does its command."""
    stored: Callable[..., tuple[str, ...]] | None = None
    """On object storage, where nothing arrives that is not declared: all files and folders that come of it, first of
    all that which others read; None if they are the outputs. A name without a suffix is a folder's."""


def _compressed(config: Config) -> list[Names]:
    return [pair for pair in config.pairs() if not config.is_dense(pair[1])]


def _made(config: Config, stage: str) -> list[Names]:
    """The models and recipes whose factors `stage` makes; recipes that start from the same one share its."""
    chains = [(model, made) for model, recipe in _compressed(config) for made in config.chain(recipe)]
    return [(model, owner) for model, (found, owner) in chains if found == stage]


def _budgeted(config: Config) -> list[Names]:
    return [names for names in _made(config, "factorize") if config.recipes[names[1]].budget]


def _asked(config: Config, kind: str) -> list[Names]:
    """Model, recipe and name of every evaluation or benchmark; `kind` is a field of Asked."""
    return [(*pair, name) for pair, asked in config.pairs().items() for name in getattr(asked, kind)]


def _once(config: Config, kind: str) -> list[Names]:
    """The same for all recipes of a model together."""
    return [(model, name) for model, _, name in _asked(config, kind)]


def _model(*names: str) -> list[Needed]:
    """The inputs of nearly every stage: where the model is, and what it is made of."""
    return [(Input.MODEL, "fetch", names[:1]), ("topology", "inspect", names[:1])]


def _with_folder(record: str) -> tuple[str, ...]:
    """A record and the folder that it speaks of."""
    return record, str(beside(record))


def _finished(config: Config, model: str, recipe: str) -> Needed:
    """What an evaluation reads: the checkpoint of a recipe, or the source where that leaves the model as it is."""
    return (Input.MODEL, "fetch", (model,)) if config.is_dense(recipe) else (Input.MODEL, "assemble", (model, recipe))


def _factorizing(config: Config, model: str, recipe: str) -> list[Needed]:
    """What factorize reads, of a layer or of a group of its experts."""
    return [
        *_model(model),
        ("calibration", "calibrate", (model, config.calibration_of(recipe))),
        *([(Input.BUDGET, "budget", (model, recipe))] if config.recipes[recipe].budget else []),
    ]


def _training(config: Config, stage: str, model: str, recipe: str, *layer: str) -> list[Needed]:
    """What refine, tune and quantize read: the factors before them, of one layer or all, and the statistics."""
    before, owner = config.before(stage, recipe)
    names = (model, owner) if before == "tune" else (model, owner, *layer)
    return [
        *_model(model),
        ("factors", before, names),
        ("calibration", "calibrate", (model, config.calibration_of(owner))),
    ]


def _refine_inputs(config: Config, model: str, recipe: str, layer: str) -> list[Needed]:
    chained = layer.isdigit() and config.refine_settings(recipe).refine.inputs == "compressed"
    return [
        *_training(config, "refine", model, recipe, layer),
        (Input.STATES, "states", (model, config.states_of(recipe))),
        *((Input.BEFORE, "refine", (model, recipe, str(number))) for number in range(int(layer) if chained else 0)),
    ]


def _final(config: Config, model: str, recipe: str) -> Needed:
    """The factors that become a checkpoint."""
    stage, owner = config.chain(recipe)[-1]
    return ("factors", stage, (model, owner))


def _text_inputs(config: Config, model: str, recipe: str, evaluation: str) -> list[Needed]:
    dense = [] if config.is_dense(recipe) else [(Input.DENSE, "fetch", (model,))]
    return [_finished(config, model, recipe), *dense, ("predictions", "predict", (model, evaluation))]


def _timed(config: Config, model: str, benchmark: str) -> list[Needed]:
    """The dense model and its recipes, which take turns."""
    recipes = config.benchmarked(model, benchmark)
    return [(Input.DENSE, "fetch", (model,)), *((recipe, "assemble", (model, recipe)) for recipe in recipes)]


STAGES = {
    "fetch": Stage(
        outputs=lambda results, model: (results.source(model),),
        asked=lambda config: [(model,) for model, _ in config.pairs()],
        entry="armor.model.fetch",
        seconds=20,
        settings=lambda config, model: config.models[model],
        forked=False,
    ),
    "inspect": Stage(
        outputs=lambda results, model: (results.topology(model),),
        asked=lambda config: [(model,) for model, _ in _compressed(config)],
        entry="armor.model.inspect",
        seconds=4,
        inputs=lambda config, model: _model(model)[:1],
        forked=False,  # so that Snakemake sees its memory, which the record does not tell
    ),
    "calibrate": Stage(
        outputs=lambda results, model, calibration: (results.calibration(model, calibration),),
        asked=lambda config: [(model, config.calibration_of(recipe)) for model, recipe in _compressed(config)],
        entry="armor.calibrate.capture",
        seconds=45,
        inputs=lambda config, model, calibration: _model(model),
        settings=lambda config, model, calibration: config.calibrations[calibration],
        reported=True,
        stored=lambda results, *names: (str(Path(results.calibration(*names)).parent),),
    ),
    "sensitivity": Stage(
        outputs=lambda results, model, sensitivity: (results.sensitivity(model, sensitivity),),
        asked=lambda config: [(model, config.sensitivity_of(recipe)) for model, recipe in _budgeted(config)],
        entry="armor.training.sensitivity",
        seconds=60,
        inputs=lambda config, model, sensitivity: _model(model),
        settings=lambda config, model, sensitivity: config.sensitivities()[sensitivity],
        stored=lambda results, *names: (results.sensitivity(*names), str(factors_beside(results.sensitivity(*names)))),
    ),
    "price": Stage(
        outputs=lambda results, *names: (results.prices(*names),),
        asked=_budgeted,
        entry="armor.factorize.prices",
        seconds=25,
        inputs=lambda config, model, recipe, layer: [
            *_model(model),
            ("calibration", "calibrate", (model, config.calibration_of(recipe))),
            (Input.SENSITIVITY, "sensitivity", (model, config.sensitivity_of(recipe))),
        ],
        settings=lambda config, model, recipe, layer: config.price_settings(recipe, int(layer)),
        also=lambda config, model, recipe, layer: config.price_settings(recipe, int(layer)).code(),
        by_layer=True,
    ),
    "budget": Stage(
        outputs=lambda results, model, recipe: (results.budget(model, recipe),),
        asked=_budgeted,
        entry="armor.factorize.budget",
        seconds=2,
        inputs=lambda config, model, recipe: [(Input.PRICES, "price", (model, recipe))],
        settings=lambda config, model, recipe: config.budget(recipe),
    ),
    "experts": Stage(
        outputs=lambda results, *names: (results.experts(*names),),
        asked=lambda config: _made(config, "factorize"),
        entry="armor.factorize.layer",
        seconds=0.5,
        inputs=lambda config, model, recipe, layer, experts: _factorizing(config, model, recipe),
        settings=lambda config, model, recipe, layer, experts: config.layer_settings(recipe, int(layer)),
        also=lambda config, model, recipe, layer, experts: config.layer_settings(recipe, int(layer)).code(),
        by_layer=True,
        by_group=True,
    ),
    "factorize": Stage(
        outputs=lambda results, *names: (results.factors(*names), results.layer(*names)),
        asked=lambda config: _made(config, "factorize"),
        entry="armor.factorize.layer",
        seconds=0.5,
        inputs=lambda config, model, recipe, layer: [
            *_factorizing(config, model, recipe),
            ("experts", "experts", (model, recipe, layer)),
        ],
        settings=lambda config, model, recipe, layer: config.layer_settings(recipe, int(layer)),
        also=lambda config, model, recipe, layer: config.layer_settings(recipe, int(layer)).code(),
        by_layer=True,
        reported=True,
    ),
    "states": Stage(
        outputs=lambda results, model, states: (results.states(model, states),),
        asked=lambda config: [(model, config.states_of(recipe)) for model, recipe in _made(config, "refine")],
        entry="armor.training.states",
        seconds=60,
        inputs=lambda config, model, states: _model(model),
        settings=lambda config, model, states: config.states()[states],
        stored=lambda results, *names: _with_folder(results.states(*names)),
    ),
    "refine": Stage(
        outputs=lambda results, *names: (results.factors(*names, "refine"), results.layer(*names, "refine")),
        asked=lambda config: _made(config, "refine"),
        entry="armor.training.refine",
        seconds=50,
        inputs=_refine_inputs,
        settings=lambda config, model, recipe, layer: config.refine_settings(recipe),
        by_layer=True,
        reported=True,
    ),
    "refined": Stage(
        outputs=lambda results, model, recipe: (results.refined(model, recipe),),
        asked=lambda config: _made(config, "refine"),
        entry="armor.training.refined",
        seconds=1,
        inputs=lambda config, model, recipe: [("factors", "refine", (model, recipe))],
    ),
    "quantize": Stage(
        outputs=lambda results, *names: (results.factors(*names, "quantize"), results.layer(*names, "quantize")),
        entry="armor.factorize.quantize",
        asked=lambda config: _made(config, "quantize"),
        seconds=5,
        inputs=lambda config, model, recipe, layer: _training(config, "quantize", model, recipe, layer),
        settings=lambda config, model, recipe, layer: config.quantize_settings(recipe, int(layer)),
        by_layer=True,
        reported=True,
    ),
    "tune": Stage(
        outputs=lambda results, model, recipe: (results.tuned(model, recipe),),
        asked=lambda config: _made(config, "tune"),
        entry="armor.training.tune",
        seconds=1500,
        inputs=lambda config, model, recipe: _training(config, "tune", model, recipe),
        settings=lambda config, model, recipe: config.tune_settings(recipe),
        reported=True,
        stored=lambda results, *names: _with_folder(results.tuned(*names)),
    ),
    "assemble": Stage(
        outputs=lambda results, model, recipe: (results.checkpoint(model, recipe),),
        asked=_compressed,
        entry="armor.assemble.writer",
        seconds=1,
        inputs=lambda config, model, recipe: [*_model(model), _final(config, model, recipe)],
        reported=True,
        stored=lambda results, *names: _with_folder(results.checkpoint(*names)),
    ),
    "predict": Stage(
        outputs=lambda results, model, evaluation: (results.predictions(model, evaluation),),
        asked=lambda config: _once(config, "texts"),
        entry="armor.evaluate.predictions",
        seconds=25,
        inputs=lambda config, model, evaluation: _model(model)[:1],
        settings=lambda config, model, evaluation: config.evaluations[evaluation],
    ),
    "evaluate": Stage(
        outputs=lambda results, *names: (results.evaluation(*names),),
        asked=lambda config: _asked(config, "texts"),
        entry="armor.evaluate.perplexity",
        seconds=25,
        inputs=_text_inputs,
        settings=lambda config, model, recipe, evaluation: config.evaluations[evaluation],
        reported=True,
    ),
    "tasks": Stage(
        outputs=lambda results, *names: (results.evaluation(*names),),
        asked=lambda config: _asked(config, "tasks"),
        entry="armor.evaluate.tasks",
        seconds=20,
        inputs=lambda config, model, recipe, evaluation: [_finished(config, model, recipe)],
        settings=lambda config, model, recipe, evaluation: config.evaluations[evaluation],
        also=lambda config, model, recipe, evaluation: (
            ["armor.evaluate.served", "armor.serve.plugin"] if config.evaluations[evaluation].engine else []
        ),
        reported=True,
        stored=lambda results, *names: _with_folder(results.evaluation(*names)),
        forked=False,  # lm-eval's libraries begin threads
    ),
    "benchmark": Stage(
        outputs=lambda results, model, benchmark: (results.benchmark(model, benchmark),),
        asked=lambda config: _once(config, "benchmarks"),
        entry="armor.benchmark.generation",
        seconds=75,
        inputs=_timed,
        settings=lambda config, model, benchmark: config.benchmarks[benchmark],
        reported=True,
    ),
    "serving": Stage(
        outputs=lambda results, model, benchmark: (results.benchmark(model, benchmark),),
        asked=lambda config: _once(config, "serving"),
        entry="armor.benchmark.serving",
        seconds=600,
        inputs=_timed,
        settings=lambda config, model, benchmark: config.benchmarks[benchmark],
        also=lambda config, model, benchmark: ["armor.benchmark.client", "armor.serve.plugin"],
        reported=True,
        forked=False,  # so that Snakemake sees the memory of the servers
    ),
    "report": Stage(
        outputs=lambda results: results.report(),
        asked=lambda config: [()],
        entry="armor.report",
        seconds=6,
        inputs=lambda config: [(stage, stage, ()) for stage, row in STAGES.items() if row.reported],
        settings=lambda config: config.report_settings(),
        forked=False,  # the same
    ),
}
"""Every stage by the name of its rule, in the order of the data."""
