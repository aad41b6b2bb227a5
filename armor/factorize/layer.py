"""Factorize the linears of one decoder layer: the unit that the pipeline spreads over devices and machines.

The weight of one linear is in memory at a time, or those of the linears that share B, besides the factors found so far.
A linear that is finished stays so if the job dies (`armor.execution.resume`). What cannot be done as asked is done in
the nearest way that can, said in the log and noted in the JSON. A linear whose rows cannot hold the pattern stays
dense. One that no blocks fit is pruned without them. One that the GPU has no memory for is left to the CPU.

All factors of a job are in memory at its end. Where a layer has more experts than that allows, jobs of their own
compress them group by group. The layer's job then does the rest, and puts all together from file to file.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from armor.config.layers import Choice, LayerSettings, ModuleSettings, check_patterns, sharing_patterns
from armor.config.reading import parse_settings
from armor.core.errors import ArmorError
from armor.core.factorization import Factorization
from armor.execution.files import sha256
from armor.execution.fingerprint import code_hash
from armor.execution.log import log, progress
from armor.execution.machine import current_machine, enough_memory, peak_memory_bytes
from armor.execution.resume import Steps, resumable
from armor.factorize.asked import check_memory, groups_asked, possible
from armor.factorize.sharing import one_linear, parts_of
from armor.format.checkpoint import PackedLinear
from armor.format.factors import join_factors, read_factors, read_start, write_factors
from armor.format.names import factors_beside, record_beside
from armor.format.provenance import made_by
from armor.format.records.base import BlockSizes, Input
from armor.format.records.budget import BudgetRecord
from armor.format.records.layer import Integers, LayerRecord, LinearRecord
from armor.format.records.topology import DecoderLayer, Linear, Topology
from armor.format.shards import Shards
from armor.format.statistics import Statistics, read_statistics
from armor.methods.solver.objective import condition
from armor.model.source import Source
from armor.model.tensors import recorded_tensors

__all__ = [
    "factorize_layer",
    "factorize_somewhere",
    "factorize_weight",
    "inputs_of",
    "layer_of",
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
    experts: str | None = None,
    done: Sequence[Path] = (),
    statistics_sha256: str | None = None,
) -> LayerRecord:
    """Compress the linears of decoder layer `layer` into `output` (layer_{k}.safetensors), then the JSON beside it.

    `statistics` is the layer's file from calibration, not read if all stays dense; `statistics_sha256` its hash, which
    is found from the file if unset. `budget` is the record with a choice for each linear, which goes before the
    settings. `experts`, like 0-63: these alone. `done` are the records of such groups: their factors are taken, and
    those of the other linears found. Returns what the JSON holds. Raises ArmorError for NaN in a weight, and for an
    override that matches no linear of the model. So it does for statistics, a budget or groups that are missing, broken
    or of another model, and for a device with too little memory.
    """
    output = Path(output)
    whole = layer_of(source, topology, layer, settings)
    if statistics_sha256 is None and Path(statistics).is_file():
        statistics_sha256 = sha256(statistics)
    used = {Input.MODEL: topology.fingerprint, Input.STATISTICS: statistics_sha256}
    choices = None if budget is None else _read_budget(budget, topology)
    if choices is not None:
        used[Input.BUDGET] = choices.content()
    finished = {file: _read_group(file, whole, settings, used) for file in done}
    chosen = whole if experts is None else whole.group(experts)
    taken = {name for record in finished.values() for name in record.modules}
    chosen = chosen.only({linear.name for linear in chosen.linears} - taken)
    resolved = {linear.name: settings.for_module(linear.name) for linear in chosen.linears}
    if choices is not None:
        resolved = {n: c.apply(resolved[n]) for n, c in _choices(choices, str(budget), chosen).items()}
    groups = groups_asked(chosen, settings, resolved)
    alone = ((linear, [resolved[linear.name]]) for linear in chosen.linears)
    check_memory([*alone, *((one_linear(group), [asked]) for group, asked in groups)], device)
    inputs = inputs_of(Path(statistics), topology, chosen, {name: [asked] for name, asked in resolved.items()})
    shards = recorded_tensors(source.path, (linear.name for linear in chosen.linears))
    work = {
        "layer": chosen.model_dump(mode="json"),
        "fingerprint": topology.fingerprint,
        "statistics": used[Input.STATISTICS] if inputs else None,
        "settings": settings.model_dump(mode="json"),
        "resolved": {name: asked.model_dump(mode="json") for name, asked in resolved.items()},
    }
    files: list[Path] = []
    modules: dict[str, LinearRecord] = {}
    code = settings.code()
    solve = partial(_factorized, resolved=resolved, shards=shards, inputs=inputs, seed=settings.seed, device=device)
    with resumable(output, __name__, device, code, **work) as steps:
        for group, asked in progress(groups, f"layer {layer}", unit="linear"):
            files.append(steps.folder / f"{group[0].name}.safetensors")
            modules |= _kept(steps, files[-1], group, partial(solve, group, asked))
        described = record_beside(output)
        described.unlink(missing_ok=True)  # an old JSON must never stand beside new factors
        metadata = {"fingerprint": topology.fingerprint, "layer": layer}
        if done:
            join_factors(output, [*files, *map(factors_beside, done)], metadata)
        else:
            factors = {name: own for file in files for name, own in read_factors(file)[0].items()}
            write_factors(output, factors, metadata)
        records = finished.values()
        modules |= {name: entry for record in records for name, entry in record.modules.items()}
        used |= {Input.EXPERTS.format(file.stem): record.sha256 for file, record in finished.items()}
        record = LayerRecord(
            layer=layer,
            fingerprint=topology.fingerprint,
            sha256=sha256(output),
            statistics_fingerprint=used[Input.STATISTICS],
            seconds=steps.seconds() + sum(record.seconds for record in records),
            peak_memory_bytes=max([peak_memory_bytes(device), *(record.peak_memory_bytes for record in records)]),
            modules={linear.name: modules[linear.name] for linear in whole.linears if linear.name in modules},
            made_by=made_by(__name__, settings, used, code),
            machine=current_machine(device),
        )
        record.write(described)
    return record


Solved = dict[str, tuple[LinearRecord, Factorization | None]]
"""The record of each linear of a group by name, and its factors, None of one that stays dense."""


def _kept(steps: Steps, file: Path, group: Sequence[Linear], solve: Callable[[], Solved]) -> dict[str, LinearRecord]:
    """The records of the linears of `group`, whose factors are in `file`; both are kept of a run that was killed."""
    entries = {linear.name: steps.get(linear.name, LinearRecord) for linear in group}
    if None in entries.values() or not file.is_file():
        new = solve()
        write_factors(file, {name: found for name, (_, found) in new.items() if found}, {})
        for name, (entry, _) in new.items():
            entries[name] = entry
            steps.put(name, entry)
    return {name: entry for name, entry in entries.items() if entry}


def _factorized(
    group: Sequence[Linear],
    asked: ModuleSettings,
    resolved: Mapping[str, ModuleSettings],
    shards: Shards,
    inputs: Mapping[str, Statistics],
    seed: int,
    device: str,
    note: str | None = None,
) -> Solved:
    """What comes of the linears of `group`.

    Several share B, and take `asked`; one alone takes what `resolved` asks for it. Where sharing would leave a loss
    above NoWag-P's each gets a B of its own.
    """
    began, names, first = time.perf_counter(), [linear.name for linear in group], group[0]
    if len(group) == 1:
        asked, why = possible(resolved[first.name], first.out_features, first.in_features)
        note = why or note
    found: Sequence[Factorization | None] | None = [None]
    chance, place = seed_of(seed, first.name), device
    if not asked.is_dense:
        weights = [shards.read(f"{name}.weight") for name in names]
        where = [f"{shards.folder / linear.shard}: {linear.name}.weight" for linear in group]
        for weight, own in zip(weights, where, strict=True) if len(group) > 1 else ():
            check_finite(weight, own)
        of_input = inputs[first.name]
        stacked = torch.cat(weights) if len(group) > 1 else weights[0]
        done, place = factorize_somewhere(stacked, of_input, asked, chance, where[0], device)
        found = parts_of(done, names, weights, of_input) if len(group) > 1 else [done]
        if found is None:
            alone = "has a B of its own, for with a shared one a loss would be above NoWag-P's"
            apart = (_factorized([one], asked, resolved, shards, inputs, seed, device, alone) for one in group)
            return {name: own for each in apart for name, own in each.items()}
        if place != device:
            note = "; ".join(filter(None, (note, "computed on the CPU: the GPU had too little memory")))
    if note:
        log.warning("%s: %s", " and ".join(names), note)
    seconds = (time.perf_counter() - began) / one_linear(group).out_features
    return {
        linear.name: (
            LinearRecord(
                method=asked.method,
                pattern=str(own.pattern) if own else None,
                block_sizes=_block_sizes(own) if own else None,
                rank=PackedLinear.of(own).rank if own else None,
                start_loss=own.start_loss if own else 0.0,
                loss=own.loss if own else 0.0,
                condition=condition(own) if own else None,
                trace=tuple(_thinned(own.trace)) if own else (),
                seed=chance,
                device=place,
                seconds=seconds * linear.out_features,  # its share
                peak_memory_bytes=peak_memory_bytes(place),  # of the process so far
                note=note,
                quantization=Integers.of(own.quantization) if own else None,
                right_of=own.right_of if own else None,
            ),
            own,
        )
        for linear, own in zip(group, found, strict=True)
    }


def _read_group(
    file: Path, layer: DecoderLayer, settings: LayerSettings, used: Mapping[str, str | None]
) -> LayerRecord:
    """The record of a group of experts of `layer`, held against what the layer is compressed by."""
    record = read_start(factors_beside(file), str(used[Input.MODEL]))
    if record.layer != layer.index:
        raise ArmorError(f"{file}: of layer {record.layer}, expected {layer.index}; name the layer's own groups")
    made = record.made_by
    for what, found, expected in (
        ("settings", made.settings, settings.model_dump(mode="json")),
        ("code", made.code, code_hash(__name__, *settings.code())),
        *((name, made.inputs.get(name), used.get(name)) for name in (Input.STATISTICS, Input.BUDGET)),
    ):
        if found != expected:
            raise ArmorError(f"{file}: made with other {what} than the layer is; factorize these experts again")
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
    with enough_memory(where, "cpu"):
        return factorize_weight(weight, of_input, settings, seed, where), "cpu"


def factorize_weight(
    weight: Tensor, of_input: Statistics, settings: ModuleSettings, seed: int, where: str
) -> Factorization:
    """The factors of weight (out, in) under its input's statistics, on the CPU. Raises ArmorError naming `where`."""
    check_finite(weight, where)
    try:
        found = settings.how.run(weight.contiguous(), of_input, settings, seed)  # of a Conv1D it is a view
    except ValueError as error:
        raise ArmorError(f"{where}: {error}") from error
    if not (math.isfinite(found.loss) and math.isfinite(found.start_loss)):
        raise ArmorError(
            f"{where}: {settings.method} ended with loss {found.loss}, expected a number; try another method"
        )
    if found.pattern != (expected := settings.how.pattern(settings)):
        raise ArmorError(
            f"{where}: {settings.method} made a core of pattern {found.pattern}, expected {expected}; its function "
            "must take `pattern`"
        )
    return found.to("cpu")


def check_finite(weight: Tensor, where: str) -> None:
    """Raises ArmorError, naming `where`, for a weight that holds NaN or infinity."""
    if bad := int((~weight.isfinite()).sum()):
        raise ArmorError(f"{where}: {bad} of {weight.numel()} weights are NaN or infinite; fetch the model again")


def _block_sizes(found: Factorization) -> BlockSizes | None:
    """The sizes of the blocks of A and B; None without blocks."""
    return BlockSizes.of(*(None if side is None else side.shape[1] for side in (found.left, found.right)))


def layer_of(source: Source, topology: Topology, index: int, settings: LayerSettings) -> DecoderLayer:
    """Decoder layer `index`. Raises ArmorError for another model, and an override that matches no linear of it."""
    names = [linear.name for linear in topology.linears()]
    check_patterns("settings: overrides", (override.modules for override in settings.overrides), names)
    check_patterns("settings: share_right", sharing_patterns(settings.share_right), names)
    source.check(topology.fingerprint)
    for layer in topology.layers:
        if layer.index == index:
            return layer
    raise ArmorError(f"layer {index}: the model has layers 0 to {len(topology.layers) - 1}")


def _read_budget(file: Path | str, topology: Topology) -> BudgetRecord:
    record = BudgetRecord.read(file)
    if record.fingerprint != topology.fingerprint:
        raise ArmorError(f"{file}: of another model (its fingerprint differs); {record.AGAIN}")
    return record


def _choices(budget: BudgetRecord, file: Path | str, layer: DecoderLayer) -> dict[str, Choice]:
    """What the record chooses for each linear of a layer. A person may have edited it: raises ArmorError."""
    found = {}
    for linear in layer.linears:
        if linear.name not in budget.modules:
            raise ArmorError(f"{file}: has no choice for {linear.name}; {budget.AGAIN}")
        found[linear.name] = parse_settings(Choice, budget.modules[linear.name].choice, f"{file}: {linear.name}")
    return found


def inputs_of(
    file: Path, topology: Topology, layer: DecoderLayer, asked: Mapping[str, Sequence[ModuleSettings]]
) -> dict[str, Statistics]:
    """The statistics of every linear's input, by name; empty where all stays dense.

    `asked` are the ways in which each linear is compressed. Raises ArmorError for statistics that are missing, broken
    or of another model.
    """
    if all(settings.is_dense for several in asked.values() for settings in several):
        return {}
    with_gram = {name for name, several in asked.items() if any(settings.takes("gram") for settings in several)}
    found = read_statistics(file, topology.fingerprint, gram=bool(with_gram), linears=asked)
    for linear in layer.linears:
        if linear.name not in found:
            raise ArmorError(f"{file}: no statistics of the input of {linear.name}; calibrate again")
        if linear.name in with_gram and found[linear.name].gram is None:
            raise ArmorError(f"{file}: no Gram matrix of the input of {linear.name}; calibrate with gram: true")
        shape = tuple(found[linear.name].importance.shape)
        if shape != (linear.in_features,):
            raise ArmorError(f"{file}: {linear.name}: importance of shape {shape}, expected ({linear.in_features},)")
    return found


def _thinned(trace: list[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    """At most TRACE_POINTS points of `trace`, evenly spaced, the first and the last among them."""
    last = len(trace) - 1
    if last < TRACE_POINTS:
        return trace
    return [trace[round(i * last / (TRACE_POINTS - 1))] for i in range(TRACE_POINTS)]
