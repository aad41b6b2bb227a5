"""From a training to the factors and the record of a decoder layer: what the proxy loss is now, and what was done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from armor.config.training import RefineSettings, TrainingSettings
from armor.core.factorization import Factorization
from armor.execution.files import sha256
from armor.execution.machine import current_machine, peak_memory_bytes
from armor.format.factors import write_factors
from armor.format.names import record_beside
from armor.format.records.base import MadeBy
from armor.format.records.layer import LayerRecord, Training
from armor.format.shards import Shards
from armor.format.statistics import Statistics
from armor.methods.solver.objective import Objective, condition, relative_loss
from armor.training.fit import Fit
from armor.training.trainable import TrainableLayer

__all__ = ["described", "write_trained"]


def described(
    stage: Literal["refine", "tune"],
    settings: TrainingSettings,
    found: Fit,
    layer: TrainableLayer,
    length: int,
    text: str,
    proxy_losses: dict[str, float],
    made: MadeBy,
    parameters: int | None = None,
) -> Training:
    """What the record says of a training on sequences of `length` tokens of `text`."""
    return Training(
        stage=stage,
        inputs=settings.inputs if isinstance(settings, RefineSettings) else None,
        start_loss=found.looks[0].held_out_loss,
        loss=found.best,
        kept=found.kept,
        steps=found.steps,
        diverged=found.diverged,
        restarts=found.restarts,
        looks=found.looks,
        sequences=settings.sequences,
        held_out=settings.held_out,
        length=length,
        text=text,
        tokens=found.steps * settings.batch * length,
        rate=settings.rate,
        parameters=parameters or sum(p.numel() for p in layer.parameters().values()),
        core=settings.core,
        rounded=any(linear.start.quantization for linear in layer.linears.values()),
        norms_and_biases=tuple(sorted(layer.others)) if settings.norm_rate else (),
        proxy_losses=proxy_losses,
        made_by=made,
    )


def with_loss(factors: Factorization, weight: Tensor, statistics: Statistics) -> Factorization:
    """`factors` with the proxy loss that they have now, as stored."""
    return replace(factors, loss=relative_loss(weight, Objective.of(weight, statistics.importance), factors))


def write_trained(
    output: Path,
    start: LayerRecord,
    factors: Mapping[str, Factorization],
    others: Mapping[str, Tensor],
    statistics: Mapping[str, Statistics],
    shards: Shards,
    training: Training | None,
    made: MadeBy,
    seconds: float,
    devices: Sequence[str],
) -> LayerRecord:
    """Write a layer's trained factors to `output` and the record beside them, which is returned.

    `start` is the record of what the training started from; `training` is None where there was nothing to train. The
    memory in the record is that of the fullest of the `devices` that it ran on.
    """
    found = {n: with_loss(f, shards.read(f"{n}.weight"), statistics[n]) for n, f in factors.items()}
    modules = dict(start.modules)
    for name, f in found.items():
        modules[name] = modules[name].replace(loss=f.loss, condition=condition(f))
    described = record_beside(output)
    described.unlink(missing_ok=True)  # an old JSON must never stand beside new factors
    write_factors(output, found, {"fingerprint": start.fingerprint, "layer": start.layer}, others)
    record = LayerRecord(
        layer=start.layer,
        fingerprint=start.fingerprint,
        sha256=sha256(output),
        statistics_fingerprint=start.statistics_fingerprint,
        modules=modules,
        factorized=start.factorized or start.made_by,
        training=(*start.training, *([training] if training else [])),
        made_by=made,
        machine=current_machine(devices[0]),
        seconds=seconds,
        peak_memory_bytes=max(map(peak_memory_bytes, devices)),
    )
    record.write(described)
    return record
