"""Factorize the linears of one decoder layer: the unit that the pipeline spreads over devices and machines.

One linear's weight is in memory at a time, besides the factors found so far. A linear that is finished stays so if the
job dies (`armor.execution.resume`). What cannot be done as asked is done in the nearest way that can, said in the log
and noted in the JSON. A linear whose rows cannot hold the pattern stays dense. One that no blocks fit is pruned without
them. One that the GPU has no memory for is left to the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from armor.config.layers import Choice, LayerSettings, ModuleSettings, check_patterns
from armor.config.reading import parse_settings
from armor.core.blockdiag import sizes
from armor.core.errors import ArmorError
from armor.core.factorization import Factorization
from armor.execution.files import sha256
from armor.execution.log import log, progress
from armor.execution.machine import device_memory_bytes, peak_memory_bytes
from armor.execution.resume import resumable
from armor.format.checkpoint import PackedLinear
from armor.format.factors import read_factors, write_factors
from armor.format.provenance import machine, made_by
from armor.format.records.base import Input
from armor.format.records.budget import BudgetRecord
from armor.format.records.layer import BlockSizes, Integers, LayerRecord, LinearRecord
from armor.format.records.topology import DecoderLayer, Linear, Topology
from armor.format.statistics import Statistics, read_statistics
from armor.methods import METHODS
from armor.methods.solver.objective import condition
from armor.model.source import Source
from armor.model.tensors import recorded_tensors

__all__ = [
    "block_sizes_of",
    "factorize_layer",
    "factorize_somewhere",
    "factorize_weight",
    "inputs_of",
    "layer_of",
    "layout_of",
    "linear_bytes",
    "possible",
    "seed_of",
]

TRACE_POINTS = 100


def factorize_layer(
    source: Source,
    topology: Topology,
    layer: int,
    statistics: Path | str,
    settings: LayerSettings,
    output: Path | str,
    device: str = "cpu",
    budget: Path | str | None = None,
) -> LayerRecord:
    """Compress the linears of decoder layer `layer` into `output` (layer_{k}.safetensors), then the JSON beside it.

    `statistics` is the layer's file from calibration, not read if all stays dense. `budget` is the record with a choice
    for each linear, which goes before the settings. Returns what the JSON holds. Raises ArmorError for NaN in a weight,
    and for an override that matches no linear of the model. So it does for statistics or a budget that are missing,
    broken or of another model, and for a device with too little memory.
    """
    output = Path(output)
    chosen = layer_of(source, topology, layer, settings)
    resolved = {linear.name: settings.for_module(linear.name) for linear in chosen.linears}
    used = {
        Input.MODEL: topology.fingerprint,
        Input.STATISTICS: sha256(statistics) if Path(statistics).is_file() else None,
    }
    if budget is not None:
        record = BudgetRecord.read(budget)
        if record.fingerprint != topology.fingerprint:
            raise ArmorError(f"{budget}: of another model (its fingerprint differs); {record.AGAIN}")
        used[Input.BUDGET] = record.content()
        resolved = {name: choice.apply(resolved[name]) for name, choice in _choices(record, budget, chosen).items()}
    inputs = inputs_of(Path(statistics), topology, chosen, {name: [asked] for name, asked in resolved.items()}, device)
    shards = recorded_tensors(source.path, (linear.name for linear in chosen.linears))
    work = {
        "layer": chosen.model_dump(mode="json"),
        "fingerprint": topology.fingerprint,
        "statistics": used[Input.STATISTICS] if inputs else None,
        "settings": settings.model_dump(mode="json"),
        "resolved": {name: asked.model_dump(mode="json") for name, asked in resolved.items()},
    }
    factors: dict[str, Factorization] = {}
    modules: dict[str, LinearRecord] = {}
    code = settings.code()
    with resumable(output, __name__, device, code, **work) as steps:
        for linear in progress(chosen.linears, f"layer {layer}", unit="linear"):
            name, file = linear.name, steps.folder / f"{linear.name}.safetensors"
            entry = steps.get(name, LinearRecord)
            if entry is None or not file.is_file():
                began = time.perf_counter()
                asked, note = possible(resolved[name], linear.out_features, linear.in_features)
                seed = seed_of(settings.seed, name)
                found, place = None, device
                if asked.method != "dense":
                    weight = shards.read(f"{name}.weight")
                    where = f"{shards.folder / linear.shard}: {name}.weight"
                    found, place = factorize_somewhere(weight, inputs[name], asked, seed, where, device)
                    if place != device:
                        note = "computed on the CPU: the GPU had too little memory"
                if note:
                    log.warning("%s: %s", name, note)
                entry = LinearRecord(
                    method=asked.method,
                    pattern=str(found.pattern) if found else None,
                    block_size=block_sizes_of(found) if found else None,
                    start_loss=found.start_loss if found else 0.0,
                    loss=found.loss if found else 0.0,
                    condition=condition(found) if found else None,
                    trace=tuple(_thinned(found.trace)) if found else (),
                    seed=seed,
                    device=place,
                    seconds=time.perf_counter() - began,
                    peak_memory_bytes=peak_memory_bytes(place),  # of the process so far
                    note=note,
                    quantization=Integers.of(found.quantization) if found else None,
                )
                write_factors(file, {name: found} if found else {}, {})
                steps.put(name, entry)
            modules[name] = entry
            factors |= read_factors(file)[0]
        described = output.with_suffix(".json")
        described.unlink(missing_ok=True)  # an old JSON must never stand beside new factors
        write_factors(output, factors, {"fingerprint": topology.fingerprint, "layer": layer})
        record = LayerRecord(
            layer=layer,
            fingerprint=topology.fingerprint,
            sha256=sha256(output),
            statistics_fingerprint=used[Input.STATISTICS],
            seconds=steps.seconds(),
            peak_memory_bytes=peak_memory_bytes(device),
            modules=modules,
            made_by=made_by(__name__, settings, used, code),
            machine=machine(device),
        )
        record.write(described)
    return record


def seed_of(seed: int, module: str) -> int:
    """The seed of one linear: the same on every machine, and another for every linear and every `seed`."""
    return int.from_bytes(hashlib.sha256(f"{seed} {module}".encode()).digest()[:7], "little")


def factorize_somewhere(
    weight: Tensor, of_input: Statistics, settings: ModuleSettings, seed: int, where: str, device: str
) -> tuple[Factorization, str]:
    """`factorize_weight` on `device`, or on the CPU if the GPU's memory is too small; and where it was done."""
    if device != "cpu":
        with contextlib.suppress(torch.OutOfMemoryError):
            return factorize_weight(weight.to(device), of_input, settings, seed, where), device
        torch.cuda.empty_cache()
    try:
        return factorize_weight(weight, of_input, settings, seed, where), "cpu"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):  # torch's words, on a CPU
            raise
        raise ArmorError(f"{where}: out of memory; give the job more, or take fewer jobs at a time") from error


def factorize_weight(
    weight: Tensor, of_input: Statistics, settings: ModuleSettings, seed: int, where: str
) -> Factorization:
    """The factors of weight (out, in) under its input's statistics, on the CPU. Raises ArmorError naming `where`."""
    if bad := int((~weight.isfinite()).sum()):
        raise ArmorError(f"{where}: {bad} of {weight.numel()} weights are NaN or infinite; fetch the model again")
    try:
        found = METHODS[settings.method].run(weight, of_input, settings, seed)
    except ValueError as error:
        raise ArmorError(f"{where}: {error}") from error
    if not (math.isfinite(found.loss) and math.isfinite(found.start_loss)):
        raise ArmorError(
            f"{where}: {settings.method} ended with loss {found.loss}, expected a number; try another method"
        )
    return found.to("cpu")


def block_sizes_of(found: Factorization) -> BlockSizes | None:
    """The sizes of the blocks of A and B; None without blocks."""
    if found.left is None and found.right is None:
        return None
    return BlockSizes(**{s: f.shape[1] for s, f in (("left", found.left), ("right", found.right)) if f is not None})


def layer_of(source: Source, topology: Topology, index: int, settings: LayerSettings) -> DecoderLayer:
    """Decoder layer `index`. Raises ArmorError for another model, and an override that matches no linear of it."""
    check_patterns("settings: overrides", (o.modules for o in settings.overrides), (n.name for n in topology.linears()))
    if source.fingerprint != topology.fingerprint:
        raise ArmorError(
            f"{source.path}: not the model that was inspected (fingerprints differ); run armor inspect again"
        )
    for layer in topology.layers:
        if layer.index == index:
            return layer
    raise ArmorError(f"layer {index}: the model has layers 0 to {len(topology.layers) - 1}")


def _choices(budget: BudgetRecord, file: Path | str, layer: DecoderLayer) -> dict[str, Choice]:
    """What the record chooses for each linear of a layer. A person may have edited it: raises ArmorError."""
    found = {}
    for linear in layer.linears:
        if linear.name not in budget.modules:
            raise ArmorError(f"{file}: has no choice for {linear.name}; {budget.AGAIN}")
        found[linear.name] = parse_settings(Choice, budget.modules[linear.name].choice, f"{file}: {linear.name}")
    return found


def inputs_of(
    statistics: Path,
    topology: Topology,
    layer: DecoderLayer,
    asked: Mapping[str, Sequence[ModuleSettings]],
    device: str,
) -> dict[str, Statistics]:
    """The statistics of every linear's input, by name; empty where all stays dense.

    `asked` are the ways in which each linear is compressed. Raises ArmorError if `device` has too little memory for one
    of them, and for statistics that are missing, broken or of another model.
    """
    _check_memory(layer, asked, device)
    return _statistics(statistics, topology, layer, asked)


def _check_memory(layer: DecoderLayer, asked: Mapping[str, Sequence[ModuleSettings]], device: str) -> None:
    """Refuse a device that cannot hold what one of the linears will need."""
    available = device_memory_bytes(device)
    for linear in layer.linears:
        needed = linear_bytes(linear, asked[linear.name])
        if available is not None and needed > available:
            raise ArmorError(
                f"{linear.name}: {linear.out_features} x {linear.in_features} needs about {needed / 1e9:.1f} GB, "
                f"{device} has {available / 1e9:.1f} GB; choose a larger GPU, or compute on the CPU with --gpus 0 "
                "(gpu=0)"
            )


def linear_bytes(linear: Linear, asked: Sequence[ModuleSettings]) -> int:
    """The memory that a linear takes at its peak, whichever of `asked` it is compressed with."""
    shape = (linear.out_features, linear.in_features)
    chosen = [possible(settings, *shape)[0] for settings in asked]
    itemsize = getattr(torch, linear.dtype).itemsize
    return max(METHODS[settings.method].peak_bytes(shape, itemsize, settings) for settings in chosen)


def layout_of(linear: Linear, asked: ModuleSettings) -> PackedLinear | None:
    """How a linear that is compressed as `asked` will be stored; None where it stays dense."""
    shape = (linear.out_features, linear.in_features)
    asked, _ = possible(asked, *shape)
    if asked.method == "dense":
        return None
    method = METHODS[asked.method]
    pattern = method.pattern(asked)
    blocks = sizes(shape, pattern, asked.block_size) if "block_size" in method.settings else (None, None)
    return PackedLinear(*shape, pattern, *blocks, method.integers(shape, asked))


def _statistics(
    file: Path, topology: Topology, layer: DecoderLayer, asked: Mapping[str, Sequence[ModuleSettings]]
) -> dict[str, Statistics]:
    methods = {name: {settings.method for settings in several} for name, several in asked.items()}
    if set().union(*methods.values()) <= {"dense"}:
        return {}
    with_gram = {name for name, used in methods.items() if any("gram" in METHODS[m].statistics for m in used)}
    found = read_statistics(file, topology.fingerprint, gram=bool(with_gram))
    for linear in layer.linears:
        if linear.name not in found:
            raise ArmorError(f"{file}: no statistics of the input of {linear.name}; calibrate again")
        if linear.name in with_gram and found[linear.name].gram is None:
            raise ArmorError(f"{file}: no Gram matrix of the input of {linear.name}; calibrate with gram: true")
        shape = tuple(found[linear.name].importance.shape)
        if shape != (linear.in_features,):
            raise ArmorError(f"{file}: {linear.name}: importance of shape {shape}, expected ({linear.in_features},)")
    return found


def possible(settings: ModuleSettings, out_features: int, in_features: int) -> tuple[ModuleSettings, str | None]:
    """The settings that a weight (out, in) allows, and a note if they are not those asked for."""
    if settings.method == "dense":
        return settings, None
    method = METHODS[settings.method]
    pattern = method.pattern(settings)
    shape = f"{out_features} x {in_features}"
    if not pattern.fits(in_features):
        note = f"stays dense: the rows of a {shape} weight cannot hold the pattern {pattern}"
        return settings.model_copy(update={"method": "dense"}), note
    if why := method.why_not((out_features, in_features), settings):
        return settings.model_copy(update={"method": method.instead}), f"pruned by {method.instead}: {why}"
    return settings, None


def _thinned(trace: list[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    """At most TRACE_POINTS points of `trace`, evenly spaced, the first and the last among them."""
    last = len(trace) - 1
    if last < TRACE_POINTS:
        return trace
    return [trace[round(i * last / (TRACE_POINTS - 1))] for i in range(TRACE_POINTS)]
