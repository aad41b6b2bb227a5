"""Refine one decoder layer: A, S on its mask, B, U, V, norms and biases, until its output is close to the dense one's.

The solver's loss sees one linear; what errors add up to over the linears of a layer, and over layers, it cannot see.
Here the whole layer is trained on what its output misses (`output_error`), and all that is in memory is the layer.

With `inputs: dense` a layer gets what the dense model has at its place: layers do not wait for each other, and fan out
like factorization. With `inputs: compressed` it gets what the refined layers before make of the text, and learns to
mend what they lost. Layers then come one after the other. The states between them are kept beside the factors, hidden,
only until the next layer is done. Where they are missing, the layers before are run once more.

The promise: the output error on the held-out sequences, of the layer as stored, is never above that of the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from armor.config.sample import Sample
from armor.config.training import RefineJob, RefineSettings
from armor.core.errors import ArmorError
from armor.execution.files import open_safetensors, room_for, sha256
from armor.execution.fingerprint import code_hash
from armor.execution.log import log
from armor.execution.machine import device_memory_bytes, enough_memory
from armor.execution.resume import Steps, resumable
from armor.format.factors import read_start
from armor.format.names import beside, layer_file, record_beside
from armor.format.provenance import combined, made_by, text_files
from armor.format.records.base import Input
from armor.format.records.layer import LayerRecord
from armor.format.records.states import StatesRecord
from armor.format.records.topology import Topology
from armor.format.shards import Shards
from armor.format.states import FEWER, open_states, states_file, write_states
from armor.format.statistics import read_statistics
from armor.model.source import Source
from armor.model.tensors import recorded_tensors
from armor.runtime.calls import Call, State, moved, observe, observe_each, states_of
from armor.runtime.filling import drop_layer, load_outside, unload_outside
from armor.runtime.skeleton import Skeleton, open_skeleton, tensors_of
from armor.training.fit import Fit, fit
from armor.training.memory import factor_shapes, refine_bytes
from armor.training.record import described, write_trained
from armor.training.states import TOKENS
from armor.training.trainable import TrainableLayer, load_trainable, multiplied_once, training_arithmetic

__all__ = ["fit_layer", "output_error", "refine_layer"]


class Rows(Protocol):
    """States before a decoder layer, by sequence."""

    def row(self, index: int) -> State:
        """That of one: hidden states (1, length, hidden), and what is carried with them."""
        ...


def refine_layer(
    source: Source,
    topology: Topology,
    layer: int,
    factors: Path | str,
    states: Path | str,
    statistics: Path | str,
    settings: RefineJob,
    output: Path | str,
    device: str = "cpu",
) -> LayerRecord:
    """Train decoder layer `layer` from the `factors` (layer_{k}.safetensors) into `output`, then the JSON beside it.

    `states` is states.json, the states in the folder of its name; `statistics` the layer's file from calibration, for
    the proxy loss that the record has beside the output error. With compressed inputs the refined layers before lie
    beside `output`. Raises ArmorError for factors, states or statistics that are missing or of another model, and for a
    device with too little memory.
    """
    factors, output, states = Path(factors), Path(output), Path(states)
    source.check(topology.fingerprint)
    start = read_start(factors, topology.fingerprint)
    known, folder = _read_states(states, source, settings.sample, output), beside(states)
    inputs = read_statistics(statistics, topology.fingerprint, gram=False)
    stored = recorded_tensors(source.path, start.modules)
    _check_memory(stored, topology.layers[layer].prefix, factors, settings.refine.core, known.length, device)
    chained = settings.refine.inputs == "compressed"
    earlier = [record_beside(layer_file(output.parent, k)) for k in range(layer)] if chained else []
    before = [LayerRecord.read(file).sha256 for file in earlier]
    used = {
        Input.MODEL: topology.fingerprint,
        Input.LAYER.format(layer): start.sha256,
        Input.STATES: known.text_fingerprint,
        Input.STATISTICS: sha256(statistics),
        **({Input.BEFORE: combined(before)} if chained else {}),
    }
    made = made_by(__name__, settings, used)
    work = {"used": used, "dtype": known.dtype, "settings": settings.model_dump(mode="json")}
    with resumable(output, __name__, device, **work) as steps:
        skeleton = open_skeleton(source.path, torch.float32)
        shards = tensors_of(skeleton, source.path)
        load_outside(skeleton, shards)
        with open_safetensors(folder / TOKENS) as file:
            tokens = file.get_tensor("tokens")
        likes = [moved(s, "meta", getattr(torch, known.dtype)) for s in states_of(*observe(skeleton, tokens[:1]))]
        chain = _Chain(folder, output.parent, known, before)
        first = chain.first(layer) if chained else layer
        calls = _calls(skeleton, tokens, range(first, layer + 1))
        unload_outside(skeleton)
        training = found = None
        where = topology.layers[layer].prefix
        with enough_memory(where, device, "lower sequence_length"):
            path = states_file(folder, layer)
            if chained:
                path = chain.run(first, layer, skeleton, shards, calls, likes, device)
            trainable = load_trainable(skeleton, layer, shards, factors, device, settings.refine.core)
            if trainable.linears:
                fed, wanted, own = open_states(path), open_states(states_file(folder, layer + 1)), calls[layer]
                found = fit_layer(
                    trainable, fed, wanted, own, settings.refine, settings.seed, where, source.dtype, device, steps
                )
        if found:
            losses = {name: start.modules[name].loss for name in trainable.linears}
            called = settings.sample.text.called()
            training = described("refine", settings.refine, found, trainable, known.length, called, losses, made)
        record = write_trained(
            output,
            start,
            *trainable.stored(),
            inputs,
            stored,
            training,
            made,
            steps.seconds(),
            [device],
        )
        if layer == len(topology.layers) - 1:
            chain.clear()
    return record


def _calls(skeleton: Skeleton, tokens: Tensor, layers: range) -> dict[int, list[Call]]:
    """What each of these decoder layers is called with, by sequence."""
    found: dict[int, list[Call]] = {index: [] for index in layers}
    for _, calls in observe_each(skeleton, tokens):
        for index, own in found.items():
            own.append(calls[index])
    return found


def _read_states(file: Path, source: Source, sample: Sample, output: Path) -> StatesRecord:
    """The record of states, held against what `output` is to be trained on. Raises ArmorError if they are not that."""
    known, folder = StatesRecord.read(file), beside(file)
    if known.fingerprint != source.fingerprint:
        raise ArmorError(f"{file}: of another model than {source.path}; run armor states again")
    if known.made_by.code != code_hash("armor.training.states"):
        raise ArmorError(f"{file}: made by other code than today's; delete it and its folder, and run again")
    if known.sequences != sample.sequences:
        raise ArmorError(
            f"{file}: found {known.sequences} sequences, expected {sample.sequences} with the held-out ones; run armor "
            "states again"
        )
    if not _is_of(known, sample):
        raise ArmorError(f"{file}: of another text than is asked for; delete it and its folder, and run again")
    if not (folder / TOKENS).is_file():
        raise ArmorError(
            f"{folder}: not there, it is made for a run and deleted after; ask Snakemake for all layers, that is "
            f"{output.parent}.json, or run armor states again"
        )
    return known


def _is_of(states: StatesRecord, sample: Sample) -> bool:
    """Whether states are of the text that `sample` asks for; of local files the content counts, not the place."""
    made, files = Sample.model_validate(states.made_by.settings), text_files(sample)
    if files:
        made, sample = (each.replace(text=each.text.without_files()) for each in (made, sample))
    return made == sample and (files is None or states.made_by.inputs.get(Input.TEXT_FILES) == files)


def _check_memory(shards: Shards, prefix: str, factors: Path, core: bool, length: int, device: str) -> None:
    """Refuse a device that cannot hold the layer while it is trained."""
    needed, available = refine_bytes(shards, prefix, factor_shapes(factors), core, length), device_memory_bytes(device)
    if available is not None and needed > available:
        raise ArmorError(
            f"{prefix}: refining it on sequences of {length} tokens needs about {needed / 1e9:.1f} GB, {device} has "
            f"{available / 1e9:.1f} GB; lower sequence_length, or refine with --gpus 0 (gpu=0)"
        )


def fit_layer(
    layer: TrainableLayer,
    fed: Rows,
    wanted: Rows,
    calls: Sequence[Call],
    settings: RefineSettings,
    seed: int,
    where: str,
    dtype: str,
    device: str,
    steps: Steps | None = None,
) -> Fit:
    """Train `layer` until what it makes of the states `fed` is close to those `wanted`, by sequence.

    `calls` are what it is called with beside the states. `dtype` is the model's.
    """

    def error(index: int) -> Tensor:
        """What the output misses on one sequence."""
        call = calls[index].map(lambda tensor: tensor.to(device))
        output, *_ = call.run(layer.module, moved(fed.row(index), device, torch.float32))
        return output_error(output, wanted.row(index)[0].to(device))

    return fit(
        layer.parameters(),
        layer.dtypes,
        settings,
        loss=error,
        dtype=dtype,
        device=device,
        seed=seed,
        where=where,
        steps=steps,
        once=layer.linears.values(),
    )


def output_error(output: Tensor, wanted: Tensor) -> Tensor:
    """What a decoder layer's `output` misses of the dense one's, both (..., length, hidden); a float32 scalar.

    Of each token the square of its error by its own square, then the mean over tokens: whatever reads a state next is a
    norm, which divides by its size. Without that one token decides: in many models the first one's state is a hundred
    times as large as the others' (Sun et al. 2024, arXiv 2402.17762).
    """
    wanted = wanted.float()
    squares = wanted.square().mean(-1).clamp_min(1e-12)
    return ((output.float() - wanted).square().mean(-1) / squares).mean()


class _Chain:
    """What the refined layers make of the text, in hidden files in their folder until the next layer is done.

    Each file says which layers made it; one of other layers does not count. Before layer 0 it is the dense states.
    """

    def __init__(self, dense: Path, refined: Path, known: StatesRecord, before: list[str]) -> None:
        """`known` describes the states in the folder `dense`; `before` are the hashes of the layers in `refined`."""
        self.dense, self.refined, self.known, self.before = dense, refined, known, before

    def file(self, index: int) -> Path:
        return self.refined / f".states_{index}.safetensors" if index else states_file(self.dense, 0)

    def about(self, index: int) -> str:
        return combined([self.known.text_fingerprint, str(self.known.length), *self.before[:index]])

    def first(self, layer: int) -> int:
        """The last layer up to `layer` whose states are there."""
        return next((k for k in range(layer, 0, -1) if _is_about(self.file(k), self.about(k))), 0)

    def clear(self, but: int = 0) -> None:
        """Delete all states that are kept, but those of layer `but`."""
        for old in self.refined.glob(".states_*.safetensors"):
            if old != self.file(but):
                old.unlink()

    @torch.no_grad()
    def run(
        self,
        first: int,
        layer: int,
        skeleton: Skeleton,
        shards: Shards,
        calls: dict[int, list[Call]],
        likes: list[State],
        device: str,
    ) -> Path:
        """The file of the states before `layer`, made by running the refined layers from `first` on.

        `calls` are those of each of these layers, by sequence; `likes` what the states of each are like.
        """
        self.clear(but=first)
        if first < layer:  # what goes into a layer is deleted behind it, but for the dense states
            at_once = 1 if first else min(layer, 2)
            room_for(at_once * self.known.bytes // len(likes), self.refined, "hidden states", FEWER)
        if layer - first > 1:
            log.info("running layers %d to %d once more, for what goes into layer %d", first, layer - 1, layer)
        for index in range(first, layer):
            trained = load_trainable(skeleton, index, shards, layer_file(self.refined, index), device)
            states, target, about = open_states(self.file(index)), self.file(index + 1), self.about(index + 1)
            with (
                write_states(target, likes[index + 1], self.known.sequences, about) as writer,
                training_arithmetic(device),
                multiplied_once(trained.linears.values()),
            ):
                for number, call in enumerate(calls[index]):
                    call = call.map(lambda tensor: tensor.to(device))
                    writer.add(call.run(trained.module, moved(states.row(number), device, torch.float32)))
            drop_layer(trained.module)
            if index:
                self.file(index).unlink()
        return self.file(layer)


def _is_about(path: Path, about: str) -> bool:
    return path.is_file() and open_states(path).about == about
