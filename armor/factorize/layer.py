"""Factorize the linears of one decoder layer: the unit that the pipeline spreads over devices and machines.

One linear's weight is in memory at a time, besides the factors found so far, and a linear that is finished stays so if
the job dies (`armor.execution.resume`). What cannot be done as asked is done in the nearest way that can, said in the
log and noted in the JSON: a linear whose rows cannot hold the pattern stays dense, one that no blocks fit is pruned
without them, and one that the GPU has no memory for is left to the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from armor.config import LayerSettings, ModuleSettings, check_patterns
from armor.core.factors import FORMAT_VERSION, Factorization, read_factors, write_factors
from armor.core.nm import Pattern
from armor.core.statistics import Statistics, read_statistics
from armor.errors import ArmorError
from armor.execution.files import sha256, write_json
from armor.execution.log import log, progress
from armor.execution.machine import device_memory_bytes, peak_memory_bytes
from armor.execution.provenance import made_by
from armor.execution.resume import resumable
from armor.factorize import pruning, published, solver
from armor.factorize.memory import peak_bytes
from armor.factorize.objective import sizes as block_sizes
from armor.factorize.sparsegpt import sparsegpt
from armor.model.shards import Shards
from armor.model.source import Source
from armor.model.topology import DecoderLayer, Topology

__all__ = ["factorize_layer", "factorize_weight", "possible", "seed_of"]

TRACE_POINTS = 100
Compress: TypeAlias = Callable[[Tensor, Statistics, ModuleSettings, int], Factorization]


def factorize_layer(
    source: Source,
    topology: Topology,
    layer: int,
    statistics: Path | str,
    settings: LayerSettings,
    output: Path | str,
    device: str = "cpu",
) -> dict:
    """Compress the linears of decoder layer `layer` into `output` (layer_{k}.safetensors), then the JSON beside it.

    `statistics` is the layer's file from calibration, not read if all stays dense. Returns the content of the JSON.
    Raises ArmorError for NaN in a weight, for an override that matches no linear of the model, for statistics that are
    missing, broken or of another model, and for a device with too little memory.
    """
    output = Path(output)
    chosen = _layer(source, topology, layer)
    check_patterns("settings: overrides", (o.modules for o in settings.overrides), (n.name for n in topology.linears()))
    resolved = {linear.name: settings.for_module(linear.name) for linear in chosen.linears}
    _check_memory(chosen, resolved, device)
    inputs = _statistics(Path(statistics), topology, chosen, resolved)
    shards = Shards(source.path)
    used = {
        "model": topology.fingerprint,
        "statistics": sha256(statistics) if Path(statistics).is_file() else None,
    }
    work = {
        "layer": dataclasses.asdict(chosen),
        "fingerprint": topology.fingerprint,
        "statistics": used["statistics"] if inputs else None,
        "settings": settings.model_dump(mode="json"),
    }
    factors: dict[str, Factorization] = {}
    modules: dict[str, dict] = {}
    with resumable(output, __name__, device, **work) as steps:
        for linear in progress(chosen.linears, f"layer {layer}", unit="linear"):
            name, file = linear.name, steps.folder / f"{linear.name}.safetensors"
            entry = steps.get(name)
            if entry is None or not file.is_file():
                began = time.perf_counter()
                asked, note = possible(resolved[name], linear.out_features, linear.in_features)
                seed = seed_of(settings.seed, name)
                found, place = None, device
                if asked.method != "dense":
                    weight = shards.read(f"{name}.weight")
                    where = f"{shards.folder / linear.shard}: {name}.weight"
                    found, place = _factorize_somewhere(weight, inputs[name], asked, seed, where, device)
                    if place != device:
                        note = "computed on the CPU: the GPU had too little memory"
                if note:
                    log.warning("%s: %s", name, note)
                entry = _entry(asked.method, found) | {
                    "seed": seed,
                    "device": place,
                    "seconds": time.perf_counter() - began,
                    "peak_memory_bytes": peak_memory_bytes(place),  # of the process so far
                    "note": note,
                }
                write_factors(file, {name: found} if found else {}, {})
                steps.put(name, entry)
            modules[name] = entry
            factors |= read_factors(file)[0]
        described = output.with_suffix(".json")
        described.unlink(missing_ok=True)  # an old JSON must never stand beside new factors
        write_factors(output, factors, {"fingerprint": topology.fingerprint, "layer": layer})
        record = {
            "format_version": FORMAT_VERSION,
            "layer": layer,
            "fingerprint": topology.fingerprint,
            "sha256": sha256(output),
            "seconds": steps.seconds(),
            "peak_memory_bytes": peak_memory_bytes(device),
            "modules": modules,
            **made_by(__name__, settings.model_dump(mode="json"), used, device),
        }
        write_json(described, record)
    return record


def seed_of(seed: int, module: str) -> int:
    """The seed of one linear: the same on every machine, and another for every linear and every `seed`."""
    return int.from_bytes(hashlib.sha256(f"{seed} {module}".encode()).digest()[:7], "little")


def _factorize_somewhere(
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
        found = METHODS[settings.method](weight, of_input, settings, seed)
    except ValueError as error:
        raise ArmorError(f"{where}: {error}") from error
    if not (math.isfinite(found.loss) and math.isfinite(found.start_loss)):
        raise ArmorError(
            f"{where}: {settings.method} ended with loss {found.loss}, expected a number; try another method"
        )
    tensors = {name: getattr(found, name) for name in ("core", "mask", "left", "right")}
    return dataclasses.replace(found, **{name: t.cpu() for name, t in tensors.items() if t is not None})


def _entry(method: str, found: Factorization | None) -> dict:
    """What the JSON says of one linear's factors; None: it stays dense."""
    if found is None:
        return {"method": method, "pattern": None, "block_size": None, "start_loss": 0.0, "loss": 0.0, "trace": []}
    wrappers = {"left": found.left, "right": found.right}
    sizes = {side: tensor.shape[1] for side, tensor in wrappers.items() if tensor is not None}
    return {
        "method": method,
        "pattern": str(found.pattern),
        "block_size": sizes or None,
        "start_loss": found.start_loss,
        "loss": found.loss,
        "trace": _thinned(found.trace),
    }


def _armor(weight: Tensor, of_input: Statistics, settings: ModuleSettings, seed: int) -> Factorization:
    algorithm = {"fast": solver, "published": published}[settings.solver.algorithm]
    chosen = algorithm.Settings(iterations=settings.solver.iterations)
    if algorithm is published and settings.solver.selection:
        chosen = dataclasses.replace(chosen, selection=settings.solver.selection)
    sizes = {"pattern": settings.pattern, "block_size": settings.block_size}
    return algorithm.solve(weight, of_input.importance.to(weight.device), **sizes, settings=chosen, seed=seed)


def _prune(prune: Callable[..., Factorization], *needed: str) -> Compress:
    """A method of pruning as it is called here; `needed` names the statistics that it takes, in its order."""

    def method(weight: Tensor, of_input: Statistics, settings: ModuleSettings, seed: int) -> Factorization:
        statistics = (getattr(of_input, name).to(weight.device) for name in needed)
        return prune(weight, *statistics, pattern=settings.pattern)

    return method


METHODS: dict[str, Compress] = {
    "magnitude": _prune(pruning.magnitude, "importance"),
    "wanda": _prune(pruning.wanda, "importance"),
    "nowag": _prune(pruning.nowag, "importance"),
    "sparsegpt": _prune(sparsegpt, "importance", "gram"),
    "armor": _armor,
}


def _layer(source: Source, topology: Topology, index: int) -> DecoderLayer:
    if source.fingerprint != topology.fingerprint:
        raise ArmorError(
            f"{source.path}: not the model that was inspected (fingerprints differ); run armor inspect again"
        )
    for layer in topology.layers:
        if layer.index == index:
            return layer
    raise ArmorError(f"layer {index}: the model has layers 0 to {len(topology.layers) - 1}")


def _check_memory(layer: DecoderLayer, resolved: dict[str, ModuleSettings], device: str) -> None:
    """Refuse a device that cannot hold what one of the linears will need."""
    available = device_memory_bytes(device)
    for linear in layer.linears if available is not None else ():
        shape = (linear.out_features, linear.in_features)
        itemsize = getattr(torch, linear.dtype).itemsize
        needed = peak_bytes(shape, itemsize, possible(resolved[linear.name], *shape)[0])
        if needed > available:
            raise ArmorError(
                f"{linear.name}: {shape[0]} x {shape[1]} needs about {needed / 1e9:.1f} GB, {device} has "
                f"{available / 1e9:.1f} GB; choose a larger GPU, or compute on the CPU with --gpus 0 (gpu=0)"
            )


def _statistics(
    file: Path, topology: Topology, layer: DecoderLayer, resolved: dict[str, ModuleSettings]
) -> dict[str, Statistics]:
    """The statistics of every linear's input, by name; empty where all stays dense."""
    if all(settings.method == "dense" for settings in resolved.values()):
        return {}
    with_gram = {name for name, settings in resolved.items() if settings.method == "sparsegpt"}
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
    pattern = Pattern.parse(settings.pattern)
    shape = f"{out_features} x {in_features}"
    if not pattern.fits(in_features):
        note = f"stays dense: the rows of a {shape} weight cannot hold the pattern {pattern}"
        return settings.model_copy(update={"method": "dense"}), note
    size = settings.block_size
    if settings.method == "armor" and size > 1 and 1 in block_sizes((out_features, in_features), pattern, size):
        note = f"pruned by nowag: no blocks of at most {size} fit a {shape} weight and {pattern}"
        return settings.model_copy(update={"method": "nowag"}), note
    return settings, None


def _thinned(trace: list[tuple[int, float, float]]) -> list[list[float]]:
    """At most TRACE_POINTS points of `trace`, evenly spaced, the first and the last among them."""
    last = len(trace) - 1
    if last < TRACE_POINTS:
        return [list(point) for point in trace]
    return [list(trace[round(i * last / (TRACE_POINTS - 1))]) for i in range(TRACE_POINTS)]
