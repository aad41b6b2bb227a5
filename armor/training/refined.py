"""A recipe's refinement in one record: the losses of all layers before and after, what it took."""

from __future__ import annotations

from pathlib import Path

from armor.core.errors import ArmorError
from armor.execution.machine import current_machine
from armor.format.names import layer_files
from armor.format.provenance import made_by
from armor.format.records.base import Input
from armor.format.records.layer import LayerRecord
from armor.format.records.refine import RefineRecord

__all__ = ["sum_up"]


def sum_up(factors: Path, output: Path) -> RefineRecord:
    """Write the record of the refined layers in `factors` to `output`. Raises ArmorError if there is none."""
    files = layer_files(factors, ".json")
    if not files:
        raise ArmorError(f"{factors}: holds no refined layer; run armor refine first")
    records = [LayerRecord.read(file) for file in files]
    done = [record.training[-1] if record.training else None for record in records]
    record = RefineRecord(
        fingerprint=records[0].fingerprint,
        sha256=tuple(record.sha256 for record in records),
        start_losses=tuple(training and training.start_loss for training in done),
        losses=tuple(training and training.loss for training in done),
        kept=tuple(training and training.kept for training in done),
        made_by=made_by(__name__, None, {Input.LAYER.format(record.layer): record.sha256 for record in records}),
        machine=current_machine(),
        seconds=sum(record.seconds for record in records),
        peak_memory_bytes=max(record.peak_memory_bytes for record in records),
    )
    record.write(output)
    return record
