"""The dense model's predictions on an evaluation's text, made once for all recipes that are held against them.

KL divergence and agreement need the dense model's logits at every prediction. Here it is run once. Its losses go into
the record, which is all that its own perplexity needs. Its logits, in the dtype that it computes in, go into a file
beside the record. So an evaluation that reads them has the same numbers as one that runs the dense model beside, bit by
bit. The price is disk: blocks · length · vocabulary numbers. Where that is more than the evaluation allows
(`predictions_gb`), or than half of the free disk, nothing is stored and the record says why. The logits are a help and
no result. A run of the workflow that succeeds removes them. Where they are not there an evaluation runs the dense model
too. A run that was killed goes on after the last block (`armor.execution.resume`).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from armor.config.measures import EvaluationSettings
from armor.core.errors import ArmorError
from armor.core.typed import Typed
from armor.evaluate.logits import (
    Model,
    blocks_of,
    finite,
    logits_of,
    token_losses,
    vocabulary_of,
    with_models,
)
from armor.execution.log import log, progress
from armor.execution.machine import current_machine, peak_memory_bytes
from armor.execution.resume import Steps, identity, resumable
from armor.format.logits import LogitsFile
from armor.format.names import logits_beside
from armor.format.provenance import made_by
from armor.format.records.base import Input
from armor.format.records.predictions import PredictionsRecord
from armor.format.shards import dtype_name
from armor.runtime.load import loaded_dtype
from armor.text.reading import Blocks

__all__ = ["SHARE_OF_DISK", "fitting", "predict"]

SHARE_OF_DISK = 0.5


class _Predicted(Typed):
    """A block that is done: its mean loss in nats, and the hash of its logits if they are stored."""

    loss: float
    sha256: str | None


def predict(
    folder: Path | str,
    settings: EvaluationSettings,
    output: Path | str,
    device: str = "cpu",
    fingerprint: str | None = None,
) -> PredictionsRecord:
    """Run the dense model in `folder`, whose `fingerprint` is noted, and write `output`, predictions/{evaluation}.json.

    The logits go beside it (`logits_beside`), before it. Raises ArmorError for a folder that is no model, a text too
    short, a device with too little memory, and logits that are not finite.
    """
    folder, output = Path(folder), Path(output)
    blocks = blocks_of(folder, settings)
    made = made_by(__name__, settings, {Input.MODEL: fingerprint, Input.TEXT: blocks.fingerprint})
    work = {"model": identity(folder), "text": blocks.fingerprint, "settings": settings.model_dump(mode="json")}
    with resumable(output, __name__, device, **work) as steps:
        file = LogitsFile(
            steps.folder / "logits.safetensors",
            blocks=len(blocks),
            length=blocks.length,
            vocabulary=vocabulary_of(folder),
            dtype=loaded_dtype(folder, settings.dtype),
        )
        why = _not_stored(file, settings.predictions_gb, output)
        if why is not None:
            log.info("the logits are not stored: %s", why)
        stored = file if why is None else None
        done = with_models(
            [folder], settings.dtype, blocks.length, device, lambda models: _predicted(models[0], blocks, stored, steps)
        )
        if stored is not None:
            os.replace(stored.path, logits_beside(output))
        else:
            logits_beside(output).unlink(missing_ok=True)
        record = PredictionsRecord(
            evaluation=output.stem,
            fingerprint=fingerprint,
            text_fingerprint=blocks.fingerprint,
            blocks=len(blocks),
            length=blocks.length,
            vocabulary=file.vocabulary,
            asked_dtype=settings.dtype,
            dtype=dtype_name(file.dtype),
            block_means=tuple(block.loss for block in done),
            logits_bytes=file.bytes,
            hashes=None if stored is None else tuple(block.sha256 or "" for block in done),
            not_stored=why,
            seconds=steps.seconds(),
            peak_memory_bytes=peak_memory_bytes(device),
            made_by=made,
            machine=current_machine(device),
        )
        record.write(output)
    return record


def fitting(
    path: Path, blocks: Blocks, vocabulary: int, settings: EvaluationSettings, fingerprint: str | None
) -> PredictionsRecord:
    """The record in `path`, if it is of this text and dtype, of as many logits, and of the model with `fingerprint`.

    A fingerprint of None, like one that the record does not have, fits every model. Raises ArmorError.
    """
    record = PredictionsRecord.read(path)
    pairs = {
        "text (SHA-256 of the tokens)": (record.text_fingerprint, blocks.fingerprint),
        "logits for a token": (record.vocabulary, vocabulary),
        "dtype": (record.asked_dtype, settings.dtype),
        "dense model": (record.fingerprint, fingerprint or record.fingerprint),
    }
    for what, (found, expected) in pairs.items():
        if found is not None and found != expected:
            raise ArmorError(f"{path}: {what}: found {found}, expected {expected}; run armor predict again")
    return record


@torch.inference_mode()
def _predicted(model: Model, blocks: Blocks, file: LogitsFile | None, steps: Steps) -> list[_Predicted]:
    """What is known of each block; those that are not done yet are run, and their logits appended to `file`."""
    done = _done(steps, len(blocks), file)
    logits = logits_of(model, blocks.tokens[len(done) :])
    for index in progress(range(len(done), len(blocks)), "predictions", unit="block"):
        values = next(logits)
        losses = finite(token_losses(values, blocks.tokens[index].to(values.device)), model, index)
        sha256 = None if file is None else file.append(index, values)
        del values  # before the next ones are made
        done.append(_Predicted(loss=losses.double().mean().item(), sha256=sha256))
        steps.put(str(index), done[-1])
    return done


def _done(steps: Steps, count: int, file: LogitsFile | None) -> list[_Predicted]:
    """The leading blocks that are finished, with their logits in `file` if they go there."""
    done: list[_Predicted] = []
    whole = count if file is None else file.whole_blocks()
    while len(done) < whole and (found := steps.get(str(len(done)), _Predicted)):
        if file is not None and found.sha256 is None:
            break
        done.append(found)
    return done


def _not_stored(file: LogitsFile, limit_gb: float, output: Path) -> str | None:
    """Why the logits cannot be stored; None if they can."""
    size = file.bytes / 1e9
    if size > limit_gb:
        return f"they take {size:.3g} GB, predictions_gb is {limit_gb:.3g}"
    free = shutil.disk_usage(output.parent).free
    written = file.path.stat().st_size if file.path.is_file() else 0
    if file.bytes - written > SHARE_OF_DISK * free:
        return f"they take {size:.3g} GB, {free / 1e9:.3g} GB of the disk are free"
    return None
