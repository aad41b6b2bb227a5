"""The JSON that the other stages left in a results folder, gathered for the report: only what exists, and whole."""

from __future__ import annotations

from pathlib import Path

from armor.config.report import ReportPair, ReportSettings
from armor.core.errors import ArmorError
from armor.execution.files import read_json, sha256
from armor.format.records.topology import Topology
from armor.report.results import ModelResults, RecipeResults

__all__ = ["fingerprints", "read_results"]

COMMON = ("machine", "seconds", "peak_memory_bytes")
NEEDED = {
    "fetch": ("dtype", "files"),
    "calibrate": COMMON,
    "factorize": ("layer", "modules", *COMMON),
    "assemble": ("bits_per_weight", "checkpoint_bytes", "inputs", "factors", *COMMON),
    "evaluation": ("value", "standard_error", "blocks", "length", "block_means", "settings", *COMMON),
    "tasks": ("tasks", "settings", *COMMON),
    "benchmark": ("dense", "compressed", "speedup", "theoretical_speedup", "linears", *COMMON),
}


def _read(kind: str, path: Path) -> dict | None:
    """The record of a stage, None if it is not there; ArmorError for one that lacks what the report needs."""
    if not path.is_file():
        return None
    record = read_json(path)
    if absent := [key for key in NEEDED[kind] if key not in record]:
        raise ArmorError(f"{path}: lacks {absent[0]}, so no {kind} of this release wrote it; run that stage again")
    return record


def _read_recipe(folder: Path, pair: ReportPair, topology: Topology | None) -> RecipeResults:
    here = folder / pair.recipe
    found = {
        kind: {name: _read(kind, here / kind / f"{name}.json") for name in names}
        for kind, names in (("evaluation", pair.evaluations), ("benchmark", pair.benchmarks))
    }
    tasks = {name: _read("tasks", here / "evaluation" / f"{name}.json") for name in pair.tasks}
    numbered = {int(path.stem.removeprefix("layer_")): path for path in here.glob("layers/layer_*.json")}
    layers = [_read("factorize", numbered[number]) for number in sorted(numbered)]
    expected = len(topology.layers) if topology else max(numbered, default=-1) + 1
    return RecipeResults(
        pair=pair,
        evaluations={name: record for name, record in found["evaluation"].items() if record},
        tasks={name: record for name, record in tasks.items() if record},
        benchmarks={name: record for name, record in found["benchmark"].items() if record},
        checkpoint=_read("assemble", here / "checkpoint.json"),
        layers=layers,
        complete=0 < len(layers) == expected,
        source=_read("fetch", folder / "source.json"),
    )


def read_results(results: Path, settings: ReportSettings) -> list[ModelResults]:
    """Gather what `results` holds for the pairs of `settings`, by model.

    Raises ArmorError for a file that is not JSON or lacks what its stage writes, and if there is no result at all.
    """
    models = []
    for name in dict.fromkeys(pair.model for pair in settings.pairs):
        folder = results / name
        topology = Topology.read(folder / "model.json") if (folder / "model.json").is_file() else None
        pairs = [pair for pair in settings.pairs if pair.model == name]
        recipes = [_read_recipe(folder, pair, topology) for pair in pairs]
        used = dict.fromkeys(pair.calibration for pair in pairs if pair.calibration)
        records = {c: _read("calibrate", folder / "calibration" / c / "calibration.json") for c in used}
        models.append(ModelResults(name, topology, {c: r for c, r in records.items() if r}, recipes))
    if not any(
        r.evaluations or r.tasks or r.benchmarks or r.layers or r.checkpoint for model in models for r in model.recipes
    ):
        raise ArmorError(f"{results}: holds no result of the recipes in the plan; run the other stages first")
    return models


def fingerprints(results: Path, settings: ReportSettings) -> dict[str, str]:
    """The SHA-256 of the records that the report is made of, by path; a checkpoint's stands for its layers'."""
    found = {}
    for pair in settings.pairs:
        here = results / pair.model / pair.recipe
        files = [here / "evaluation" / f"{name}.json" for name in (*pair.evaluations, *pair.tasks)]
        files += [here / "benchmark" / f"{name}.json" for name in pair.benchmarks]
        if pair.method != "dense":
            calibration = results / pair.model / "calibration" / str(pair.calibration)
            files += [here / "checkpoint.json", calibration / "calibration.json"]
        found |= {file.relative_to(results).as_posix(): sha256(file) for file in files if file.is_file()}
    return found
