"""Perplexity on blocks of text: how many tokens, on average, the model is still choosing between.

perplexity = exp(m), where m is the mean negative log-likelihood of all n·(L−1) predictions (`armor.evaluate.logits`).
Tokens of one block depend on each other and blocks hardly do. So the standard error comes from the block means. That of
m is s/√n with s their standard deviation, and the delta method makes it perplexity·s/√n. A run that was killed goes on
at the block where it was (`armor.execution.resume`).

A compressed model is also compared to its dense one at every prediction: KL(dense ‖ compressed) in nats, and whether
both find the same token the most likely. These see every change of the predictions, also one that helps as often as it
hurts, and so show a loss long before perplexity does. The dense model's logits are those that `armor predict` stored.
Without them the dense model is run on each block in turn, at the price of two models in memory and its time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from armor.config.measures import EvaluationSettings
from armor.core.errors import ArmorError
from armor.core.typed import Typed
from armor.evaluate.logits import (
    Model,
    blocks_of,
    comparison,
    finite,
    logits_of,
    token_losses,
    vocabulary_of,
    with_models,
)
from armor.evaluate.predictions import fitting
from armor.execution.log import log, progress
from armor.execution.machine import current_machine, peak_memory_bytes
from armor.execution.resume import Steps, identity, resumable
from armor.format.logits import read_logits
from armor.format.names import logits_beside
from armor.format.provenance import combined, made_by
from armor.format.records.base import Input, MadeBy
from armor.format.records.evaluation import AgainstDense, EvaluationRecord, Mean
from armor.format.records.predictions import PredictionsRecord
from armor.runtime.folder import load_tokenizer
from armor.text.reading import Blocks

__all__ = ["BlockMeans", "evaluate", "mean", "measure", "perplexity"]

Stored = Callable[[Iterable[int]], Iterator[Tensor]]
"""From numbers of blocks to the dense model's logits of these."""


class BlockMeans(Typed):
    """The means over the predictions of one block: loss and, beside a dense model, KL in nats and agreement."""

    loss: float
    kl: float | None = None
    top1: float | None = None


def mean(block_means: Sequence[float]) -> tuple[float, float | None]:
    """The mean over blocks and its standard error (None for a single block), from the mean of each block."""
    means = torch.tensor(block_means, dtype=torch.float64)
    return means.mean().item(), means.std().item() / math.sqrt(len(means)) if len(means) > 1 else None


def perplexity(block_means: Sequence[float]) -> tuple[float, float | None]:
    """Perplexity and its standard error (None for a single block) from the mean loss of each block, in nats."""
    loss, error = mean(block_means)
    return math.exp(loss), None if error is None else math.exp(loss) * error


def evaluate(
    folder: Path | str,
    settings: EvaluationSettings,
    output: Path | str,
    device: str = "cpu",
    dense: Path | str | None = None,
    predictions: Path | str | None = None,
    fingerprint: str | None = None,
    dense_fingerprint: str | None = None,
) -> EvaluationRecord:
    """Measure the perplexity of the model in `folder` (dense or ARMOR); write `output`, evaluation/{evaluation}.json.

    It is compared to the model in the folder `dense`, by the logits beside the record `predictions` if that is given
    and they are there. With `predictions` of the model itself its losses are taken from there, and no model is run. The
    fingerprints of both are noted, and held against `predictions`. Raises ArmorError for a folder that is not a model,
    a dense one of other tokens, predictions of other things, or a text too short. So it does for a device with too
    little memory, and for logits that are not finite.
    """
    start = time.monotonic()
    folder, output = Path(folder), Path(output)
    if dense is not None:
        dense = Path(dense)
        _check_same_tokens(folder, dense)
    blocks = blocks_of(folder, settings)
    inputs = {Input.MODEL: fingerprint, Input.TEXT: blocks.fingerprint}
    known = None
    if predictions is not None:
        predictions = Path(predictions)
        known = fitting(predictions, blocks, vocabulary_of(folder), settings, dense_fingerprint)
        own = known.fingerprint is not None and known.fingerprint == fingerprint
        if own and dense is None:
            means = [BlockMeans(loss=loss) for loss in known.block_means]
            made = made_by(__name__, settings, inputs)
            return _write(output, made, blocks, means, device, time.monotonic() - start)
        dense_fingerprint = known.fingerprint
    if dense is not None or known is not None:
        inputs[Input.DENSE] = dense_fingerprint
    made = made_by(__name__, settings, inputs)
    stored = known if known is not None and _has_logits(known, Path(predictions or "")) else None
    if known is not None and stored is None:
        why = known.not_stored or "they were removed"
        if dense is None:
            raise ArmorError(f"{predictions}: without logits ({why}); name the dense model with --dense")
        log.info("%s: without logits (%s), so the dense model is run too", predictions, why)
    folders = [folder] if stored is not None or dense is None else [folder, dense]
    held: object = combined(stored.hashes) if stored is not None and stored.hashes else dense and identity(dense)
    work = {
        "model": identity(folder),
        "dense": held,
        "text": blocks.fingerprint,
        "settings": settings.model_dump(mode="json"),
    }
    with resumable(output, __name__, device, **work) as steps:
        means = with_models(
            folders,
            settings.dtype,
            blocks.length,
            device,
            lambda models: measure(models, blocks, steps, _reader(stored, predictions)),
            more=0 if stored is None else stored.logits_bytes // stored.blocks,
        )
        return _write(output, made, blocks, means, device, steps.seconds())


@torch.inference_mode()
def measure(models: Sequence[Model], blocks: Blocks, steps: Steps, stored: Stored | None = None) -> list[BlockMeans]:
    """The means of each block: of the first of `models`, beside the second, or beside the logits that are `stored`.

    Raises ArmorError on logits that are not finite.
    """
    model = models[0]
    todo = [index for index in range(len(blocks)) if steps.get(str(index), BlockMeans) is None]
    texts = [blocks.tokens[index] for index in todo]
    own = logits_of(model, texts)
    others = stored(todo) if stored is not None else logits_of(models[1], texts) if len(models) > 1 else None
    found = []
    for index in progress(range(len(blocks)), "perplexity", unit="block"):
        known = steps.get(str(index), BlockMeans)
        if known is None:
            logits = next(own)
            loss = _mean(finite(token_losses(logits, blocks.tokens[index].to(logits.device)), model, index))
            kl = top1 = None
            if others is not None:
                divergences, same = comparison(logits, next(others).to(logits.device))
                kl, top1 = _mean(finite(divergences, models[-1], index)), _mean(same)
            del logits  # before the next ones are made
            known = BlockMeans(loss=loss, kl=kl, top1=top1)
            steps.put(str(index), known)
        found.append(known)
    return found


def _has_logits(record: PredictionsRecord, path: Path) -> bool:
    return record.hashes is not None and logits_beside(path).is_file()


def _reader(stored: PredictionsRecord | None, predictions: Path | None) -> Stored | None:
    """How to read the logits that belong to the record `stored` in the file `predictions`."""
    if stored is None or predictions is None:
        return None
    path, hashes = logits_beside(predictions), stored.hashes or ()
    return lambda wanted: read_logits(path, hashes, wanted)


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _write(
    output: Path,
    made: MadeBy,
    blocks: Blocks,
    means: Sequence[BlockMeans],
    device: str,
    seconds: float,
) -> EvaluationRecord:
    """Write the record of what was measured, by block."""
    losses = tuple(block.loss for block in means)
    value, error = perplexity(losses)
    against = None
    kl = [block.kl for block in means if block.kl is not None]
    top1 = [block.top1 for block in means if block.top1 is not None]
    if len(kl) == len(means):
        against = AgainstDense(kl=_summary(kl), top1=_summary(top1))
    record = EvaluationRecord(
        evaluation=output.stem,
        value=value,
        standard_error=error,
        tokens=len(blocks) * (blocks.length - 1),
        blocks=len(blocks),
        length=blocks.length,
        text_fingerprint=blocks.fingerprint,
        block_means=losses,
        against_dense=against,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(device),
        made_by=made,
        machine=current_machine(device),
    )
    record.write(output)
    return record


def _summary(block_means: Sequence[float]) -> Mean:
    value, error = mean(block_means)
    return Mean(value=value, standard_error=error, block_means=tuple(block_means))


def _check_same_tokens(folder: Path, dense: Path) -> None:
    """Raise ArmorError unless both models predict the same tokens: else their predictions do not compare."""
    own, other = (load_tokenizer(path).get_vocab() for path in (folder, dense))
    sizes = [vocabulary_of(path) for path in (folder, dense)]
    if own != other or sizes[0] != sizes[1]:
        raise ArmorError(
            f"{folder}: its vocabulary ({len(own)} tokens, {sizes[0]} logits) is not that of the dense model {dense} "
            f"({len(other)} tokens, {sizes[1]} logits), so they do not compare; name the model that it was made from"
        )
