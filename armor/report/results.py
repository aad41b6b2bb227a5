"""What is known of each model and recipe, from the records of the other stages (`armor.report.gather` reads them).

A result that is missing stays missing (None, or absent from its dictionary) all the way to the page, where it is a gap.
Nothing is estimated, and a sum over decoder layers of which some are missing is a gap too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from statistics import fmean

from armor.config.report import ReportPair
from armor.core.pattern import Pattern
from armor.format.checkpoint import PackedLinear
from armor.format.records.topology import Linear, Topology

__all__ = [
    "COLUMNS",
    "STAGES",
    "Module",
    "ModelResults",
    "RecipeResults",
    "bits_of",
    "decode_speed",
]

COLUMNS = (
    "model",
    "recipe",
    "method",
    "pattern",
    "block_size",
    "perplexity",
    "perplexity_se",
    "relative_loss",
    "bits_per_weight",
    "checkpoint_bytes",
    "factorize_seconds",
    "decode_tokens_per_second",
    "kl",
    "kl_se",
    "top1_agreement",
    "top1_agreement_se",
)
STAGES = ("calibrate", "factorize", "assemble", "evaluate", "benchmark")


@dataclass(frozen=True)
class Module:
    """One compressed linear: its decoder layer, its name within it, and the losses relative to a zero matrix."""

    layer: int
    name: str
    loss: float
    start_loss: float | None
    block_size: dict[str, int] | None
    pattern: str | None
    trace: list[tuple[int, float, float]]


@dataclass(frozen=True)
class RecipeResults:
    """All that is known of one model under one recipe."""

    pair: ReportPair
    evaluations: dict[str, dict]
    tasks: dict[str, dict]
    """Evaluations on tasks, as `evaluations` are those on texts."""
    benchmarks: dict[str, dict]
    checkpoint: dict | None
    layers: list[dict]
    complete: bool
    """Whether every decoder layer's record is there."""
    source: dict | None

    @property
    def name(self) -> str:
        return self.pair.recipe

    @property
    def dense(self) -> bool:
        return self.pair.method == "dense"

    @property
    def kind(self) -> str:
        """ "dense", "armor" or "other"; figures colour by it."""
        return self.pair.method if self.pair.method in ("dense", "armor") else "other"

    @property
    def modules(self) -> list[Module]:
        """The linears of all layers, in order of layer and name."""
        found = []
        for record in self.layers:
            for name, module in record["modules"].items():
                short = re.sub(rf"^.*?\b{record['layer']}\.", "", name)
                loss, start, trace = module["loss"], module.get("start_loss"), module.get("trace") or []
                blocks, pattern = module.get("block_size"), module.get("pattern")
                found.append(Module(record["layer"], short, loss, start, blocks, pattern, trace))
        return found

    @property
    def used_block_sizes(self) -> list[int]:
        """The block sizes of its linears, each once; the size asked for need not divide their dimensions."""
        return sorted({d for module in self.modules for d in (module.block_size or {}).values() if d})

    @property
    def block_size(self) -> int | str | None:
        """The one block size that all its linears have, or "32 to 48"; before any is made, what was asked for."""
        if self.pair.method != "armor":
            return None
        used = self.used_block_sizes or [self.pair.block_size]
        return used[0] if len(used) == 1 else f"{used[0]} to {used[-1]}"

    def measured(self, benchmark: str | None = None) -> dict | None:
        """This recipe's own side of a benchmark, the first one if none is named."""
        case = self.benchmarks.get(benchmark or next(iter(self.pair.benchmarks), ""))
        return case and case["dense" if self.dense else "compressed"]

    @property
    def decode_speedup(self) -> float | None:
        """How many times as fast as dense it decodes one sequence, the median; of the first benchmark."""
        speedup = self.benchmarks.get(next(iter(self.pair.benchmarks), ""), {}).get("speedup") or {}
        return speedup["1"]["decode"]["median"] if "1" in speedup else None

    @property
    def perplexity(self) -> tuple[float, float | None] | None:
        """The first evaluation: value and standard error."""
        first = self.evaluations.get(next(iter(self.pair.evaluations), ""))
        return first and (first["value"], first["standard_error"])

    @property
    def against_dense(self) -> dict[str, tuple[float, float | None]]:
        """The comparison to the dense model in the first evaluation: `kl` and `top1`, value and standard error."""
        found = self.evaluations.get(next(iter(self.pair.evaluations), ""), {}).get("against_dense") or {}
        return {key: (found[key]["value"], found[key]["standard_error"]) for key in found}

    @property
    def task_results(self) -> dict[str, dict]:
        """What there is of every task that was asked for; nothing of a gap.

        Of two evaluations on the same task, the second one's name precedes it.
        """
        found: dict[str, dict] = {}
        for evaluation, names in self.pair.tasks.items():
            results = self.tasks.get(evaluation, {}).get("tasks", {})
            for name in names:
                found[f"{evaluation}.{name}" if name in found else name] = results.get(name, {})
        return found

    @property
    def scores(self) -> dict[str, tuple[float | None, float | None]]:
        """Every task that was asked for: value and standard error, None for a gap."""
        return {task: (r.get("value"), r.get("standard_error")) for task, r in self.task_results.items()}

    def records(self, stage: str) -> list[dict]:
        """The records of one of STAGES that are there."""
        return {
            "factorize": self.layers,
            "assemble": [self.checkpoint] if self.checkpoint else [],
            "evaluate": [*self.evaluations.values(), *self.tasks.values()],
            "benchmark": list(self.benchmarks.values()),
        }[stage]

    def _stages(self) -> dict[str, list[dict]]:
        """The records of each stage that this recipe needs; none where one of them is missing."""
        stages = {stage: self.records(stage) for stage in STAGES if stage != "calibrate"}
        if self.dense:
            stages = {stage: stages[stage] for stage in ("evaluate", "benchmark")}
        whole = {
            "factorize": self.complete,
            "assemble": self.checkpoint is not None,
            "evaluate": len(stages["evaluate"]) == len(self.pair.evaluations) + len(self.pair.tasks),
            "benchmark": len(stages["benchmark"]) == len(self.pair.benchmarks),
        }
        return {stage: records if whole[stage] else [] for stage, records in stages.items()}

    def seconds(self) -> dict[str, float | None]:
        """The time that each stage took for this recipe alone, in seconds; None where a record is missing."""
        stages = self._stages().items()
        return {stage: sum(r["seconds"] for r in records) if records else None for stage, records in stages}

    def peak_memory(self) -> dict[str, int | None]:
        """The most memory that a job of each stage held, in bytes; None where a record is missing."""
        return {
            stage: max((r["peak_memory_bytes"] for r in records), default=None)
            for stage, records in self._stages().items()
        }

    def row(self) -> dict:
        """The recipe's row of the summary; None is a gap."""
        gap = (None, None)
        value, error = self.perplexity or gap
        divergence, divergence_error = self.against_dense.get("kl", gap)
        agreement, agreement_error = self.against_dense.get("top1", gap)
        bits, size = None, None
        if not self.dense and self.checkpoint:
            bits, size = self.checkpoint["bits_per_weight"], self.checkpoint["checkpoint_bytes"]
        elif self.dense and self.source:
            bits = float(bits_of(self.source["dtype"]))
            size = sum(file["bytes"] for file in self.source["files"].values())
        losses = [module.loss for module in self.modules] if self.complete else []
        measured = self.measured()
        return {
            "model": self.pair.model,
            "recipe": self.pair.recipe,
            "method": self.pair.method,
            "pattern": None if self.dense else self.pair.pattern,
            "block_size": self.block_size,
            "perplexity": value,
            "perplexity_se": error,
            "relative_loss": fmean(losses) if losses else None,
            "bits_per_weight": bits,
            "checkpoint_bytes": size,
            "factorize_seconds": None if self.dense else self.seconds()["factorize"],
            "decode_tokens_per_second": measured and decode_speed(measured),
            "kl": divergence,
            "kl_se": divergence_error,
            "top1_agreement": agreement,
            "top1_agreement_se": agreement_error,
            **{
                f"{task}{end}": value
                for task, pair in self.scores.items()
                for end, value in zip(("", "_se"), pair, strict=True)
            },
        }


@dataclass(frozen=True)
class ModelResults:
    """A model with all its recipes, in the order of the plan."""

    name: str
    topology: Topology | None
    calibrations: dict[str, dict]
    recipes: list[RecipeResults]

    @property
    def dense(self) -> RecipeResults | None:
        return next((recipe for recipe in self.recipes if recipe.dense), None)

    @property
    def compressed(self) -> list[RecipeResults]:
        return [recipe for recipe in self.recipes if not recipe.dense]

    def best(self, *, armor: bool) -> RecipeResults | None:
        """The ARMOR recipe, or the recipe of another compressing method, with the lowest perplexity."""
        known = [r for r in self.compressed if r.perplexity and (r.pair.method == "armor") == armor]
        return min(known, key=lambda recipe: recipe.perplexity[0], default=None)

    def records(self, stage: str) -> list[dict]:
        """All records of one of STAGES, whatever else is missing."""
        if stage == "calibrate":
            return list(self.calibrations.values())
        return [record for recipe in self.recipes for record in recipe.records(stage)]

    def calibration_rows(self) -> dict[str, dict]:
        """The calibrations' records, by what a row about them is called."""
        single = len(self.calibrations) == 1
        return {"calibration" if single else f"text {name}": record for name, record in self.calibrations.items()}

    def module_order(self) -> list[str]:
        """The names of the linears within a layer, in the model's own order where model.json is there."""
        if self.topology:
            return list(self._linears())
        return list(dict.fromkeys(module.name for recipe in self.compressed for module in recipe.modules))

    def _linears(self) -> dict[str, Linear]:
        """One linear of each name within a decoder layer."""
        layers = self.topology.layers if self.topology else ()
        return {linear.name.removeprefix(f"{layer.prefix}."): linear for layer in layers for linear in layer.linears}

    def module_bits(self, recipe: RecipeResults) -> dict[str, float]:
        """Bits per weight that `recipe` takes on each linear of a layer, from the format; the mean over layers.

        A linear that stays dense counts with its own dtype. Empty where model.json is not there.
        """
        done = {(module.layer, module.name): module for module in recipe.modules}
        found: dict[str, list[float]] = {}
        for layer in self.topology.layers if self.topology else ():
            for linear in layer.linears:
                name = linear.name.removeprefix(f"{layer.prefix}.")
                if module := done.get((layer.index, name)):
                    found.setdefault(name, []).append(_bits(linear, module))
        return {name: fmean(bits) for name, bits in found.items()}

    def larger_than_dense(self, recipe: RecipeResults) -> list[str]:
        """The linears that take more than their dense weight would, because of their blocks."""
        dense = {n: bits_of(linear.dtype) for n, linear in self._linears().items()}
        return [name for name, bits in self.module_bits(recipe).items() if bits > dense[name]]

    def samples(self) -> dict[str, dict[str, str]]:
        """What the dense model and the compressed ones write, by recipe and prompt; the first benchmark's that has it.

        A dense model that is no recipe was benchmarked beside a compressed one all the same.
        """
        dense = self.dense.name if self.dense else "dense"
        found: dict[str, dict[str, str]] = {dense: {}} | {recipe.name: {} for recipe in self.compressed}
        for recipe in self.recipes:
            for sample in (sample for record in recipe.benchmarks.values() for sample in record.get("samples", ())):
                for name, side in ((dense, "dense"), (recipe.name, "compressed")):
                    if side in sample:
                        found[name].setdefault(sample["prompt"], sample[side])
        return found

    def evaluation_names(self) -> list[str]:
        """The evaluations that were asked for, in order."""
        return list(dict.fromkeys(name for recipe in self.recipes for name in recipe.pair.evaluations))

    def task_names(self) -> list[str]:
        """The tasks that were asked for, in order."""
        return list(dict.fromkeys(name for recipe in self.recipes for name in recipe.scores))

    def benchmark_names(self) -> list[str]:
        """The benchmarks that were asked for, in order."""
        return list(dict.fromkeys(name for recipe in self.recipes for name in recipe.pair.benchmarks))


def decode_speed(side: dict) -> float:
    """Tokens per second, the median, that one side of a benchmark writes at its smallest batch size."""
    speeds = side["tokens_per_second"]
    return speeds[min(speeds, key=int)]["decode"]["median"]


def bits_of(dtype: str) -> int:
    """The bits of a dtype by its name: bfloat16 has 16."""
    return int(re.sub(r"\D+(\d+).*", r"\1", dtype))


def _bits(linear: Linear, module: Module) -> float:
    bits, blocks = bits_of(linear.dtype), module.block_size or {}
    if module.pattern is None:  # it stays dense
        return bits
    sides = (blocks.get("left"), blocks.get("right"))
    layout = PackedLinear(linear.out_features, linear.in_features, Pattern.parse(module.pattern), *sides)
    return layout.bits_per_weight(bits)
