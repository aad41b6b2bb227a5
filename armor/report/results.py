"""What is known of each model and recipe, from the records of the other stages (`armor.report.gather` reads them).

A result that is missing stays missing (None, or absent from its dictionary) all the way to the page, where it is a gap.
Nothing is estimated, and a sum over decoder layers of which some are missing is a gap too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from armor.config.report import ReportPair
from armor.core.pattern import Pattern
from armor.core.quantization import Quantization
from armor.format.checkpoint import PackedLinear
from armor.format.layout import FACTORS
from armor.format.records.base import BlockSizes, Made
from armor.format.records.benchmark import BenchmarkRecord, Side
from armor.format.records.calibration import CalibrationRecord
from armor.format.records.checkpoint import CheckpointRecord
from armor.format.records.evaluation import EvaluationRecord, Mean, TaskResult, TasksRecord
from armor.format.records.layer import LayerRecord, LinearRecord, Training, trainings
from armor.format.records.serving import Served, ServingRecord
from armor.format.records.source import SourceRecord
from armor.format.records.topology import Linear, Topology
from armor.format.shards import WIDTHS
from armor.methods import METHODS, Method

__all__ = ["STAGES", "Module", "ModelResults", "RecipeResults", "decode_speed"]

STAGES = ("calibrate", *FACTORS, "assemble", "evaluate", "benchmark")
"""The stages of which the report tells the time, in the order of the data. Tasks count as evaluate, and serving as
benchmark."""
DENSE = "dense"
"""What a benchmark's samples call the dense model, whatever its recipe is called."""
Work = dict[str, list[Made]]
"""The records of jobs by stage."""


@dataclass(frozen=True)
class Module:
    """One linear under a recipe: its decoder layer's number, its name within it, its shape, and what became of it."""

    layer: int
    name: str
    linear: Linear
    result: LinearRecord

    @property
    def kind(self) -> str:
        """Its name, one for all experts of a mixture."""
        return re.sub(r"\.experts\.\d+\.", ".experts.*.", self.name)

    @property
    def blocks(self) -> BlockSizes:
        return self.result.block_sizes or BlockSizes()

    @property
    def dense_bits(self) -> int:
        """Bits per weight as it was."""
        return 8 * WIDTHS[self.linear.dtype]

    @property
    def bits(self) -> float:
        """Bits per weight, from the format; a shared B counts where it is held, a dense linear with its own dtype."""
        if self.result.pattern is None:
            return self.dense_bits
        shape, pattern = (self.linear.out_features, self.linear.in_features), Pattern.parse(self.result.pattern)
        own = self.result.quantization
        kind, rank = Quantization(**own.model_dump()) if own else None, self.result.rank
        layout = PackedLinear(*shape, pattern, self.blocks.left, self.blocks.right, kind, self.result.right_of, rank)
        return layout.bits_per_weight(self.dense_bits)


@dataclass(frozen=True)
class RecipeResults:
    """All that is known of one model under one recipe; results are by the names of evaluations and benchmarks."""

    pair: ReportPair
    topology: Topology | None
    source: SourceRecord | None
    stages: list[tuple[str, list[LayerRecord]]]
    """The stages that made its factors, in order, with the records of their layers, without those that are missing."""
    checkpoint: CheckpointRecord | None
    evaluations: dict[str, EvaluationRecord]
    tasks: dict[str, TasksRecord]
    """Evaluations on tasks, as `evaluations` are those on texts."""
    benchmarks: dict[str, Side]
    """This recipe's own side of each."""
    serving: dict[str, Served]
    """The same of benchmarks behind a server."""
    first_evaluation: str
    """The model's first on a text, for all its recipes: the summary's. Only what has it is compared there."""
    first_benchmark: str
    """The model's first of speed, likewise."""
    first_with: dict[str, str]
    """The model's first evaluation with each task."""

    @property
    def name(self) -> str:
        return self.pair.recipe

    @property
    def layers(self) -> list[LayerRecord]:
        """The records of the factors as they are in the checkpoint."""
        return self.stages[-1][1]

    @property
    def trainings(self) -> list[list[Training]]:
        """What refined or tuned its factors, in order, layer by layer; nothing where a layer is missing."""
        return trainings(self.layers) if self.complete else []

    @property
    def method(self) -> Method:
        return METHODS[self.pair.method]

    @property
    def dense(self) -> bool:
        return self.method.function is None

    @property
    def has_blocks(self) -> bool:
        """Whether its method puts blocks around a core."""
        return "block_size" in self.method.settings

    @property
    def kind(self) -> str:
        """ "dense", "blocks" or "pruned"; figures colour by it."""
        return "dense" if self.dense else "blocks" if self.has_blocks else "pruned"

    @property
    def keeps_all(self) -> bool:
        """Whether its method keeps every weight, as an integer."""
        return not self.dense and Pattern.parse(self.pair.pattern).is_dense

    @property
    def complete(self) -> bool:
        """Whether every decoder layer's record is there, of every stage."""
        return self.topology is not None and all(0 < len(r) == len(self.topology.layers) for _, r in self.stages)

    @property
    def modules(self) -> list[Module]:
        """The linears of all layers that have a result, in the model's order."""
        known = {layer.index: layer for layer in self.topology.layers} if self.topology else {}
        return [
            Module(record.layer, linear.name.removeprefix(f"{layer.prefix}."), linear, record.modules[linear.name])
            for record in self.layers
            if (layer := known.get(record.layer))
            for linear in layer.linears
            if linear.name in record.modules
        ]

    @property
    def block_sizes(self) -> tuple[int, ...] | None:
        """The sizes of its linears' blocks, each once, the smallest first; before any is made, the one asked for.

        The size asked for need not divide their dimensions. None without blocks.
        """
        used = {d for module in self.modules for d in (module.blocks.left, module.blocks.right) if d}
        asked = {self.pair.block_size} if self.pair.block_size else set()
        return tuple(sorted(used or asked)) or None if self.has_blocks else None

    @property
    def relative_loss(self) -> float | None:
        """The mean over all linears of all layers; None where a layer is missing."""
        losses = [module.result.loss for module in self.modules] if self.complete else []
        return fmean(losses) if losses else None

    @property
    def factorize_seconds(self) -> float | None:
        """Summed over all jobs of all stages that made the factors; None where one is missing."""
        return sum(record.seconds for _, records in self.stages for record in records) if self.complete else None

    @property
    def bits_per_weight(self) -> float | None:
        """In the decoder's linears."""
        if self.dense:
            return 8.0 * WIDTHS[self.source.dtype] if self.source else None
        return self.checkpoint.bits_per_weight if self.checkpoint else None

    @property
    def compressed_share(self) -> float | None:
        """Of the decoder layers' weights."""
        if self.dense or self.topology is None or self.checkpoint is None:
            return None
        return self.topology.compressed_share(self.checkpoint.kept_dense)

    @property
    def checkpoint_bytes(self) -> int | None:
        """The files of the checkpoint, or of the dense model."""
        if self.dense:
            return sum(file.bytes for file in self.source.files.values()) if self.source else None
        return self.checkpoint.checkpoint_bytes if self.checkpoint else None

    @property
    def evaluation(self) -> EvaluationRecord | None:
        """The summary's; None where it was not asked for."""
        return self.evaluations.get(self.first_evaluation)

    @property
    def kl(self) -> Mean | None:
        """The divergence from the dense model in the summary's evaluation."""
        found = self.evaluation and self.evaluation.against_dense
        return found.kl if found else None

    @property
    def top1(self) -> Mean | None:
        """The agreement with the dense model in the summary's evaluation."""
        found = self.evaluation and self.evaluation.against_dense
        return found.top1 if found else None

    @property
    def benchmark(self) -> Side | None:
        """Its side of the summary's; None where it was not asked for."""
        return self.benchmarks.get(self.first_benchmark)

    def on(self, evaluation: str) -> RecipeResults:
        """The same with `evaluation` as the first."""
        return replace(self, first_evaluation=evaluation)

    @property
    def task_results(self) -> dict[str, TaskResult | None]:
        """The result of every task that was asked for, None for a gap.

        The name of an evaluation precedes its task where another of the model's has it too, and first.
        """
        found: dict[str, TaskResult | None] = {}
        for evaluation, names in self.pair.tasks.items():
            record = self.tasks.get(evaluation)
            for name in names:
                called = name if self.first_with[name] == evaluation else f"{evaluation}.{name}"
                found[called] = record.tasks.get(name) if record else None
        return found

    def bits(self) -> dict[str, float]:
        """Bits per weight of each linear of a layer; the mean over layers, and over experts."""
        found: dict[str, list[float]] = {}
        for module in self.modules:
            found.setdefault(module.kind, []).append(module.bits)
        return {name: fmean(bits) for name, bits in found.items()}

    def larger_than_dense(self) -> list[str]:
        """The linears that take more than their dense weight would, because of their blocks."""
        dense = {module.kind: module.dense_bits for module in self.modules}
        return [name for name, bits in self.bits().items() if bits > dense[name]]

    def records(self) -> Work:
        """The records of its own jobs that are there."""
        return {
            **{stage: [*records] for stage, records in self.stages},
            "assemble": [self.checkpoint] if self.checkpoint else [],
            "evaluate": [*self.evaluations.values(), *self.tasks.values()],
        }

    def work(self) -> Work:
        """The records of the stages that this recipe needs; none of a stage where one of them is missing."""
        asked = len(self.pair.evaluations) + len(self.pair.tasks)
        found, whole = self.records(), {"evaluate": len(self.evaluations) + len(self.tasks) == asked}
        if not self.dense:
            made = dict.fromkeys((stage for stage, _ in self.stages), self.complete)
            whole = made | {"assemble": self.checkpoint is not None} | whole
        return {stage: found[stage] if whole[stage] else [] for stage in whole}


@dataclass(frozen=True)
class ModelResults:
    """A model with all its recipes, in the order of the plan."""

    name: str
    calibrations: dict[str, CalibrationRecord]
    benchmarks: dict[str, BenchmarkRecord]
    serving: dict[str, ServingRecord]
    recipes: list[RecipeResults]

    @property
    def dense(self) -> RecipeResults | None:
        return next((recipe for recipe in self.recipes if recipe.dense), None)

    @property
    def compressed(self) -> list[RecipeResults]:
        return [recipe for recipe in self.recipes if not recipe.dense]

    def best(self, *, blocks: bool) -> RecipeResults | None:
        """The recipe with the lowest perplexity, of those whose method has blocks, or of the others that compress.

        Of those others one that prunes, if there is one: what keeps all weights as integers is another comparison.
        """
        known = [
            (r.keeps_all, r.evaluation.value, r) for r in self.compressed if r.evaluation and r.has_blocks is blocks
        ]
        return min(known, key=lambda known: known[:2], default=(None, None, None))[2]

    def work(self) -> dict[str, Work]:
        """The work by whom it was done for: a calibration, a recipe, or a benchmark of all recipes."""

        def shared(stage: str, records: dict[str, Any], one: str, several: str) -> dict[str, Work]:
            return {(one if len(records) == 1 else f"{several} {n}"): {stage: [r]} for n, r in records.items()}

        return (
            shared("calibrate", self.calibrations, "calibration", "text")
            | {recipe.name: recipe.work() for recipe in self.recipes}
            | shared("benchmark", self.benchmarks | self.serving, "benchmark", "speed")
        )

    def records(self) -> Iterator[tuple[str, Made]]:
        """All records with their stages, whatever else is missing."""
        yield from (("calibrate", record) for record in self.calibrations.values())
        for recipe in self.recipes:
            yield from ((stage, record) for stage, records in recipe.records().items() for record in records)
        yield from (("benchmark", record) for record in (*self.benchmarks.values(), *self.serving.values()))

    def samples(self) -> dict[str, dict[str, str]]:
        """What the dense model and the compressed ones write, by recipe and prompt; the first benchmark's that has it.

        The dense model was benchmarked even where it is no recipe.
        """
        dense = self.dense.name if self.dense else DENSE
        rows = {DENSE: dense} | {recipe.name: recipe.name for recipe in self.compressed}
        found: dict[str, dict[str, str]] = {name: {} for name in rows.values()}
        for sample in (sample for record in self.benchmarks.values() for sample in record.samples):
            for name in rows.keys() & sample.texts.keys():
                found[rows[name]].setdefault(sample.prompt, sample.texts[name])
        return found

    def evaluation_names(self) -> list[str]:
        """The evaluations that were asked for, in order."""
        return list(dict.fromkeys(name for recipe in self.recipes for name in recipe.pair.evaluations))

    def task_names(self) -> list[str]:
        """The tasks that were asked for, in order."""
        return list(dict.fromkeys(name for recipe in self.recipes for name in recipe.task_results))

    def benchmark_names(self) -> list[str]:
        """The benchmarks that were asked for, in order."""
        return list(dict.fromkeys(name for recipe in self.recipes for name in recipe.pair.benchmarks))

    def serving_names(self) -> list[str]:
        """The benchmarks behind a server that were asked for, in order."""
        return list(dict.fromkeys(name for recipe in self.recipes for name in recipe.pair.serving))


def decode_speed(side: Side) -> float:
    """Tokens per second, the median, that one side of a benchmark writes at its smallest batch size."""
    return side.tokens_per_second[min(side.tokens_per_second, key=int)].decode.median
