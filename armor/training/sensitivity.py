"""How the dense model's predictions depend on each linear, one decoder layer in memory at a time.

What is measured, `armor.format.sensitivity` says. The forward pass is the stage `states`: what goes into every layer is
on disk. The tokens whose log-likelihood is looked at are drawn from the model's own predictions, one at each position:
with those, and not the text's, squared gradients are the curvature of the KL divergence (the true Fisher matrix, not
the empirical one: Kunstner et al. 2019). The gradient then goes back from layer to layer: each is read, run once more
on what went into it, and the gradient of its output becomes those of its weights and of its input.

Both passes leave a file for each layer, so that a run that is killed goes on at the layer where it was. It takes about
four forward passes of time, and the states of all layers on disk until it ends.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from armor.config.sample import SensitivityJob
from armor.core.errors import ArmorError
from armor.execution.files import open_safetensors, sha256
from armor.execution.log import progress
from armor.execution.machine import current_machine, enough_memory, peak_memory_bytes
from armor.execution.resume import Done, resumable
from armor.format.names import factors_beside, layer_file, layer_name, record_beside
from armor.format.provenance import made_by
from armor.format.records.base import Input
from armor.format.records.sensitivity import SensitivityRecord
from armor.format.records.states import StatesRecord
from armor.format.records.topology import DecoderLayer, Topology
from armor.format.sensitivity import Sensitivity, write_sensitivities
from armor.format.states import open_states, states_file, write_states
from armor.model.source import Source
from armor.runtime.calls import Call, State, finish, moved, observe_each
from armor.runtime.filling import drop_layer, finite, load_layer, load_outside, place_outside, unload_outside
from armor.runtime.skeleton import Skeleton, open_skeleton, tensors_of
from armor.training.states import TOKENS, make_states

__all__ = ["drawn", "measure_sensitivity"]


def measure_sensitivity(
    source: Source, topology: Topology, settings: SensitivityJob, output: Path | str, device: str = "cpu"
) -> SensitivityRecord:
    """Write the sensitivity of every linear to the safetensors beside `output` (.json), then the record.

    Raises ArmorError for a topology of another model, too little text, a full disk, and NaN or infinity.
    """
    output = Path(output)
    made = made_by(__name__, settings, {Input.MODEL: source.fingerprint})
    work = {"used": made.inputs, "settings": settings.model_dump(mode="json")}
    with resumable(output, __name__, device, **work) as steps:
        dense = steps.folder / "dense"
        known = steps.get("states", StatesRecord)
        if known is None:
            known = make_states(source, topology, settings.sample, record_beside(dense), device)
            steps.put("states", known)
        with open_safetensors(dense / TOKENS) as file:
            tokens = file.get_tensor("tokens")
        skeleton = open_skeleton(source.path, getattr(torch, known.dtype))
        shards = tensors_of(skeleton, source.path)
        load_outside(skeleton, shards, head=True)
        calls = [of_layers for _, of_layers in observe_each(skeleton, tokens)]
        count = len(topology.layers)
        if steps.get(layer_name(count), Done) is None:
            generator = torch.Generator().manual_seed(settings.seed)
            with enough_memory("the head", device, "lower sequence_length"):
                place_outside(skeleton, device)
                _through_head(skeleton, tokens, states_file(dense, count), _gradients(dense, count), generator, device)
            steps.put(layer_name(count), Done())
        unload_outside(skeleton)
        left = [layer for layer in topology.layers if steps.get(layer_name(layer.index), Done) is None][::-1]
        for layer in progress(left, "sensitivity", unit="layers", amount=tokens.numel() / count, amount_unit="tokens"):
            k = layer.index
            names = [f"{skeleton.inside(k, linear.name)}.weight" for linear in layer.linears]
            with enough_memory(layer.prefix, device, "lower sequence_length"):
                module = load_layer(skeleton, k, shards, device)
                weights = [module.get_parameter(name) for name in names]
                found = _through_layer(module, layer, weights, [call[k] for call in calls], dense, known.length, device)
            drop_layer(module)
            part = layer_file(steps.folder, k)
            write_sensitivities(part, found, source.fingerprint)
            steps.put(layer_name(k), Done())
            _gradients(dense, k + 1).unlink()
        numbers = factors_beside(output)
        output.unlink(missing_ok=True)  # an old JSON must never stand beside new numbers
        write_sensitivities(numbers, _all(topology, steps.folder), source.fingerprint)
        result = SensitivityRecord(
            fingerprint=source.fingerprint,
            sha256=sha256(numbers),
            text_fingerprint=known.text_fingerprint,
            sequences=known.sequences,
            length=known.length,
            dtype=known.dtype,
            seconds=steps.seconds(),
            peak_memory_bytes=peak_memory_bytes(device),
            made_by=made.replace(inputs={**made.inputs, Input.TEXT: known.text_fingerprint}),
            machine=current_machine(device),
        )
        result.write(output)
    return result


def _gradients(folder: Path, layer: int) -> Path:
    """The file of the gradients of what goes into decoder layer `layer`."""
    return folder / f"gradients_{layer}.safetensors"


def drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token (length,) int64 for each prediction of logits (length, vocabulary), drawn with its probability.

    `generator` is on the CPU: on every device the same numbers decide.
    """
    sums = logits.float().softmax(-1).cumsum(-1)
    chance = torch.rand(len(logits), 1, generator=generator).to(logits.device) * sums[:, -1:]
    return torch.searchsorted(sums, chance, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)


def _through_head(
    skeleton: Skeleton, tokens: Tensor, states: Path, target: Path, generator: torch.Generator, device: str
) -> None:
    """Write the gradients of what comes out of the last layer, from `states`, sequence by sequence into `target`."""
    fed = open_states(states)
    with write_states(target, _floats(fed.row(0), torch.float32), len(tokens)) as writer:
        for number, row in enumerate(tokens):
            hidden = fed.row(number)[0].to(device).requires_grad_()
            logits = finish(skeleton, row[None].to(device), hidden)[0].float()
            # Of the sum, not of the mean: the tokens are drawn one by one, so that each gradient is that of its own.
            loss = F.cross_entropy(logits, drawn(logits.detach(), generator), reduction="sum")
            writer.add(torch.autograd.grad(loss, hidden))


def _through_layer(
    module: nn.Module,
    layer: DecoderLayer,
    weights: list[nn.Parameter],
    calls: list[Call],
    folder: Path,
    length: int,
    device: str,
) -> dict[str, Sensitivity]:
    """The sensitivity of every linear of a decoder layer, by name; writes the gradients of what goes into it.

    `weights` are those of `layer.linears` in `module`, `length` is that of a sequence in tokens.
    """
    zeros = [[torch.zeros(n, dtype=torch.float64, device=device) for n in weight.shape] for weight in weights]
    found = {linear.name: sums for linear, sums in zip(layer.linears, zeros, strict=True)}
    fed, after = open_states(states_file(folder, layer.index)), open_states(_gradients(folder, layer.index + 1))
    like = _floats(fed.row(0), torch.float32)
    with write_states(_gradients(folder, layer.index), like, len(calls)) as before:
        for number, call in enumerate(calls):
            call = call.map(lambda tensor: tensor.to(device))
            state = moved(fed.row(number), device)
            for tensor in (*weights, *_floats(state)):
                tensor.requires_grad_()
            out = _floats(call.run(module, state))
            wanted = [row.to(device, one.dtype) for row, one in zip(after.row(number), out, strict=True)]
            # An expert that no token is sent to has no gradient.
            found_here = torch.autograd.grad(out, [*_floats(state), *weights], wanted, materialize_grads=True)
            gradients = found_here[len(_floats(state)) :]
            before.add(found_here[: len(_floats(state))])
            for (rows, columns), gradient in zip(found.values(), gradients, strict=True):
                squares = gradient.float().square_() / length
                rows += squares.sum(1)
                columns += squares.sum(0)
    if bad := [name for name, (rows, _) in found.items() if not finite(rows)]:
        raise ArmorError(
            f"{bad[0]}: the gradient of its weight holds NaN or infinity; weights or dtype are not fit for this text"
        )
    return {name: Sensitivity.of(*(sums / len(calls) for sums in own)) for name, own in found.items()}


def _floats(state: State, dtype: torch.dtype | None = None) -> State:
    """The tensors of a state that have a gradient, in `dtype` if one is given."""
    return tuple(tensor.to(tensor.device, dtype) for tensor in state if tensor.is_floating_point())


def _all(topology: Topology, folder: Path) -> dict[str, Sensitivity]:
    """What the steps left, of all layers."""
    found = {}
    for layer in topology.layers:
        with open_safetensors(layer_file(folder, layer.index)) as file:
            for linear in layer.linears:
                rows, columns = (file.get_tensor(f"{linear.name}.{side}") for side in ("rows", "columns"))
                found[linear.name] = Sensitivity(rows, columns)
    return found
