"""What each choice for a linear takes in bits and costs in KL divergence, for the linears of one decoder layer.

A choice is tried: the weight is factorized, and the error of every entry is weighed by the sensitivity of the
predictions to it (`armor.format.sensitivity`). Few iterations of the solver alone would favour small blocks, for large
ones gain more from many. But what is left falls about as a power of their number. So each choice is tried with few and
with a third of them, and the cost at the recipe's number is extrapolated (docs/TRIED.md).

The prediction is of second order, and of one linear at a time. The sum over a model leaves out how errors interact: it
serves to choose, and does not replace an evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from armor.config.budget import PriceSettings
from armor.config.layers import Choice, ModuleSettings
from armor.execution.files import sha256
from armor.execution.log import progress
from armor.execution.machine import current_machine, peak_memory_bytes
from armor.execution.resume import resumable
from armor.factorize.asked import check_memory, choices_of
from armor.factorize.layer import factorize_somewhere, inputs_of, layer_of, seed_of
from armor.format.checkpoint import PackedLinear
from armor.format.provenance import made_by
from armor.format.records.base import Input
from armor.format.records.budget import LinearPrices, Price, PricesRecord
from armor.format.records.sensitivity import SensitivityRecord
from armor.format.records.topology import Linear, Topology
from armor.format.sensitivity import Sensitivity, read_sensitivities
from armor.format.shards import WIDTHS, Shards
from armor.format.statistics import Statistics
from armor.model.source import Source
from armor.model.tensors import recorded_tensors

__all__ = ["extrapolated", "price_layer"]


def price_layer(
    source: Source,
    topology: Topology,
    layer: int,
    statistics: Path | str,
    sensitivity: Path | str,
    settings: PriceSettings,
    output: Path | str,
    device: str = "cpu",
) -> PricesRecord:
    """Price every choice that `settings` leave for each linear of decoder layer `layer`; the record goes to `output`.

    `statistics` is the layer's file from calibration, `sensitivity` the record of the sensitivities. Raises ArmorError
    where `factorize_layer` would, and for sensitivities that are missing or of another model.
    """
    output = Path(output)
    chosen = layer_of(source, topology, layer, settings)
    choices = {linear.name: list(choices_of(linear, settings)) for linear in chosen.linears}
    asked = {name: [way for _, way in several] for name, several in choices.items()}
    check_memory([(linear, asked[linear.name]) for linear in chosen.linears], device)
    inputs = inputs_of(Path(statistics), topology, chosen, asked)
    weighed = read_sensitivities(Path(sensitivity), [*asked], topology.fingerprint)
    used = {
        Input.MODEL: topology.fingerprint,
        Input.STATISTICS: sha256(statistics) if Path(statistics).is_file() else None,
        Input.SENSITIVITY: SensitivityRecord.read(sensitivity).sha256,
    }
    shards = recorded_tensors(source.path, (linear.name for linear in chosen.linears))
    modules, code = {}, settings.code()
    work = {"layer": chosen.model_dump(mode="json"), "used": used, "settings": settings.model_dump(mode="json")}
    with resumable(output, __name__, device, code, **work) as steps:
        for linear in progress(chosen.linears, f"layer {layer}", unit="linear"):
            name = linear.name
            found = steps.get(name, LinearPrices)
            if found is None:
                seed, of_input = seed_of(settings.seed, name), inputs.get(name)
                prices = [
                    _price(linear, choice, way, settings.iterations, shards, of_input, weighed[name], seed, device)
                    for choice, way in choices[name]
                ]
                found = LinearPrices(weights=linear.out_features * linear.in_features, prices=tuple(prices))
                steps.put(name, found)
            modules[name] = found
        record = PricesRecord(
            layer=layer,
            fingerprint=topology.fingerprint,
            modules=modules,
            seconds=steps.seconds(),
            peak_memory_bytes=peak_memory_bytes(device),
            made_by=made_by(__name__, settings, used, code),
            machine=current_machine(device),
        )
        record.write(output)
    return record


def _price(
    linear: Linear,
    choice: Choice,
    asked: ModuleSettings,
    tried: int,
    shards: Shards,
    of_input: Statistics | None,
    sensitivity: Sensitivity,
    seed: int,
    device: str,
) -> Price:
    """What a choice takes and costs; `asked` are the settings that it comes to, `tried` the iterations to try with."""
    dense_bits = 8 * WIDTHS[linear.dtype]
    if asked.is_dense:
        return Price(choice=choice.given(), bits=dense_bits, predicted_kl=0.0)
    assert of_input is not None  # they are there where anything is compressed
    weight = shards.read(f"{linear.name}.weight")
    where = f"{shards.folder / linear.shard}: {linear.name}.weight"
    wanted, bits, costs = asked.solver.iterations, 0.0, {}
    searched = asked.takes("solver") and tried < wanted
    for iterations in (tried // 3, tried) if searched else (wanted,):
        solver = asked.solver.replace(iterations=iterations)
        found, _ = factorize_somewhere(weight, of_input, asked.replace(solver=solver), seed, where, device)
        bits = PackedLinear.of(found).bits_per_weight(dense_bits)
        costs[iterations] = sensitivity.predicted_kl(weight.float() - found.reconstruct())
    return Price(choice=choice.given(), bits=bits, predicted_kl=extrapolated(costs, wanted))


def extrapolated(costs: Mapping[int, float], wanted: int) -> float:
    """The cost after `wanted` iterations, from one or two costs by fewer iterations: it falls as a power of these."""
    (few, first), (most, last) = min(costs.items()), max(costs.items())
    if few == most or not 0 < last < first:
        return last
    return last * (last / first) ** (math.log(wanted / most) / math.log(most / few))
