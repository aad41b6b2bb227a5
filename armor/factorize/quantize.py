"""Quantize the linears of one decoder layer: its factors, as they were found or trained, get few bits and scales.

A stage of its own, behind all that makes factors. So one recipe in floats serves several quantized ones, and refine and
tune work on floats. What was trained beside the factors is passed on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armor.config.layers import check_patterns
from armor.config.quantization import QuantizeSettings
from armor.core.errors import ArmorError
from armor.core.factorization import Factorization, owner
from armor.execution.files import sha256
from armor.execution.log import progress
from armor.execution.machine import current_machine, enough_memory, peak_memory_bytes
from armor.execution.resume import resumable
from armor.format.factors import read_factors, read_others, read_start, write_factors
from armor.format.names import record_beside
from armor.format.provenance import made_by
from armor.format.records.base import Input
from armor.format.records.layer import Integers, LayerRecord, LinearRecord
from armor.format.records.topology import Topology
from armor.format.statistics import Statistics, read_statistics
from armor.methods import METHODS
from armor.methods.solver.objective import condition
from armor.methods.solver.rounding import held_against, quantize
from armor.model.source import Source
from armor.model.tensors import recorded_tensors

__all__ = ["asked_for", "peak_bytes", "quantize_layer", "quantize_weights", "sharing_right"]


def quantize_layer(
    source: Source,
    topology: Topology,
    layer: int,
    factors: Path | str,
    statistics: Path | str,
    settings: QuantizeSettings,
    output: Path | str,
    device: str = "cpu",
) -> LayerRecord:
    """Round the `factors` (layer_{k}.safetensors) of decoder layer `layer` into `output`, then the JSON beside it.

    `statistics` is the layer's file from calibration. Returns what the JSON holds. Raises ArmorError for factors or
    statistics that are missing, broken or of another model, factors that are integers already, and an override that
    matches no linear of the model.
    """
    factors, output = Path(factors), Path(output)
    source.check(topology.fingerprint)
    check_patterns("settings: overrides", (o.modules for o in settings.overrides), (n.name for n in topology.linears()))
    start = read_start(factors, topology.fingerprint)
    trained, to_output = bool(start.training), {n for n, linear in start.modules.items() if _is_to_output(linear)}
    inputs = read_statistics(statistics, topology.fingerprint, gram=trained or bool(to_output))
    used = {
        Input.MODEL: topology.fingerprint,
        Input.LAYER.format(layer): start.sha256,
        Input.STATISTICS: sha256(statistics),
    }
    made = made_by(__name__, settings, used)
    shards, modules = recorded_tensors(source.path, start.modules), dict(start.modules)
    given, _ = read_factors(factors)
    if name := next((name for name, own in given.items() if own.quantization), None):
        raise ArmorError(f"{factors}: {name}: is quantized already; quantize the factors before them, in floats")
    found: dict[str, Factorization] = {}
    with resumable(output, __name__, device, used=used, settings=settings.model_dump(mode="json")) as steps:
        groups = sharing_right(given)
        for names in progress(groups, f"layer {layer}", unit="linear"):
            asked, file = asked_for(settings, names), steps.folder / f"{names[0]}.safetensors"
            if asked is None:
                found |= {name: given[name] for name in names}
                continue
            entries = {name: steps.get(name, LinearRecord) for name in names}
            if None in entries.values() or not file.is_file():
                own, gram = {n: given[n] for n in names}, names[0] in to_output
                with enough_memory(names[0], device):
                    weights = [shards.read(f"{n}.weight").to(device) for n in names]
                    done = quantize_weights(weights, inputs[names[0]], own, asked, trained, gram)
                write_factors(file, done, {})
                for name, one in done.items():
                    entries[name] = entry = _described(start.modules[name], one)
                    steps.put(name, entry)
            modules |= {name: entry for name, entry in entries.items() if entry}
            found |= read_factors(file)[0]
        described = record_beside(output)
        described.unlink(missing_ok=True)  # an old JSON must never stand beside new factors
        metadata = {"fingerprint": topology.fingerprint, "layer": layer}
        write_factors(output, found, metadata, read_others(factors))
        record = LayerRecord(
            layer=layer,
            fingerprint=topology.fingerprint,
            sha256=sha256(output),
            statistics_fingerprint=start.statistics_fingerprint,
            modules=modules,
            factorized=start.factorized or start.made_by,
            training=start.training,
            made_by=made,
            machine=current_machine(device),
            seconds=steps.seconds(),
            peak_memory_bytes=peak_memory_bytes(device),
        )
        record.write(described)
    return record


def sharing_right(factors: Mapping[str, Factorization]) -> list[list[str]]:
    """The names of `factors` in order, those together that share B, its holder first."""
    groups: dict[str, list[str]] = {}
    for name, own in factors.items():
        group = groups.setdefault(owner(name, "right", own.right_of), [])
        group.insert(len(group) if own.right_of else 0, name)
    return list(groups.values())


def asked_for(settings: QuantizeSettings, names: Sequence[str]) -> QuantizeSettings | None:
    """What `settings` ask for the linears `names`, which share B; None: they stay in floats. Raises ArmorError."""
    asked = [settings.for_module(name) for name in names]
    if different := [name for name, own in zip(names, asked, strict=True) if own != asked[0]]:
        raise ArmorError(
            f"settings: overrides: {different[0]}: another quantization than {names[0]}, with which it shares B; give "
            "both the same"
        )
    return asked[0]


def _is_to_output(linear: LinearRecord) -> bool:
    """Whether its factors were made by a Gram matrix."""
    return linear.method in METHODS and "gram" in METHODS[linear.method].statistics


def quantize_weights(
    weights: Sequence[Tensor],
    of_input: Statistics,
    factors: Mapping[str, Factorization],
    settings: QuantizeSettings,
    trained: bool,
    to_output: bool,
) -> dict[str, Factorization]:
    """The `factors` of weights (out, in), by full name, as integers, computed on the weights' device, on the CPU.

    Several share B, and are rounded as one matrix. `trained` and `to_output` as in armor.methods.solver.rounding.
    """
    importance, names = of_input.importance.to(weights[0].device), list(factors)
    given = [factors[name].to(weights[0].device) for name in names]
    how: dict[str, Any] = {"core": settings.core, "blocks": settings.blocks, "group": settings.group}
    how |= {"gram": of_input.gram, "trained": trained, "to_output": to_output}
    with torch.no_grad():
        if len(names) == 1:
            return {names[0]: quantize(weights[0], importance, given[0], **how).to("cpu")}
        whole = quantize(torch.cat(list(weights)), importance, Factorization.stacked(given), **how)
        parts = whole.split(names, [len(weight) for weight in weights])
        done = [held_against(part, own, importance) for part, own in zip(parts, weights, strict=True)]
    return {name: own.to("cpu") for name, own in zip(names, done, strict=True)}


def peak_bytes(shape: tuple[int, int], gram: bool) -> int:
    """The most memory that `quantize_weights` holds at once for a weight of `shape` (out, in), beside what it is given.

    Measured, with a Gram matrix and without.
    """
    rows, columns = shape
    without = 72 * rows * columns
    return max(without + 8 * columns**2, 24 * rows * columns + 18 * columns**2) if gram else without


def _described(before: LinearRecord, done: Factorization) -> LinearRecord:
    return before.replace(
        start_loss=done.start_loss,
        loss=done.loss,
        float_loss=before.loss,
        condition=condition(done),
        quantization=Integers.of(done.quantization),
    )
