"""A results folder as a run leaves it, with made-up numbers of the size that SmolLM2-135M gives; always the same."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from armor.config.report import ReportPair, ReportSettings
from armor.format.layout import Results
from armor.format.records.base import BlockSizes, File, MadeBy, Record
from armor.format.records.benchmark import BenchmarkRecord, Continuation, CoreSide, LinearSpeed, Phases, Runs, Side
from armor.format.records.checkpoint import CheckpointRecord, FactorsMadeBy
from armor.format.records.evaluation import AgainstDense, EvaluationRecord, Mean, TaskResult, TasksRecord
from armor.format.records.layer import LayerRecord, Training
from armor.format.records.serving import Load, Served, ServingRecord
from armor.format.records.source import SourceRecord
from armor.format.records.topology import DecoderLayer, Linear, Topology
from armor.methods import METHODS
from tests.records import MACHINE, calibration_record, layer_record, linear_record, topology_record

__all__ = ["MACHINE", "change", "plan", "write_results"]

NORMS = 2 * 576
LINEARS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
PERPLEXITY = {"dense": 22.75, "magnitude": 1179.0, "wanda": 128.0, "nowag": 113.2, "armor": 30.96}
KL = {"magnitude": 4.31, "wanda": 1.76, "nowag": 1.63, "armor": 0.352}
TOP1 = {"magnitude": 0.112, "wanda": 0.395, "nowag": 0.408, "armor": 0.701}
LOSS = {"magnitude": 0.31, "wanda": 0.071, "nowag": 0.064, "armor": 0.0135}
SECONDS = {"magnitude": 0.4, "wanda": 0.4, "nowag": 0.5, "armor": 13.5}
DENSE_BYTES = 269_060_552
BYTES = {"magnitude": 176_200_000, "wanda": 176_200_000, "nowag": 176_200_000, "armor": 212_600_000}
BITS = {"magnitude": 9.0, "wanda": 9.0, "nowag": 9.0, "armor": 11.74}
SPEED = {"dense": 14.2, "magnitude": 13.1, "wanda": 13.2, "nowag": 13.1, "armor": 9.4}
PROMPTS = {"The capital of France is": "Paris", "Once upon a time, a fox": "met a crow"}
BATCHES = ("1", "4")
FILES = {
    "model.safetensors": File(bytes=DENSE_BYTES, sha256="d" * 64),
    "tokenizer.json": File(bytes=3_522_871, sha256="e" * 64),
}
R = TypeVar("R", bound=Record)


def plan(
    recipes: Iterable[str] = tuple(PERPLEXITY),
    models: Iterable[str] = ("smollm2-135m",),
    evaluations: Iterable[str] = ("wikipedia",),
    benchmarks: Iterable[str] = ("decode",),
    serving: Iterable[str] = (),
    tasks: dict[str, list[str]] | None = None,
    block_sizes: dict[str, int] | None = None,
) -> ReportSettings:
    """What the report of the sample's recipes is about; a recipe's method is its name up to a dash."""
    methods = {recipe: recipe.partition("-")[0] for recipe in recipes}
    return ReportSettings(
        config={
            "models": {model: {"hub": f"someone/{model}"} for model in models},
            "recipes": {recipe: {"method": method, "pattern": "2:4"} for recipe, method in methods.items()},
        },
        pairs=[
            ReportPair(
                model=model,
                recipe=recipe,
                method=method,
                title=METHODS[method].title,
                block_size=(block_sizes or {}).get(recipe, 64),
                calibration=None if method == "dense" else "text",
                evaluations=list(evaluations),
                benchmarks=list(benchmarks),
                serving=list(serving),
                tasks=tasks or {},
            )
            for model in models
            for recipe, method in methods.items()
        ],
    )


def change(kind: type[R], path: Path | str, **changes: Any | Callable[[R], Any]) -> R:
    """Write the record in `path` again with other fields: new values, or functions of the record that give them."""
    record = kind.read(path)
    values = {name: value(record) if callable(value) else value for name, value in changes.items()}
    changed = kind(**dict(record) | values)
    changed.write(path)
    return changed


def made(stage: str, seconds: float = 60, **settings: Any) -> dict[str, Any]:
    """What all records of results share."""
    by = MadeBy(stage=f"armor.{stage}", code="c" * 16, settings=settings, inputs={})
    return {"made_by": by, "machine": MACHINE, "seconds": seconds, "peak_memory_bytes": 700_000_000}


def _block_means(rng: random.Random, perplexity: float, blocks: int = 16) -> list[float]:
    """Means that differ between blocks, for all recipes alike, and average to log(perplexity)."""
    text = random.Random("text")
    means = [text.gauss(0, 0.35) + rng.gauss(0, 0.04) for _ in range(blocks)]
    return [m - sum(means) / blocks + math.log(perplexity) for m in means]


def _evaluation(rng: random.Random, name: str, method: str, number: int) -> EvaluationRecord:
    value = PERPLEXITY[method] * (1 + 0.4 * number)
    against = None
    if method in KL:
        kl = Mean(value=KL[method], standard_error=KL[method] / 40, block_means=())
        against = AgainstDense(kl=kl, top1=Mean(value=TOP1[method], standard_error=0.004, block_means=()))
    return EvaluationRecord(
        **made("evaluate", text={"files": ["text.txt"]}, sequence_length=1024, dtype="auto"),
        evaluation=name,
        value=value,
        standard_error=value * 0.09,
        tokens=16 * 1023,
        blocks=16,
        length=1024,
        text_fingerprint=f"{number:064}",
        block_means=_block_means(rng, value),
        against_dense=against,
    )


def _tasks(name: str, method: str, tasks: list[str]) -> TasksRecord:
    score = {"metric": "acc", "value": 0.3 + TOP1.get(method, 1) / 4, "standard_error": 0.05, "shots": 0, "items": 100}
    scores = {task: TaskResult(**score, higher_is_better=not task.endswith("loss")) for task in tasks}
    return TasksRecord(**made("evaluate"), evaluation=name, tasks=scores)


def _layer(rng: random.Random, layer: int, method: str, block_size: int) -> LayerRecord:
    blocks = BlockSizes(left=block_size, right=block_size) if method == "armor" else None
    modules = {}
    for name in LINEARS:
        start = 0.064 * (0.35 + 0.04 * layer if layer > 1 else 1.5) * rng.uniform(0.5, 2)
        loss = start * LOSS[method] / LOSS["nowag"] * rng.uniform(0.8, 1.2)
        points = [0, 1, 2, 3, *range(10, 310, 10)] if blocks else []
        trace = [(i, i * 0.004, loss + (start - loss) * math.exp(-i / 40)) for i in points]
        record = linear_record(method=method, block_sizes=blocks, start_loss=start, loss=loss, trace=trace)
        modules[f"model.layers.{layer}.{name}"] = record
    return layer_record(**made("factorize", SECONDS[method]), layer=layer, modules=modules)


def _trained(record: LayerRecord, stage: str) -> LayerRecord:
    """The record of a layer after a training; when refined, layer 0 stays as it was and layer 1 began again."""
    start = 0.2 if stage == "tune" else 0.05 * (1 + record.layer)
    loss = start * (1.0 if stage == "refine" and record.layer == 0 else 0.5)
    training = Training(
        stage=stage,
        inputs="compressed" if stage == "refine" else None,
        start_loss=start,
        loss=loss,
        kept=0 if loss == start else 48,
        steps=48,
        diverged=False,
        restarts=(16,) if stage == "refine" and record.layer == 1 else (),
        looks=(),
        sequences=128,
        held_out=8,
        length=1024,
        text="wiki.valid.raw",
        tokens=48 * 4 * 1024,
        rate=5e-3,
        parameters=2_000_000,
        norms_and_biases=(),
        proxy_losses={},
        made_by=record.made_by,
    )
    changes = made(stage) | {"training": (*record.training, training)}
    return record.model_copy(update=changes)


def trained(settings: ReportSettings, recipe: str, *stages: str) -> ReportSettings:
    """The same, with the factors of `recipe` trained by these stages."""
    chain = [(stage, recipe) for stage in ("factorize", *stages)]
    pairs = [p.model_copy(update={"chain": chain}) if p.recipe == recipe else p for p in settings.pairs]
    return settings.model_copy(update={"pairs": pairs})


def _checkpoint(method: str, layers: int) -> CheckpointRecord:
    factors = FactorsMadeBy(layers=range(layers), settings={"seed": 0}, code="c" * 16, versions={})
    return CheckpointRecord(
        **made("assemble"),
        fingerprint="a" * 64,
        statistics_fingerprint="b" * 64,
        checkpoint_bytes=BYTES[method],
        bits_per_weight=BITS[method],
        dense_bits_per_weight=16.0,
        compressed_count=7 * layers,
        kept_dense=(),
        files={},
        factors=(factors,),
    )


def _runs(median: float) -> Runs:
    ends = (0.97 * median, 1.03 * median)
    return Runs(median=median, quartiles=ends, runs=ends)


def _ratios(prefill: float, decode: float) -> dict[str, Phases]:
    return {batch: Phases(prefill=_runs(prefill), decode=_runs(decode)) for batch in BATCHES}


def _speeds(method: str) -> dict[str, Phases]:
    speed = SPEED[method] / 2
    return {b: Phases(prefill=_runs(200 * int(b)), decode=_runs(speed * (1 + int(b)))) for b in BATCHES}


def _side(method: str) -> Side:
    """One side of a benchmark: the dense model, or that of a method."""
    size, bits, ratio = BYTES.get(method, DENSE_BYTES), BITS.get(method, 16.0), SPEED[method] / SPEED["dense"]
    dense = method == "dense"
    return Side(
        bytes_on_disk=size,
        bits_per_weight=bits,
        resident_bytes=280_000_000,
        peak_bytes=410_000_000,
        load_seconds=0.4,
        bytes_per_token=size,
        expanded=method in ("int4", "gptq"),
        tokens_per_second=_speeds(method),
        speedup=None if dense else _ratios(0.5 * ratio, ratio),
        theoretical_speedup=None if dense else 16 / bits,
        core=_core() if method == "armor" else None,
        linears=() if dense else [_linear(*shape, method) for shape in dict.fromkeys(LINEARS.values())],
    )


def _core() -> CoreSide:
    """The side of a packed model without its blocks: a pruned one's, as far as it is measured."""
    return CoreSide(
        bytes_on_disk=BYTES["nowag"],
        bits_per_weight=BITS["nowag"],
        bytes_per_token=BYTES["nowag"],
        tokens_per_second=_speeds("nowag"),
        speedup=_ratios(1.1, 1.1),
        theoretical_speedup=16 / BITS["nowag"],
    )


def _linear(out: int, columns: int, method: str) -> LinearSpeed:
    """The speed of one shape of linears."""
    block = 64 if method == "armor" else None
    return LinearSpeed(
        out_features=out,
        in_features=columns,
        pattern="2:4",
        block_sizes=BlockSizes.of(block, block),
        count=60,
        dense_milliseconds=_runs(out * columns / 8e6),
        milliseconds=_runs(out * columns / 1.6e7),
        speedup=_runs(2),
        theoretical_speedup=16 / BITS[method],
        core_milliseconds=_runs(out * columns / 2e7) if block else None,
        core_speedup=_runs(2.5) if block else None,
    )


def _benchmark(name: str, methods: dict[str, str]) -> BenchmarkRecord:
    """`methods` are those of the recipes that compress."""
    return BenchmarkRecord(
        **made("benchmark"),
        benchmark=name,
        dense=_side("dense"),
        recipes={recipe: _side(method) for recipe, method in methods.items()},
        turns=(tuple(methods),),
        samples=[
            Continuation(prompt=prompt, texts={"dense": f" {word}."} | {r: f" {word},\n{r}. " * 9 for r in methods})
            for prompt, word in PROMPTS.items()
        ],
    )


def _served(method: str) -> Served:
    """A model behind a server: at more clients more is written, and each waits longer."""
    ratio, size = SPEED[method] / SPEED["dense"], BYTES.get(method, DENSE_BYTES)
    loads = {
        str(clients): Load(
            requests_per_second=_runs(ratio * clients**0.6),
            tokens_per_second=_runs(40 * ratio * clients**0.6),
            first_token_milliseconds=_runs(20 * clients),
            token_milliseconds=_runs(25 / ratio * clients**0.4),
            speedup=None if method == "dense" else _runs(ratio),
        )
        for clients in (1, 4, 16)
    }
    return Served(bytes_on_disk=size, start_seconds=_runs(30), memory_bytes=_runs(1.2e9 + size), clients=loads)


def _serving(name: str, methods: dict[str, str]) -> ServingRecord:
    """`methods` are those of the recipes that compress."""
    return ServingRecord(
        **made("serving"),
        benchmark=name,
        engine={"vllm": "0.32.0", "armor": "0", "torch": "2.13.0"},
        dense=_served("dense"),
        recipes={recipe: _served(method) for recipe, method in methods.items()},
    )


def _topology(layers: int) -> Topology:
    def layer(index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}"
        common = {"dtype": "bfloat16", "bias": False, "shard": "model.safetensors"}
        return DecoderLayer(
            index=index,
            prefix=prefix,
            linears=[
                Linear(name=f"{prefix}.{name}", out_features=out, in_features=columns, input_group=group, **common)
                for group, (name, (out, columns)) in enumerate(LINEARS.items())
            ],
        )

    return topology_record(
        dtype="bfloat16",
        context_length=2048,
        hidden_size=576,
        parameters=134_515_008,
        linear_parameters=106_168_320,
        decoder_parameters=layers * (sum(out * columns for out, columns in LINEARS.values()) + NORMS),
        tied_embeddings=True,
    ).replace(layers=tuple(layer(index) for index in range(layers)))


def write_results(root: Path, settings: ReportSettings, layers: int = 30) -> Path:
    """Write all that the stages would have written for `settings` to `root`, and return `root`."""
    paths = Results(str(root))
    for model in dict.fromkeys(pair.model for pair in settings.pairs):
        pairs = [pair for pair in settings.pairs if pair.model == model]
        source = SourceRecord(path="/", fingerprint="a" * 64, dtype="bfloat16", files=FILES, hub=None, settings={})
        source.write(paths.source(model))
        _topology(layers).write(paths.topology(model))
        methods = {pair.recipe: pair.method for pair in pairs if pair.method != "dense"}
        for name in pairs[0].benchmarks:
            _benchmark(name, methods).write(paths.benchmark(model, name))
        for name in pairs[0].serving:
            _serving(name, methods).write(paths.benchmark(model, name))
    for pair in settings.pairs:
        names, rng = (pair.model, pair.recipe), random.Random(f"{pair.model} {pair.recipe}")
        for number, name in enumerate(pair.evaluations):
            _evaluation(rng, name, pair.method, number).write(paths.evaluation(*names, name))
        for name, tasks in pair.tasks.items():
            _tasks(name, pair.method, tasks).write(paths.evaluation(*names, name))
        if pair.calibration:
            calibration_record(**made("calibrate")).write(paths.calibration(pair.model, pair.calibration))
            for layer in range(layers):
                record = _layer(rng, layer, pair.method, pair.block_size)
                for stage, owner in pair.chain or [("factorize", pair.recipe)]:
                    if stage != "factorize":
                        record = _trained(record, stage)
                    record.write(paths.layer(pair.model, owner, layer, stage))
            _checkpoint(pair.method, layers).write(paths.checkpoint(*names))
    return root
