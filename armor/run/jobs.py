"""The one table of jobs: what the workflow can do, stage by stage, in the order of the data.

The rules take log, measurements, settings and code of a job from here, `armor status` its outputs, `armor explain` all
of it. A job is a stage and the names that tell it from others, in the order of the rule's wildcards. Paths come from
`armor.format.layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from armor.config.run import Config
from armor.core.typed import Typed
from armor.execution.fingerprint import code_hash
from armor.format.layout import FACTORS, RESULTS, Results
from armor.format.records.topology import Topology

__all__ = ["STAGES", "Job", "Names", "Stage", "jobs"]

Names = tuple[str, ...]
Needed = tuple[str, str, Names]
"""What a record calls the fingerprint of one of its inputs, the stage that makes it, and that job's names."""


@dataclass(frozen=True)
class Stage:
    """One stage of the workflow: a rule of the same name.

    `outputs(results, *names)` are the files that prove a job done; the JSON among them is its record, which says what
    made it. `entry` is the module whose code it executes. `inputs(config, *names)` are the jobs that it reads
    from, `settings(config, *names)` what of the configuration it reads, `methods(config, *names)` modules beside entry.
    """

    outputs: Callable[..., tuple[str, ...]]
    entry: str
    inputs: Callable[..., list[Needed]] = lambda config, *names: []
    settings: Callable[..., Typed | None] = lambda config, *names: None
    methods: Callable[..., list[str]] = lambda config, *names: []


def _model(*names: str) -> list[Needed]:
    """The inputs of nearly every stage: where the model is, and what it is made of."""
    return [("model", "fetch", names[:1]), ("topology", "inspect", names[:1])]


def _finished(config: Config, model: str, recipe: str) -> Needed:
    """What an evaluation reads: the checkpoint of a recipe, or the source where that leaves the model as it is."""
    return ("model", "fetch", (model,)) if config.is_dense(recipe) else ("model", "assemble", (model, recipe))


def _training(config: Config, stage: str, model: str, recipe: str, *layer: str) -> list[Needed]:
    """What refine and tune read: the factors before them, of one layer or all, and the statistics for the record."""
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
        ("states", "states", (model, config.states_of(recipe))),
        *(("before", "refine", (model, recipe, str(number))) for number in range(int(layer) if chained else 0)),
    ]


def _final(config: Config, model: str, recipe: str) -> Needed:
    """The factors that become a checkpoint."""
    stage, owner = config.made_by(recipe)[-1]
    return ("factors", stage, (model, owner))


def _text_inputs(config: Config, model: str, recipe: str, evaluation: str) -> list[Needed]:
    dense = [] if config.is_dense(recipe) else [("dense", "fetch", (model,))]
    return [_finished(config, model, recipe), *dense, ("predictions", "predict", (model, evaluation))]


BY_LAYER = ("price", "factorize", "refine")
"""The stages that have a job for each decoder layer."""
MEASURED = ("calibrate", "factorize", "refine", "tune", "assemble", "evaluate", "tasks", "benchmark")
"""What the report is made of."""

STAGES = {
    "fetch": Stage(
        outputs=lambda results, model: (results.source(model),),
        entry="armor.model.fetch",
        settings=lambda config, model: config.models[model],
    ),
    "inspect": Stage(
        outputs=lambda results, model: (results.topology(model),),
        entry="armor.model.inspect",
        inputs=lambda config, model: _model(model)[:1],
    ),
    "calibrate": Stage(
        outputs=lambda results, model, calibration: (results.calibration(model, calibration),),
        entry="armor.calibrate.capture",
        inputs=lambda config, model, calibration: _model(model),
        settings=lambda config, model, calibration: config.calibrations[calibration],
    ),
    "sensitivity": Stage(
        outputs=lambda results, model, sensitivity: (results.sensitivity(model, sensitivity),),
        entry="armor.training.sensitivity",
        inputs=lambda config, model, sensitivity: _model(model),
        settings=lambda config, model, sensitivity: config.sensitivities()[sensitivity],
    ),
    "price": Stage(
        outputs=lambda results, *names: (results.prices(*names),),
        entry="armor.factorize.prices",
        inputs=lambda config, model, recipe, layer: [
            *_model(model),
            ("calibration", "calibrate", (model, config.calibration_of(recipe))),
            ("sensitivity", "sensitivity", (model, config.sensitivity_of(recipe))),
        ],
        settings=lambda config, model, recipe, layer: config.price_settings(recipe, int(layer)),
        methods=lambda config, model, recipe, layer: config.price_settings(recipe, int(layer)).code(),
    ),
    "budget": Stage(
        outputs=lambda results, model, recipe: (results.budget(model, recipe),),
        entry="armor.factorize.budget",
        inputs=lambda config, model, recipe: [("prices", "price", (model, recipe))],
        settings=lambda config, model, recipe: config.budget(recipe),
    ),
    "factorize": Stage(
        outputs=lambda results, *names: (results.factors(*names), results.layer(*names)),
        entry="armor.factorize.layer",
        inputs=lambda config, model, recipe, layer: [
            *_model(model),
            ("calibration", "calibrate", (model, config.calibration_of(recipe))),
            *([("budget", "budget", (model, recipe))] if config.recipes[recipe].budget else []),
        ],
        settings=lambda config, model, recipe, layer: config.layer_settings(recipe, int(layer)),
        methods=lambda config, model, recipe, layer: config.layer_settings(recipe, int(layer)).code(),
    ),
    "states": Stage(
        outputs=lambda results, model, states: (results.states(model, states),),
        entry="armor.training.states",
        inputs=lambda config, model, states: _model(model),
        settings=lambda config, model, states: config.states()[states],
    ),
    "refine": Stage(
        outputs=lambda results, *names: (results.factors(*names, "refine"), results.layer(*names, "refine")),
        entry="armor.training.refine",
        inputs=_refine_inputs,
        settings=lambda config, model, recipe, layer: config.refine_settings(recipe),
    ),
    "refined": Stage(
        outputs=lambda results, model, recipe: (results.refined(model, recipe),),
        entry="armor.training.refined",
        inputs=lambda config, model, recipe: [("factors", "refine", (model, recipe))],
    ),
    "tune": Stage(
        outputs=lambda results, model, recipe: (results.tuned(model, recipe),),
        entry="armor.training.tune",
        inputs=lambda config, model, recipe: _training(config, "tune", model, recipe),
        settings=lambda config, model, recipe: config.tune_settings(recipe),
    ),
    "assemble": Stage(
        outputs=lambda results, model, recipe: (results.checkpoint(model, recipe),),
        entry="armor.assemble.writer",
        inputs=lambda config, model, recipe: [*_model(model), _final(config, model, recipe)],
    ),
    "predict": Stage(
        outputs=lambda results, model, evaluation: (results.predictions(model, evaluation),),
        entry="armor.evaluate.predictions",
        inputs=lambda config, model, evaluation: _model(model)[:1],
        settings=lambda config, model, evaluation: config.evaluations[evaluation],
    ),
    "evaluate": Stage(
        outputs=lambda results, *names: (results.evaluation(*names),),
        entry="armor.evaluate.perplexity",
        inputs=_text_inputs,
        settings=lambda config, model, recipe, evaluation: config.evaluations[evaluation],
    ),
    "tasks": Stage(
        outputs=lambda results, *names: (results.evaluation(*names),),
        entry="armor.evaluate.tasks",
        inputs=lambda config, model, recipe, evaluation: [_finished(config, model, recipe)],
        settings=lambda config, model, recipe, evaluation: config.evaluations[evaluation],
    ),
    "benchmark": Stage(
        outputs=lambda results, model, benchmark: (results.benchmark(model, benchmark),),
        entry="armor.benchmark.generation",
        inputs=lambda config, model, benchmark: [
            ("dense", "fetch", (model,)),
            *((recipe, "assemble", (model, recipe)) for recipe in config.benchmarked(model, benchmark)),
        ],
        settings=lambda config, model, benchmark: config.benchmarks[benchmark],
    ),
    "report": Stage(
        outputs=lambda results: results.report(),
        entry="armor.report",
        inputs=lambda config: [(stage, stage, ()) for stage in MEASURED],
        settings=lambda config: config.report_settings(),
    ),
}
"""Every stage by the name of its rule, in the order of the data."""


@dataclass(frozen=True)
class Job:
    """One job of the workflow: its stage, and the names that tell it from others of that stage."""

    stage: str
    names: Names
    results: Results = Results()

    def __str__(self) -> str:
        """As the rule's message announces it."""
        names = [*self.names[:-1], f"layer {self.names[-1]}"] if self.stage in BY_LAYER else self.names
        return " ".join((self.stage, *names))

    @property
    def outputs(self) -> tuple[Path, ...]:
        return tuple(map(Path, STAGES[self.stage].outputs(self.results, *self.names)))

    @property
    def record(self) -> Path:
        """The JSON among the outputs that says what made them."""
        return next(path for path in self.outputs if path.suffix == ".json")

    @property
    def log(self) -> Path:
        return Path(self.results.log(self.stage, *self.names))

    @property
    def measured(self) -> Path:
        """What Snakemake measured of it."""
        return Path(self.results.measured(self.stage, *self.names))

    def settings(self, config: Config) -> Typed | None:
        """What of the configuration it reads; None if nothing."""
        return STAGES[self.stage].settings(config, *self.names)

    def settings_json(self, config: Config) -> str:
        """Its settings, defaults and all, as JSON text, in the order of the types: equal settings, equal text."""
        settings = self.settings(config)
        return settings.model_dump_json(exclude_none=True) if settings else "{}"

    def code(self, config: Config) -> str:
        """The hash of the code that it executes."""
        stage = STAGES[self.stage]
        return code_hash(stage.entry, *stage.methods(config, *self.names))

    def inputs(self, config: Config) -> list[Needed]:
        """The jobs that it reads from. A stage with fewer names than its jobs have means all of them."""
        return STAGES[self.stage].inputs(config, *self.names)


def jobs(config: Config, root: str = RESULTS) -> Iterator[Job]:
    """Every job that `config` asks for, in the order of the stages; layer "?" where their number is not known yet."""
    results = Results(root)
    pairs = config.pairs()
    compressed = [pair for pair in pairs if not config.is_dense(pair[1])]
    models = dict.fromkeys(model for model, _ in pairs)
    for model in models:
        yield Job("fetch", (model,), results)
        yield Job("inspect", (model,), results)
    for names in dict.fromkeys((model, config.calibration_of(recipe)) for model, recipe in compressed):
        yield Job("calibrate", names, results)
    yield from _makers(config, results, compressed)
    for names in compressed:
        yield Job("assemble", names, results)
    texts = [(model, name) for (model, _), asked in pairs.items() for name in asked.texts]
    for names in dict.fromkeys(texts):
        yield Job("predict", names, results)
    for (model, recipe), asked in pairs.items():
        for name in asked.texts:
            yield Job("evaluate", (model, recipe, name), results)
        for name in asked.tasks:
            yield Job("tasks", (model, recipe, name), results)
    for names in dict.fromkeys((model, name) for (model, _), asked in pairs.items() for name in asked.benchmarks):
        yield Job("benchmark", names, results)
    yield Job("report", (), results)


def _makers(config: Config, results: Results, compressed: list[tuple[str, str]]) -> Iterator[Job]:
    """The jobs between calibrate and assemble. Recipes that start from the same one share its factors."""
    made = dict.fromkeys(
        (stage, model, owner) for model, recipe in compressed for stage, owner in config.made_by(recipe)
    )
    of = {stage: [names for asked, *names in made if asked == stage] for stage in FACTORS}
    of["states"] = list(map(list, dict.fromkeys((model, config.states_of(owner)) for model, owner in of["refine"])))
    of["refined"] = of["refine"]
    of["price"] = of["budget"] = [names for names in of["factorize"] if config.recipes[names[1]].budget]
    of["sensitivity"] = list(map(list, dict.fromkeys((m, config.sensitivity_of(owner)) for m, owner in of["budget"])))
    for stage in ("sensitivity", "price", "budget", "factorize", "states", "refine", "refined", "tune"):
        for model, name in of[stage]:
            layers = _layers(Path(results.topology(model))) if stage in BY_LAYER else [None]
            for layer in layers:
                yield Job(stage, (model, name) if layer is None else (model, name, layer), results)


def _layers(inspected: Path) -> list[str]:
    topology = Topology.read_if_there(inspected)
    return ["?"] if topology is None else [str(layer.index) for layer in topology.layers]
