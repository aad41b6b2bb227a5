"""The records that the other stages left in a results folder, gathered for the report: only what exists, and whole."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from armor.config.report import ReportPair, ReportSettings
from armor.core.errors import ArmorError
from armor.execution.files import sha256
from armor.format.layout import Results
from armor.format.records.benchmark import BenchmarkRecord
from armor.format.records.calibration import CalibrationRecord
from armor.format.records.checkpoint import CheckpointRecord
from armor.format.records.evaluation import EvaluationRecord, TasksRecord
from armor.format.records.layer import LayerRecord
from armor.format.records.serving import ServingRecord
from armor.format.records.source import SourceRecord
from armor.format.records.topology import Topology
from armor.methods import METHODS
from armor.report.results import ModelResults, RecipeResults

__all__ = ["fingerprints", "read_results"]

K = TypeVar("K")
T = TypeVar("T")


def _there(records: dict[K, T | None]) -> dict[K, T]:
    return {name: record for name, record in records.items() if record is not None}


def _is_dense(pair: ReportPair) -> bool:
    return METHODS[pair.method].function is None


def _read_model(paths: Results, name: str, pairs: list[ReportPair]) -> ModelResults:
    calibrations = dict.fromkeys(pair.calibration for pair in pairs if pair.calibration)
    asked = dict.fromkeys(benchmark for pair in pairs for benchmark in pair.benchmarks)
    topology = Topology.read_if_there(paths.topology(name))
    source = SourceRecord.read_if_there(paths.source(name))
    benchmarks = _there({b: BenchmarkRecord.read_if_there(paths.benchmark(name, b)) for b in asked})
    served = dict.fromkeys(benchmark for pair in pairs for benchmark in pair.serving)
    serving = _there({b: ServingRecord.read_if_there(paths.benchmark(name, b)) for b in served})
    texts = (evaluation for pair in pairs for evaluation in pair.evaluations)
    with_task = [(task, evaluation) for pair in pairs for evaluation, tasks in pair.tasks.items() for task in tasks]
    first = next(texts, ""), next(iter(asked), ""), dict(reversed(with_task))
    return ModelResults(
        name=name,
        calibrations=_there({c: CalibrationRecord.read_if_there(paths.calibration(name, c)) for c in calibrations}),
        benchmarks=benchmarks,
        serving=serving,
        recipes=[_read_recipe(paths, pair, topology, source, benchmarks, serving, first) for pair in pairs],
    )


def _read_recipe(
    paths: Results,
    pair: ReportPair,
    topology: Topology | None,
    source: SourceRecord | None,
    benchmarks: dict[str, BenchmarkRecord],
    serving: dict[str, ServingRecord],
    first: tuple[str, str, dict[str, str]],
) -> RecipeResults:
    names = (pair.model, pair.recipe)
    layers = [layer.index for layer in topology.layers] if topology else []

    def records(stage: str, owner: str) -> list[LayerRecord]:
        paths_of = {k: paths.layer(pair.model, owner, k, stage) for k in layers}
        return list(_there({k: LayerRecord.read_if_there(path) for k, path in paths_of.items()}).values())

    asked = {name: benchmarks[name] for name in pair.benchmarks if name in benchmarks}
    served = {name: serving[name] for name in pair.serving if name in serving}
    return RecipeResults(
        pair=pair,
        topology=topology,
        source=source,
        stages=[(stage, records(stage, owner)) for stage, owner in pair.chain or [("factorize", pair.recipe)]],
        checkpoint=CheckpointRecord.read_if_there(paths.checkpoint(*names)),
        evaluations=_there({e: EvaluationRecord.read_if_there(paths.evaluation(*names, e)) for e in pair.evaluations}),
        tasks=_there({e: TasksRecord.read_if_there(paths.evaluation(*names, e)) for e in pair.tasks}),
        benchmarks=_there({b: r.dense if _is_dense(pair) else r.recipes.get(pair.recipe) for b, r in asked.items()}),
        serving=_there({b: r.dense if _is_dense(pair) else r.recipes.get(pair.recipe) for b, r in served.items()}),
        first_evaluation=first[0],
        first_benchmark=first[1],
        first_with=first[2],
    )


def read_results(results: Path, settings: ReportSettings) -> list[ModelResults]:
    """Gather what `results` holds for the pairs of `settings`, by model.

    Raises ArmorError for a file that is no record of this release, and if there is no result at all.
    """
    paths = Results(str(results))
    names = dict.fromkeys(pair.model for pair in settings.pairs)
    models = [_read_model(paths, name, [pair for pair in settings.pairs if pair.model == name]) for name in names]
    recipes = [recipe for model in models for recipe in model.recipes]
    if not any(r.evaluations or r.tasks or r.benchmarks or r.serving or r.layers or r.checkpoint for r in recipes):
        raise ArmorError(f"{results}: holds no result of the recipes in the plan; run the other stages first")
    return models


def fingerprints(results: Path, settings: ReportSettings) -> dict[str, str]:
    """The SHA-256 of the records that the report is made of, by path; a checkpoint's stands for its layers'."""
    paths = Results(str(results))
    files = []
    for pair in settings.pairs:
        names = (pair.model, pair.recipe)
        files += [paths.evaluation(*names, evaluation) for evaluation in (*pair.evaluations, *pair.tasks)]
        files += [paths.benchmark(pair.model, benchmark) for benchmark in (*pair.benchmarks, *pair.serving)]
        if not _is_dense(pair):
            files += [paths.checkpoint(*names), paths.calibration(pair.model, str(pair.calibration))]
    there = (Path(file) for file in dict.fromkeys(files) if Path(file).is_file())
    return {file.relative_to(results).as_posix(): sha256(file) for file in there}
