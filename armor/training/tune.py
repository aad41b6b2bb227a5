"""Tune the whole: A, S on its mask, B, U, V, norms and biases of all layers, by KL divergence from the dense model.

First the dense model predicts every token of the text, one decoder layer in memory at a time. Of each prediction the
most likely tokens are kept with their log-probabilities. All others are one more outcome, whose probability is exact. A
vocabulary of no more tokens than that is kept whole. The KL divergence between two predictions over these outcomes is
never above that over all tokens, and it is zero where both agree.

Then the compressed model is trained: values in float32, products in bfloat16 where that is native. Where memory is not
plenty, each decoder layer is run again when its gradient is due. So the inside of one layer at a time is there. With
Adam's two moments and the gradient a kept value of S takes 16 bytes, and half of them are kept: 8 bytes a weight, four
times a dense bfloat16 one. The best values so far wait on the host. Of several devices each has some of the layers and
hands the states on. A model that does not fit is refused.

The promise is that of refine, for the whole. The KL divergence on the held-out sequences, of the model as stored, is
never above that of the start.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from armor.config.training import TuneJob, TuneSettings
from armor.core.errors import ArmorError
from armor.execution.files import open_safetensors, save_safetensors
from armor.execution.machine import (
    USABLE,
    device_memory_bytes,
    enough_memory,
    host_memory_bytes,
)
from armor.execution.resume import Done, Steps, resumable
from armor.format.factors import read_start
from armor.format.names import beside, layer_file
from armor.format.provenance import made_by
from armor.format.records.base import Input, MadeBy
from armor.format.records.calibration import CalibrationRecord
from armor.format.records.layer import LayerRecord
from armor.format.records.topology import Topology
from armor.format.records.tune import KEPT_TOKENS, TuneRecord
from armor.format.statistics import read_statistics
from armor.model.source import Source
from armor.model.tensors import recorded_tensors
from armor.runtime.filling import load_outside, place_outside
from armor.runtime.skeleton import compute_dtype, open_skeleton, tensors_of
from armor.runtime.streamed import StreamedModel
from armor.text.reading import read_blocks
from armor.training.fit import Fit, fit
from armor.training.memory import best_bytes, factor_shapes, predictions_bytes, tune_bytes
from armor.training.record import described, write_trained
from armor.training.spread import hand_on, leased
from armor.training.trainable import TrainableLayer, load_trainable, stored_arithmetic, training_arithmetic

__all__ = ["Predictions", "fit_whole", "kept_predictions", "kl_divergence", "tune"]

TOKENS_AT_A_TIME = 128
PREDICTED = "predictions"
"""The step that is done when the dense model's predictions are on disk."""
ROOMY = 0.5  # of the memory: what may be taken to save time


def tune(
    source: Source,
    topology: Topology,
    factors: Path | str,
    calibration: Path | str,
    settings: TuneJob,
    output: Path | str,
    device: str = "cpu",
) -> TuneRecord:
    """Train all layers from the `factors` in that folder into the folder beside `output` (tuned.json), then `output`.

    `calibration` is its record, for the proxy losses in the layers' records. Raises ArmorError for factors that
    are missing or of another model, a text that is too short, and where the model does not fit into the memory.
    """
    factors, calibration, output = Path(factors), Path(calibration), Path(output)
    source.check(topology.fingerprint)
    files = [layer_file(factors, layer.index) for layer in topology.layers]
    starts = [read_start(file, topology.fingerprint) for file in files]
    stored = recorded_tensors(source.path, (name for start in starts for name in start.modules))
    devices, shapes = leased(device), [factor_shapes(file) for file in files]
    if not any(linear.pattern for start in starts for linear in start.modules.values()):
        raise ArmorError(f"{factors}: all linears are dense, so there is nothing to tune; leave tune out")
    sample = settings.sample
    text = read_blocks(source.path, sample.text, sample.sequences, sample.sequence_length)
    tokens = text.tokens
    placed = partial(tune_bytes, stored, shapes, settings.tune.core, tokens.shape[1], devices=len(devices))
    (places, needed), (roomy, most) = placed(recompute=True), placed(recompute=False)
    on_host, host = best_bytes(shapes, settings.tune.core) + predictions_bytes(tokens.numel()), host_memory_bytes()
    available = min(device_memory_bytes(one) or host for one in devices)
    if device_memory_bytes(device) is None:
        needed, most = needed + on_host, most + on_host
    elif on_host > USABLE * host:
        raise ArmorError(
            f"{source.path}: tuning the whole model keeps about {on_host / 1e9:.1f} GB on the host, which has "
            f"{host / 1e9:.1f} GB; refine its layers instead, set core: false, or take fewer sequences"
        )
    if needed > USABLE * available:
        where = f"{device} has" if len(devices) == 1 else f"on the fullest of {len(devices)} devices; the smallest has"
        raise ArmorError(
            f"{source.path}: tuning the whole model needs about {needed / 1e9:.1f} GB, {where} "
            f"{available / 1e9:.1f} GB; refine its layers instead, set core: false, or take larger or more devices"
        )
    used = {
        Input.MODEL: topology.fingerprint,
        Input.TEXT: text.fingerprint,
        Input.STATISTICS: CalibrationRecord.read(calibration).statistics_fingerprint,
        **{Input.LAYER.format(start.layer): start.sha256 for start in starts},
    }
    made = made_by(__name__, settings, used)
    again = most > ROOMY * available  # by rounding it decides about bytes too
    on = [devices[place] for place in (places if again else roomy)]
    work = {"used": used, "settings": settings.model_dump(mode="json"), "recompute": again}
    with resumable(output, __name__, device, **work) as steps:
        with enough_memory(str(source.path), device, "lower sequence_length", "refine its layers instead"):
            predictions = _predictions(source, tokens, settings.tune.sequences, steps, device)
            model, layers = _trainable_model(source, files, settings.tune, on, device)
            found = fit_whole(
                model, layers, tokens, predictions, settings.tune, settings.seed, source.dtype, device, steps, again
            )
        part = steps.folder / "tuned"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        numbers = sum(p.numel() for layer in layers for p in layer.parameters().values())
        written, called = [], sample.text.called()
        for start, layer in zip(starts, layers, strict=True):
            inputs, trained = (layer_file(place, start.layer) for place in (calibration.parent, part))
            statistics = read_statistics(inputs, topology.fingerprint, gram=False)
            losses = {name: start.modules[name].loss for name in layer.linears}
            training = described("tune", settings.tune, found, layer, tokens.shape[1], called, losses, made, numbers)
            seconds = steps.seconds() / len(layers)  # a layer's share: a report sums them up
            written.append(
                write_trained(trained, start, *layer.stored(), statistics, stored, training, made, seconds, devices)
            )
        output.unlink(missing_ok=True)  # an old JSON must never stand beside new factors
        folder = beside(output)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
        record = _record(written, predictions, made, steps)
        record.write(output)
    return record


def _record(
    written: list[LayerRecord],
    predictions: Predictions,
    made: MadeBy,
    steps: Steps,
) -> TuneRecord:
    names = tuple(sorted(name for record in written for name in record.training[-1].norms_and_biases))
    losses = {name: loss for record in written for name, loss in record.training[-1].proxy_losses.items()}
    rounded = any(record.training[-1].rounded for record in written)
    whole = written[0].training[-1].replace(rounded=rounded, norms_and_biases=names, proxy_losses=losses)
    return TuneRecord(
        fingerprint=written[0].fingerprint,
        sha256=tuple(record.sha256 for record in written),
        kept_tokens=predictions.tokens.shape[-1],
        training=whole,
        made_by=made,
        machine=written[0].machine,
        seconds=steps.seconds(),
        peak_memory_bytes=max(record.peak_memory_bytes for record in written),
    )


def _predictions(source: Source, tokens: Tensor, trained: int, steps: Steps, device: str) -> Predictions:
    """What the dense model predicts, kept on disk for the next run.

    Of the first `trained` sequences in the arithmetic of training, which is the faster one; of the others exactly.
    """
    file = steps.folder / "predictions.safetensors"
    if steps.get(PREDICTED, Done) is None or not file.is_file():
        dtype = compute_dtype(source.dtype, device)
        model = StreamedModel(open_skeleton(source.path, dtype), source.path, dtype, device)
        parts = []
        for rows, how in (
            (tokens[:trained], training_arithmetic(device)),
            (tokens[trained:], stored_arithmetic(source.dtype, device)),
        ):
            with how:
                logits = model.logits(row[None].to(device) for row in rows)
                parts.append(vars(kept_predictions(one[0] for one in logits)))
        save_safetensors(file, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        steps.put(PREDICTED, Done())
    with open_safetensors(file) as opened:
        return Predictions(*(opened.get_tensor(field.name) for field in fields(Predictions)))


@dataclass(frozen=True)
class Predictions:
    """The most likely tokens of every prediction of the dense model.

    tokens (sequences, length, kept) int32; log_probabilities (sequences, length, kept + 1) float32, the last of them
    that of all other tokens together.
    """

    tokens: Tensor
    log_probabilities: Tensor


def kept_predictions(logits: Iterator[Tensor]) -> Predictions:
    """What is kept of the dense model's predictions, from the logits (length, vocabulary) of each sequence."""
    kept_tokens, kept = [], []
    for sequence in logits:
        pieces = []
        for piece in sequence.split(TOKENS_AT_A_TIME):
            top = piece.topk(min(KEPT_TOKENS, piece.shape[-1]), dim=-1)
            logs = top.values.double() - piece.double().logsumexp(-1, keepdim=True)
            pieces.append((top.indices.int(), torch.cat([logs, _rest(logs)], -1).float()))
        kept_tokens.append(torch.cat([tokens for tokens, _ in pieces]).cpu())
        kept.append(torch.cat([logs for _, logs in pieces]).cpu())
    return Predictions(torch.stack(kept_tokens), torch.stack(kept))


def kl_divergence(logits: Tensor, tokens: Tensor, log_probabilities: Tensor) -> Tensor:
    """KL(dense ‖ compressed) in nats of every prediction, (length,) float32, over the kept tokens and the rest.

    logits (length, vocabulary) of the compressed model, any float dtype; the dense one's as in `Predictions`.
    """
    logits = logits.float()
    own = logits.gather(-1, tokens.long()) - logits.logsumexp(-1, keepdim=True)
    if tokens.shape[-1] < logits.shape[-1]:
        own = torch.cat([own, _rest(own)], -1)
    dense = log_probabilities[:, : own.shape[-1]]
    return (dense.exp() * (dense - own)).sum(-1)


def _rest(logs: Tensor) -> Tensor:
    """The log-probability (length, 1) of all tokens but those of the log-probabilities (length, kept)."""
    others = -torch.expm1(logs.logsumexp(-1, keepdim=True))
    return others.clamp(min=torch.finfo(logs.dtype).eps).log()


def _trainable_model(
    source: Source, files: Sequence[Path], settings: TuneSettings, places: Sequence[str], home: str
) -> tuple[PreTrainedModel, list[TrainableLayer]]:
    """The compressed model in float32 ready to be trained, each layer on the device in `places`, all else at `home`."""
    skeleton = open_skeleton(source.path, torch.float32)
    shards = tensors_of(skeleton, source.path)
    load_outside(skeleton, shards, head=True)
    place_outside(skeleton, home)
    layers = [
        load_trainable(skeleton, index, shards, file, place, settings.core)
        for index, (file, place) in enumerate(zip(files, places, strict=True))
    ]
    hand_on([layer.module for layer in layers], places, home)
    return skeleton.model, layers


def fit_whole(
    model: PreTrainedModel,
    layers: Sequence[TrainableLayer],
    tokens: Tensor,
    predictions: Predictions,
    settings: TuneSettings,
    seed: int,
    dtype: str,
    device: str,
    steps: Steps | None = None,
    recompute: bool = True,
) -> Fit:
    """Train the `layers` of `model` until it predicts tokens (sequences, length) as the dense model does.

    `dtype` is the model's as it is stored. With `recompute` a layer is run again when its gradient is due, and its
    linears are multiplied out for every sequence: less memory, a quarter more time, the same numbers but for rounding.
    """

    def divergence(index: int) -> Tensor:
        """The mean KL divergence of the predictions of one sequence, float32."""
        logits = model(input_ids=tokens[index : index + 1].to(device), use_cache=False).logits[0]
        kept = (x[index].to(device) for x in (predictions.tokens, predictions.log_probabilities))
        pieces = zip(*(x.split(TOKENS_AT_A_TIME) for x in (logits, *kept)), strict=True)
        return torch.cat([kl_divergence(*piece) for piece in pieces]).mean()

    with _recomputed([layer.module for layer in layers if recompute]):
        parameters: dict[str, nn.Parameter] = {}
        dtypes: dict[str, torch.dtype] = {}
        for layer in layers:
            parameters |= layer.parameters()
            dtypes |= layer.dtypes
        return fit(
            parameters,
            dtypes,
            settings,
            loss=divergence,
            dtype=dtype,
            device=device,
            seed=seed,
            where="tune",
            steps=steps,
            once=[] if recompute else [linear for layer in layers for linear in layer.linears.values()],
        )


@contextmanager
def _recomputed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Each module is run again when its gradient is due, for as long as the context lasts."""
    own = [vars(module).get("forward") for module in modules]  # with what `hand_on` gave it
    for module in modules:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward
