"""Calibration, streamed: statistics of every linear's input with the weights of one decoder layer in memory at a time.

The model's own forward runs on each token sequence with recorders in place of the decoder layers
(`armor.runtime.calls`), which gives the hidden states before the first layer. Then it goes layer by layer. The
layer's weights are read. The layer runs on the hidden states of every sequence while hooks sum x² of each distinct
input. Its statistics are written. Its output is the next layer's input. So memory holds one layer and the hidden
states, whatever the model's size, and past a limit those are on disk alone. They are on disk in any case, so that a run
that was killed goes on at the layer where it was: `armor.calibrate.hidden` says at what cost.

Computation is in the model's own dtype where the device multiplies in it: on a GPU, and for bfloat16 on a CPU with
AVX-512 BF16 or AMX. Elsewhere on a CPU weights become float32 as they are read. Statistics are always float32 squares
of what the linear is fed, summed in float64. docs/RESULTS.md has how far the two ways are apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from armor.calibrate.hidden import HiddenStates, states_file
from armor.calibrate.routed import Routed, on_sample, run_on_all
from armor.config.sources import CalibrationSettings
from armor.core.errors import ArmorError
from armor.core.typed import Typed
from armor.execution.log import log, progress
from armor.execution.machine import (
    USABLE,
    current_machine,
    device_memory_bytes,
    enough_memory,
    host_memory_bytes,
    peak_memory_bytes,
)
from armor.execution.resume import Steps, resumable
from armor.format.names import layer_file, layer_files
from armor.format.provenance import combined, made_by
from armor.format.records.base import File, Input, MadeBy
from armor.format.records.calibration import CalibrationRecord
from armor.format.records.topology import DecoderLayer, Linear, Topology
from armor.format.shards import dtype_name
from armor.format.statistics import Accumulator, write_statistics
from armor.model.source import Source
from armor.runtime.apart import Apart, Whole
from armor.runtime.calls import Call, State, moved, observe, observe_each, states_of
from armor.runtime.experts import Expert
from armor.runtime.filling import drop_layer, finite, load_layer, load_outside, unload_outside
from armor.runtime.skeleton import Skeleton, compute_dtype, open_skeleton, tensors_of
from armor.text.reading import Blocks, block_length, read_blocks

__all__ = ["calibrate", "is_apart", "peak_bytes"]


def peak_bytes(topology: Topology, length: int, dtype: torch.dtype, gram: bool, apart: bool = False) -> int:
    """The memory that calibration takes on its device at the peak, with one sequence of `length` tokens, from shapes.

    It is made of one decoder layer and its sums; the layer has a single expert if they are read `apart`. Of the tokens
    it has the residual stream, its copy before the layer and the MLP's input. To these comes the largest moment inside.
    That is both factors of the MLP and their product, or this product in float32 with its squares, twice, or with the
    products of a Gram matrix. Inputs of experts have two sums (`Routed`). In the end the sums become means, one by one.
    """
    peaks, size = [0], dtype.itemsize
    for layer in topology.layers:
        weights = (_weights(layer.linears) - (_weights_apart(layer) if apart else 0)) * size
        widths = [group[0].in_features for group in layer.groups()]
        routed = {linear.name for linears in layer.experts().values() for linear in linears}
        squares = [group[0].in_features ** 2 * (2 if group[0].name in routed else 1) for group in layer.groups()]
        sums = 8 * sum(squares) if gram else 0
        factors = max(sum(linear.out_features for linear in group) for group in layer.groups())
        widest, single = max(widths), size + (4 if size < 4 else 0)
        moments = [length * (factors + widest) * size, length * widest * (single + 12)]
        if gram:
            moments.append(length * widest * single + 4 * widest**2)
        peaks.append(weights + sums + length * 3 * topology.hidden_size * size + max(moments))
        peaks.append(sums + (12 * max(widths) ** 2 if gram else 0))
    return max(peaks)


def calibrate(
    source: Source, topology: Topology, settings: CalibrationSettings, output: Path | str, device: str = "cpu"
) -> CalibrationRecord:
    """Write the statistics of every decoder layer, layer_{k}.safetensors beside `output`, the record.

    `output` comes last, with the files' hashes, speed and memory, and is returned. `device` is a torch device.
    Raises ArmorError for a topology of another model, too little text, a device with too little memory, or NaN or
    infinity (it names the module).
    """
    output = Path(output)
    source.check(topology.fingerprint)
    length, dtype = block_length(source.path, settings.sequence_length), compute_dtype(source.dtype, device)
    available, limit = device_memory_bytes(device), settings.hidden_states_memory_gb * 1e9
    if available is not None:
        apart = is_apart(topology, length, dtype, settings.gram, USABLE * available)
        if (needed := peak_bytes(topology, length, dtype, settings.gram, apart)) > available:
            raise ArmorError(
                f"{source.path}: one decoder layer and a sequence of {length} tokens need about {needed / 1e9:.1f} GB, "
                f"{device} has {available / 1e9:.1f} GB; lower sequence_length, or calibrate with --gpus 0 (gpu=0)"
            )
    text = read_blocks(source.path, settings.text, settings.sequences, length)
    tokens = text.tokens
    held = min(limit, tokens.numel() * topology.hidden_size * dtype.itemsize)
    room = USABLE * host_memory_bytes() - held if available is None else USABLE * available
    if apart := is_apart(topology, length, dtype, settings.gram, room):
        log.info("%s: a decoder layer does not fit into memory, so its experts are read one by one", source.path)
    made = made_by(__name__, settings, {Input.MODEL: source.fingerprint, Input.TEXT: text.fingerprint})
    work = {
        "fingerprint": source.fingerprint,
        "layers": [layer.model_dump(mode="json") for layer in topology.layers],
        "text": text.fingerprint,
        "settings": settings.model_dump(mode="json"),
        "dtype": str(dtype),
    }
    with resumable(output, __name__, device, **work) as steps:
        done = _finished(steps, output.parent)
        for old in (output, *layer_files(output.parent)):
            if old.name not in done:
                old.unlink(missing_ok=True)
        skeleton = open_skeleton(source.path, dtype)
        shards = tensors_of(skeleton, source.path)
        load_outside(skeleton, shards)
        with _embed(skeleton, tokens, limit, steps.folder, len(done)) as (hidden, calls):
            unload_outside(skeleton)
            if hidden.spilled_bytes:
                log.info("%.3g of %.3g GB of hidden states are on disk", hidden.spilled_bytes / 1e9, hidden.bytes / 1e9)
            share = tokens.numel() / len(topology.layers)  # a token that has passed all layers counts as one
            left = topology.layers[len(done) :]
            for layer in progress(left, "calibrate", unit="layers", amount=share, amount_unit="tokens"):
                own = [of_layers[layer.index] for of_layers in calls]
                with enough_memory(f"{source.path}: {layer.prefix}", device, "lower sequence_length"):
                    module = load_layer(skeleton, layer.index, shards, device, experts=not apart)
                    inside = partial(skeleton.inside, layer.index)
                    name = f"{skeleton.prefix}.{layer.index}"
                    runner = Apart(module, name, shards, device, on_sample) if apart else Whole(module)
                    inputs = _run_layer(runner, layer, inside, own, hidden, settings.gram, device)
                    drop_layer(module)
                    unrouted = _unrouted(inputs)
                    found = {name: inputs.pop(name).statistics() for name in [*inputs]}  # the sums go one by one
                path = layer_file(output.parent, layer.index)
                users = {linear.name: group[0].name for group in layer.groups() for linear in group}
                write_statistics(path, found, users, source.fingerprint)
                done[path.name] = _Done(file=File.of(path), unrouted=unrouted)
                hidden.turn()
                steps.put(path.name, done[path.name])
                hidden.forget()
        record = _record(source, made, text, hidden, done, steps.seconds(), device)
        record.write(output)
    return record


def is_apart(topology: Topology, length: int, dtype: torch.dtype, gram: bool, room: float) -> bool:
    """Whether experts are read one by one (`armor.runtime.apart`), for a layer with all does not fit into `room` bytes.

    That is a card's memory, or the host's less what hidden states take of it.
    """
    return topology.has_experts() and peak_bytes(topology, length, dtype, gram) > room


def _weights(linears: Iterable[Linear]) -> int:
    return sum(linear.out_features * linear.in_features for linear in linears)


def _weights_apart(layer: DecoderLayer) -> int:
    """How many weights of a decoder layer are not in memory: those of its experts but for the largest."""
    sizes = [_weights(linears) for linears in layer.experts().values()]
    return sum(sizes) - max(sizes, default=0)


def _record(
    source: Source,
    made: MadeBy,
    text: Blocks,
    hidden: HiddenStates,
    done: dict[str, _Done],
    seconds: float,
    device: str,
) -> CalibrationRecord:
    """What is noted of a text that has passed all layers."""
    files = {name: layer.file for name, layer in done.items()}
    return CalibrationRecord(
        fingerprint=source.fingerprint,
        text_fingerprint=text.fingerprint,
        statistics_fingerprint=combined(file.sha256 for file in files.values()),
        sequences=len(text),
        length=text.length,
        tokens=text.tokens.numel(),
        dtype=dtype_name(hidden.dtype),
        device=device,
        files=files,
        unrouted_experts=_told(done),
        hidden_states_bytes=hidden.bytes,
        spilled_bytes=hidden.spilled_bytes,
        seconds=round(seconds, 3),
        tokens_per_second=round(text.tokens.numel() / seconds, 1),
        peak_memory_bytes=peak_memory_bytes(device),
        made_by=made,
        machine=current_machine(device),
    )


class _Done(Typed):
    """A decoder layer that is finished: the file of its statistics, and its experts that no token was sent to."""

    file: File
    unrouted: tuple[str, ...]


def _finished(steps: Steps, folder: Path) -> dict[str, _Done]:
    """The files of the leading decoder layers that are finished, as `calibrate` describes them.

    None, if the hidden states behind them are not there.
    """
    files: dict[str, _Done] = {}
    while found := steps.get((file := layer_file(folder, len(files))).name, _Done):
        if not file.is_file() or file.stat().st_size != found.file.bytes:
            break
        files[file.name] = found
    return files if files and states_file(steps.folder, len(files)).is_file() else {}


@contextlib.contextmanager
def _embed(
    skeleton: Skeleton, tokens: Tensor, limit: float, folder: Path, layer: int
) -> Iterator[tuple[HiddenStates, list[list[Call]]]]:
    """The hidden states before decoder layer `layer`, and per sequence what each layer is called with.

    tokens (sequences, length). Those before layer 0 are made here, those of a later one lie in `folder`.
    """
    likes = states_of(*observe(skeleton, tokens[:1]))
    calls = []
    with HiddenStates(len(tokens), likes, limit, folder, layer) as hidden:
        for index, (states, own) in enumerate(observe_each(skeleton, tokens)):
            if layer == 0:
                hidden.write(index, (states,))
            calls.append(own)
        if layer == 0:
            hidden.turn()
        yield hidden, calls


def _run_layer(
    runner: Whole | Apart,
    layer: DecoderLayer,
    inside: Callable[[str], str],
    calls: list[Call],
    hidden: HiddenStates,
    gram: bool,
    device: str,
) -> dict[str, Accumulator | Routed]:
    """Run a decoder layer on all sequences, replacing their hidden states by its output; the sums by input's name.

    `inside` gives a linear's name within the layer.
    """
    module = runner.layer
    inputs: dict[str, Accumulator | Routed] = {}
    of_layer: list[tuple[nn.Module, Callable[..., None]]] = []
    hooks = run_on_all(module)  # those of a mixture whose experts are apart are never called
    for first, *_ in layer.groups():
        path = inside(first.name)
        linear, above = module.get_submodule(path), module.get_submodule(path.rpartition(".")[0])
        new = partial(Accumulator, first.in_features, gram, device)
        if isinstance(above, Expert):
            sums = Routed(above, new)
            hooks.append(linear.register_forward_pre_hook(sums.add))
        else:
            sums = new()
            of_layer.append((linear, partial(_add, sums)))
        inputs[first.name] = sums
    on_device: dict[int, Call] = {}

    def run(index: int, module: nn.Module) -> State:
        call = calls[index]
        if id(call) not in on_device:
            on_device.clear()
            on_device[id(call)] = call.map(lambda tensor: tensor.to(device))
        return on_device[id(call)].run(module, moved(hidden.read(index), device))

    runs = [partial(run, index) for index in range(len(calls))]
    with torch.no_grad(), _removed(hooks):
        for index, state in enumerate(runner.run(runs, partial(_hooked, of_layer))):
            if not finite(state[0]):
                raise ArmorError(_not_finite(layer, inputs, index))
            hidden.write(index, state)
    for name, sums in inputs.items():
        if isinstance(sums, Accumulator) and sums.tokens == 0:
            raise ArmorError(f"{name}: no token came by; the model does not use this linear and cannot be calibrated")
        if not sums.finite():
            raise ArmorError(_not_finite(layer, inputs, None))
    return inputs


@contextlib.contextmanager
def _removed(hooks: list[RemovableHandle]) -> Iterator[None]:
    """Remove the `hooks` in the end."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hooked(modules: list[tuple[nn.Module, Callable[..., None]]]) -> AbstractContextManager[None]:
    """Before each of the `modules` is called, its function is."""
    return _removed([module.register_forward_pre_hook(function) for module, function in modules])


def _add(sums: Accumulator, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    sums.add(args[0])


def _unrouted(inputs: dict[str, Accumulator | Routed]) -> tuple[str, ...]:
    """The experts that no token was sent to."""
    routed = {name: sums for name, sums in inputs.items() if isinstance(sums, Routed)}
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name, sums in routed.items() if not sums.sent.tokens))


def _told(done: dict[str, _Done]) -> tuple[str, ...]:
    """The experts of all layers that no token was sent to; says so."""
    unrouted = tuple(name for layer in done.values() for name in layer.unrouted)
    if unrouted:
        log.warning(
            "%d experts saw no token of this text and have the statistics of all, the first is %s; take more text",
            len(unrouted),
            unrouted[0],
        )
    return unrouted


def _not_finite(layer: DecoderLayer, inputs: dict[str, Accumulator | Routed], sequence: int | None) -> str:
    """The message that names the first linear whose input is not finite, or the layer if only its output is not."""
    bad = [linear for linear in layer.linears if linear.name in inputs and not inputs[linear.name].finite()]
    where = f"{bad[0].name}: its input holds" if bad else f"{layer.prefix}: its output holds"
    when = "" if sequence is None else f" on sequence {sequence}"
    return (
        f"{where} NaN or infinity{when}; the weights ({layer.linears[0].shard}) or the dtype are not fit for this text"
    )
