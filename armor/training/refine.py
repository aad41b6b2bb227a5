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

STATES = "armor.training.states"
"""Whose code made what a layer is trained on, and so is held by the hash of a refined layer too."""


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
    start = read_start(factors, topology.fingerprint)
    known = StatesRecord.read(states)
    folder = beside(states)
    if source.fingerprint != topology.fingerprint or known.fingerprint != topology.fingerprint:
        raise ArmorError(f"{states}: of another model than {source.path}; run armor states again")
    if known.made_by.code != code_hash(STATES):
        raise ArmorError(f"{states}: made by other code than today's; delete it and its folder, and run again")
    if known.sequences != settings.sample.sequences:
        raise ArmorError(
            f"{states}: found {known.sequences} sequences, expected {settings.sample.sequences} with the held-out "
            "ones; run armor states again"
        )
    if not _is_of(known, settings.sample):
        raise ArmorError(f"{states}: of another text than is asked for; delete it and its folder, and run again")
    if not (folder / TOKENS).is_file():
        raise ArmorError(
            f"{folder}: not there, it is made for a run and deleted after; ask Snakemake for all layers, that is "
            f"{output.parent}.json, or run armor states again"
        )
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
    made = made_by(__name__, settings, used, also=[STATES])
    work = {"used": used, "dtype": known.dtype, "settings": settings.model_dump(mode="json")}
    with resumable(output, __name__, device, **work) as steps:
        skeleton = open_skeleton(source.path, torch.float32)
        shards = tensors_of(skeleton, source.path)
        load_outside(skeleton, shards)
        with open_safetensors(folder / TOKENS) as file:
            tokens = file.get_tensor("tokens")
        likes = [moved(s, "meta", getattr(torch, known.dtype)) for s in states_of(*observe(skeleton, tokens[:1]))]
        calls = [of_layers for _, of_layers in observe_each(skeleton, tokens)]
        unload_outside(skeleton)
        run = _Run(skeleton, shards, calls, likes, device)
        own = [call[layer] for call in calls]
        training = found = None
        where = topology.layers[layer].prefix
        with enough_memory(where, device, "lower sequence_length"):
            path = _carried(run, folder, output.parent, layer, known, before) if chained else states_file(folder, layer)
            trainable = load_trainable(skeleton, layer, shards, factors, device, settings.refine.core)
            if trainable.linears:
                fed, wanted = open_states(path), open_states(states_file(folder, layer + 1))
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
            device,
        )
        if chained and layer == len(topology.layers) - 1:
            for left in output.parent.glob(".states_*.safetensors"):
                left.unlink()
    return record


def _is_of(states: StatesRecord, sample: Sample) -> bool:
    """Whether states are of the text that `sample` asks for; of local files the content counts, not the place."""
    made, files = Sample.model_validate(states.made_by.settings), text_files(sample)
    if files:
        made, sample = (each.replace(text=each.text.replace(files=None)) for each in (made, sample))
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


class _Run:
    """Refined layers, run to find what goes into the next one."""

    def __init__(
        self,
        skeleton: Skeleton,
        shards: Shards,
        calls: list[list[Call]],
        likes: list[State],
        device: str,
    ) -> None:
        self.skeleton, self.shards, self.calls, self.likes, self.device = skeleton, shards, calls, likes, device

    @torch.no_grad()
    def __call__(self, index: int, factors: Path, source: Path, target: Path, about: str) -> None:
        """Run layer `index` with its `factors` on the states in `source`, into `target`."""
        layer = load_trainable(self.skeleton, index, self.shards, factors, self.device)
        like, count = self.likes[index + 1], len(self.calls)
        states = open_states(source)
        with (
            write_states(target, like, count, about) as writer,
            training_arithmetic(self.device),
            multiplied_once(layer.linears.values()),
        ):
            for number, calls in enumerate(self.calls):
                call = calls[index].map(lambda tensor: tensor.to(self.device))
                writer.add(call.run(layer.module, moved(states.row(number), self.device, torch.float32)))
        drop_layer(layer.module)


def _carried(run: _Run, dense: Path, refined: Path, layer: int, known: StatesRecord, before: list[str]) -> Path:
    """The states that the refined layers before `layer` make of the text: the last ones kept, or made from there.

    Each file says which layers made it; one of other layers does not count. Before layer 0 they are the dense ones.
    """

    def about(index: int) -> str:
        return combined([known.text_fingerprint, *before[:index]])

    def file(index: int) -> Path:
        return refined / f".states_{index}.safetensors" if index else states_file(dense, 0)

    start = next((k for k in range(layer, 0, -1) if _is_about(file(k), about(k))), 0)
    for old in refined.glob(".states_*.safetensors"):
        if old != file(start):
            old.unlink()
    if start < layer:  # what goes into a layer is deleted behind it, but for the dense states
        at_once = 1 if start else min(layer, 2)
        room_for(at_once * known.bytes // (len(run.skeleton.layers) + 1), refined, "hidden states", FEWER)
    if layer - start > 1:
        log.info("running layers %d to %d once more, for what goes into layer %d", start, layer - 1, layer)
    for index in range(start, layer):
        run(index, layer_file(refined, index), file(index), file(index + 1), about(index + 1))
        if index:
            file(index).unlink()
    return file(layer)


def _is_about(path: Path, about: str) -> bool:
    return path.is_file() and open_states(path).about == about
