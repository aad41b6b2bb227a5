"""Quantize the linears of one decoder layer: its factors, as they were found or trained, become integers with scales.

A stage of its own, behind all that makes factors. So one recipe in floats serves several quantized ones, refine and
tune work on floats, and to try another type costs a minute. What was trained beside the factors is passed on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from armor.config.layers import check_patterns
from armor.config.quantization import QuantizeSettings
from armor.core.factorization import Factorization
from armor.execution.files import sha256
from armor.execution.log import progress
from armor.execution.machine import peak_memory_bytes
from armor.execution.resume import resumable
from armor.format.factors import read_factors, read_others, read_start, write_factors
from armor.format.provenance import machine, made_by
from armor.format.records.base import Input
from armor.format.records.layer import Integers, LayerRecord, LinearRecord
from armor.format.records.topology import Topology
from armor.format.shards import Shards
from armor.format.statistics import Statistics, read_statistics
from armor.methods.solver.objective import condition
from armor.methods.solver.rounding import quantize
from armor.model.source import Source

__all__ = ["quantize_layer", "quantize_weight"]


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
    statistics that are missing, broken or of another model, and for an override that matches no linear of the model.
    """
    factors, output = Path(factors), Path(output)
    check_patterns("settings: overrides", (o.modules for o in settings.overrides), (n.name for n in topology.linears()))
    start = read_start(factors, topology.fingerprint)
    inputs = read_statistics(statistics, topology.fingerprint, gram=False)
    used = {
        Input.MODEL: topology.fingerprint,
        Input.LAYER.format(layer): start.sha256,
        Input.STATISTICS: sha256(statistics),
    }
    made = made_by(__name__, settings, used)
    shards, modules = Shards(source.path), dict(start.modules)
    given, _ = read_factors(factors)
    found: dict[str, Factorization] = {}
    with resumable(output, __name__, device, used=used, settings=settings.model_dump(mode="json")) as steps:
        for name, own in progress(given.items(), f"layer {layer}", unit="linear", total=len(given)):
            asked, file = settings.for_module(name), steps.folder / f"{name}.safetensors"
            if asked is None:
                found[name] = own
                continue
            entry = steps.get(name, LinearRecord)
            if entry is None or not file.is_file():
                weight, trained = shards.read(f"{name}.weight").to(device), bool(start.training)
                done = quantize_weight(weight, inputs[name], own, asked, trained)
                write_factors(file, {name: done}, {})
                entry = _described(start.modules[name], done)
                steps.put(name, entry)
            modules[name] = entry
            found |= read_factors(file)[0]
        described = output.with_suffix(".json")
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
            machine=machine(device),
            seconds=steps.seconds(),
            peak_memory_bytes=peak_memory_bytes(device),
        )
        record.write(described)
    return record


def quantize_weight(
    weight: Tensor, of_input: Statistics, factors: Factorization, settings: QuantizeSettings, trained: bool
) -> Factorization:
    """The `factors` of weight (out, in) as integers, computed on the weight's device, on the CPU."""
    importance, own = of_input.importance.to(weight.device), factors.to(weight.device)
    core, blocks, group = settings.core, settings.blocks, settings.group
    with torch.no_grad():
        return quantize(weight, importance, own, core=core, blocks=blocks, group=group, trained=trained).to("cpu")


def _described(before: LinearRecord, done: Factorization) -> LinearRecord:
    return before.model_copy(
        update={
            "start_loss": done.start_loss,
            "loss": done.loss,
            "float_loss": before.loss,
            "condition": condition(done),
            "quantization": Integers.of(done.quantization),
        }
    )
