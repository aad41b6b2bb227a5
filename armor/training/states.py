"""The dense model's hidden states before every decoder layer, on the text that layers are refined on.

The model runs one decoder layer at a time, as in calibration. What goes into each layer, and out of the last, is kept:
a file for each, sequences · length · hidden numbers. With them every layer can be refined by itself. They are
temporary: made again when they are needed. The room for all of them is looked for before the first is written.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from armor.config.sample import Sample
from armor.core.errors import ArmorError
from armor.execution.files import room_for, save_safetensors
from armor.execution.log import progress
from armor.execution.machine import current_machine, enough_memory, peak_memory_bytes
from armor.execution.resume import Done, resumable
from armor.format.names import beside, layer_name
from armor.format.provenance import made_by
from armor.format.records.base import Input
from armor.format.records.states import StatesRecord
from armor.format.records.topology import Topology
from armor.format.shards import Shards, dtype_name
from armor.format.states import FEWER, open_states, states_file, write_states
from armor.model.source import Source
from armor.runtime.calls import Call, State, moved, observe, observe_each, states_of
from armor.runtime.filling import drop_layer, finite, load_layer, load_outside, unload_outside
from armor.runtime.skeleton import Skeleton, compute_dtype, open_skeleton, tensors_of
from armor.text.reading import read_blocks

__all__ = ["TOKENS", "make_states", "pass_on"]

TOKENS = "tokens.safetensors"


def make_states(
    source: Source, topology: Topology, sample: Sample, output: Path | str, device: str = "cpu"
) -> StatesRecord:
    """Write the states before every decoder layer, and those after the last, in the folder beside `output` (.json).

    Raises ArmorError for a topology of another model, too little text, a full disk, and NaN or infinity.
    """
    output = Path(output)
    source.check(topology.fingerprint)
    dtype = compute_dtype(source.dtype, device)
    text = read_blocks(source.path, sample.text, sample.sequences, sample.sequence_length)
    tokens = text.tokens
    made = made_by(__name__, sample, {Input.MODEL: source.fingerprint, Input.TEXT: text.fingerprint})
    count = len(topology.layers)
    work = {"fingerprint": source.fingerprint, "text": text.fingerprint, "length": text.length, "dtype": str(dtype)}
    with resumable(output, __name__, device, **work) as steps:
        part = steps.folder / "states"
        part.mkdir(exist_ok=True)
        skeleton = open_skeleton(source.path, dtype)
        shards = tensors_of(skeleton, source.path)
        load_outside(skeleton, shards)
        likes = [moved(state, "meta", dtype) for state in states_of(*observe(skeleton, tokens[:1]))]
        sizes = [len(tokens) * sum(tensor.nbytes for tensor in like) for like in likes]
        done = 0
        while done <= count and steps.get(layer_name(done), Done) and states_file(part, done).is_file():
            done += 1
        room_for(sum(sizes[done:]), part, "hidden states", FEWER)
        if done == 0:
            save_safetensors(part / TOKENS, {"tokens": tokens})
            calls = []
            with write_states(states_file(part, 0), likes[0], len(tokens)) as writer:
                for hidden, of_layers in observe_each(skeleton, tokens):
                    writer.add((hidden,))
                    calls.append(of_layers)
            steps.put(layer_name(0), Done())
        else:
            calls = [of_layers for _, of_layers in observe_each(skeleton, tokens)]
        unload_outside(skeleton)
        amount = tokens.numel() / count
        left = topology.layers[max(done - 1, 0) :]
        for layer in progress(left, "states", unit="layers", amount=amount, amount_unit="tokens"):
            own = [of_layers[layer.index] for of_layers in calls]
            target = states_file(part, layer.index + 1)
            source_file, like = states_file(part, layer.index), likes[layer.index + 1]
            with enough_memory(layer.prefix, device, "lower sequence_length"):
                pass_on(skeleton, layer.index, shards, own, source_file, target, like, device)
            steps.put(layer_name(layer.index + 1), Done())
        output.unlink(missing_ok=True)  # an old JSON must never stand beside new states
        folder = beside(output)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
        record = StatesRecord(
            fingerprint=source.fingerprint,
            text_fingerprint=text.fingerprint,
            sequences=tokens.shape[0],
            length=tokens.shape[1],
            dtype=dtype_name(dtype),
            bytes=sum(sizes),
            seconds=steps.seconds(),
            peak_memory_bytes=peak_memory_bytes(device),
            made_by=made,
            machine=current_machine(device),
        )
        record.write(output)
    return record


@torch.no_grad()
def pass_on(
    skeleton: Skeleton,
    index: int,
    shards: Shards,
    calls: list[Call],
    source: Path,
    target: Path,
    like: State,
    device: str,
) -> None:
    """Run the dense decoder layer `index` on the states in `source`, sequence by sequence, into `target`, as `like`."""
    layer = load_layer(skeleton, index, shards, device)
    states = open_states(source)
    with write_states(target, like, len(calls)) as writer:
        for number, call in enumerate(calls):
            call = call.map(lambda tensor: tensor.to(device))
            state = call.run(layer, moved(states.row(number), device))
            if not finite(state[0]):
                raise ArmorError(
                    f"{skeleton.prefix}.{index}: its output holds NaN or infinity on sequence {number}; the weights or "
                    "the dtype are not fit for this text"
                )
            writer.add(state)
    drop_layer(layer)
