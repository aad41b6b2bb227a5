"""From a source to model.json: decoder layers, their linears, and which linears share an input.

Sharing is observed, not assumed. Each decoder layer runs once on the meta device (shapes without data) with what the
recorders of `armor.runtime.calls` saw. Linears that are handed the same tensor form a group.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from armor.core.errors import ArmorError, one_line
from armor.execution.files import read_json
from armor.execution.log import log
from armor.format.records.topology import DecoderLayer, Linear, Topology
from armor.format.scaled import check_quantization
from armor.format.shards import Shards
from armor.model.by_hand import check_linears, left_dense, tell
from armor.model.contents import Contents
from armor.model.source import Source
from armor.runtime.calls import Call, observe
from armor.runtime.experts import alike
from armor.runtime.filling import load_outside, place_tensor
from armor.runtime.folder import context_length
from armor.runtime.skeleton import Skeleton, named_here, open_skeleton, stored_tensors

__all__ = ["inspect", "input_groups"]

TOKENS = 8  # in the sequence that is followed through the model


def inspect(source: Source, output: Path | str) -> Topology:
    """Find the topology of `source` and write it to `output` (model.json); returns it.

    Says in the log what the decoder layers are made of (`armor.model.contents`). Raises ArmorError if the model has no
    decoder layers with linears, stores weights in another form than transformers', or has layers that cannot be run one
    by one.
    """
    try:
        topology = _topology(source)
    except ArmorError:
        raise
    except Exception as error:  # a family's own code may do anything with layers that are run one by one
        reason = one_line(error)
        raise ArmorError(
            f"{source.path}: {_culprit(error)}: {type(error).__name__}: {reason}; its decoder layers cannot be run one "
            "by one, and the model is not supported"
        ) from error
    topology.write(output)
    return topology


def _culprit(error: Exception) -> str:
    """The class of the innermost module that the error went through."""
    modules = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((type(module).__name__ for module in modules[::-1] if isinstance(module, nn.Module)), "the model")


def _topology(source: Source) -> Topology:
    """The topology of `source`."""
    config = source.path / "config.json"
    check_quantization(read_json(config).get("quantization_config"), config)
    skeleton = open_skeleton(source.path, getattr(torch, source.dtype))
    tensors, here = stored_tensors(skeleton, source.path), skeleton.names.here
    shards, stored = named_here(skeleton, tensors), {here(name): name for name in tensors.names()}
    config = skeleton.model.config.get_text_config(decoder=True)
    for index in range(len(skeleton.layers)):
        _check_tensors(skeleton, index, shards, stored)
    check_linears(skeleton.layers, skeleton.model, source.path)
    load_outside(skeleton, shards, values=False)
    hidden, calls = observe(skeleton, torch.arange(TOKENS).remainder(config.vocab_size).unsqueeze(0))
    layers: list[DecoderLayer] = []
    kept: dict[str, str] = {}
    contents = Contents()
    for index, layer in enumerate(skeleton.layers):
        prefix, call = f"{skeleton.prefix}.{index}", _runnable(layer, hidden, calls[index])
        shared = skeleton.inside_of(index, skeleton.shared)
        left = left_dense(skeleton.model, layer, lambda layer, call=call: run_layer(layer, hidden, call), shared)
        kept |= {f"{prefix}.{name}": reason for name, reason in left.items()}
        contents.add(layer, left, skeleton.inside_of(index, skeleton.tied))
        linears = {
            f"{prefix}.{name}": module
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear) and name not in left
        }
        groups = input_groups(layer, hidden, call, prefix, linears)
        layers.append(_decoder_layer(index, prefix, layer, linears, groups, shards, stored, skeleton.tied))
    tell(kept, source.path, is_all=not any(layer.linears for layer in layers))
    for line in contents.table():
        log.info("%s", line)
    for name, module in skeleton.beside.items():
        count = sum(parameter.numel() for parameter in module.parameters())
        log.info("%s (%s, %s weights)  dense: not of the text model", name, type(module).__name__, f"{count:,}")
    if warning := contents.warning():
        log.warning("%s: %s", source.path, warning)
    return Topology(
        model_type=skeleton.model.config.model_type,
        fingerprint=source.fingerprint,
        dtype=source.dtype,
        context_length=context_length(skeleton.model.config),
        hidden_size=hidden.shape[-1],
        parameters=_parameters(skeleton.model),
        linear_parameters=sum(linear.out_features * linear.in_features for layer in layers for linear in layer.linears),
        decoder_parameters=contents.total(),
        tied_embeddings=bool(getattr(skeleton.model.config, "tie_word_embeddings", False)),
        layers=tuple(layers),
    )


def _parameters(model: nn.Module) -> int:
    """The number of parameters, tied ones counted once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return sum(p.numel() for name, p in model.named_parameters(remove_duplicate=True) if name not in tied)


def _check_tensors(skeleton: Skeleton, index: int, shards: Shards, stored: dict[str, str]) -> None:
    """Raise ArmorError unless the model's folder has each tensor of decoder layer `index`, with its shape.

    `stored` has their names in the folder.
    """
    prefix = f"{skeleton.prefix}.{index}"
    for name, tensor in skeleton.layers[index].state_dict(keep_vars=True).items():
        full = f"{prefix}.{name}"
        if full not in shards:
            if not tensor.is_meta:
                continue  # a buffer that is computed
            raise ArmorError(
                f"{shards.folder}: has no tensor {full}, which {type(skeleton.model).__name__} needs; models whose "
                "weights are stored in another form are not supported"
            )
        if shards.shape(full) != tuple(tensor.shape):
            raise ArmorError(
                f"{shards.folder / shards.file_of(full)}: {stored.get(full, full)} has shape {shards.shape(full)}, "
                f"expected {tuple(tensor.shape)} by config.json; fetch the model again, weights and config.json"
            )


def _decoder_layer(
    index: int,
    prefix: str,
    layer: nn.Module,
    linears: dict[str, nn.Linear],
    groups: dict[str, int],
    shards: Shards,
    stored: dict[str, str],
    tied: Collection[str],
) -> DecoderLayer:
    """What the record says of a layer: `stored` has the names of its tensors in the model's files, but of `tied`."""
    weights = {f"{name}.weight" for name in linears}
    matrices = [f"{prefix}.{name}" for name, parameter in layer.named_parameters() if parameter.dim() > 1]
    inside = {stored.get(f"{prefix}.{name}", ""): name for name, _ in layer.named_parameters()}
    own = next((full.removesuffix(f".{name}") for full, name in inside.items() if full.endswith(f".{name}")), prefix)
    described = tuple(
        Linear(
            name=stored[f"{name}.weight"].removesuffix(".weight"),
            out_features=module.out_features,
            in_features=module.in_features,
            dtype=shards.dtype(f"{name}.weight"),
            bias=module.bias is not None,
            shard=shards.file_of(f"{name}.weight"),
            input_group=groups[name],
        )
        for name, module in linears.items()
    )
    dense = tuple(stored.get(name, name) for name in matrices if name not in weights and name not in tied)
    return DecoderLayer(index=index, prefix=own, linears=described, dense_parameters=dense)


def run_layer(layer: nn.Module, hidden: Tensor, call: Call) -> object:
    """The hidden states that a decoder layer makes, on its own device; what is carried are zeros."""
    with torch.no_grad():
        device = next((tensor.device for tensor in (*layer.parameters(), *call.tensors())), hidden.device)
        return call.run(layer, call.empty(hidden, device))[0]


def _runnable(layer: nn.Module, hidden: Tensor, call: Call) -> Call:
    """The call of a decoder layer that `run_layer` can run: on the meta device, `layer` too.

    Where what is computed depends on numbers, as in some mixtures, both are on the CPU, and weights are zeros that take
    no memory.
    """
    empty = call.map(lambda tensor: tensor.to("meta"))
    real = {name: buffer.clone() for name, buffer in layer.named_buffers() if not buffer.is_meta}
    try:
        run_layer(layer.to("meta"), hidden, empty)
        return empty
    except NotImplementedError:
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            owner, _, own = name.rpartition(".")
            zeros = real.get(name, torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))
            place_tensor(layer.get_submodule(owner), own, zeros)
        return call


def input_groups(
    layer: nn.Module, hidden: Tensor, call: Call, prefix: str, names: dict[str, nn.Linear]
) -> dict[str, int]:
    """A number for each of the linears `names` of `layer`, the same for those that are handed the same tensor.

    hidden (batch, length, hidden); only its shape matters. `layer` and what is in `call` are on one device, meta where
    that can be. Raises ArmorError if the layer returns something else than hidden states.
    """
    seen: dict[str, tuple] = {}
    inputs = []  # kept alive: the address of a tensor that is gone may serve again

    def hook(name: str):
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            inputs.append(x)
            # A view is the same input; one that was written to in between is not.
            seen.setdefault(name, (x.untyped_storage()._cdata, x.storage_offset(), x.shape[-1], x._version))

        return note

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in names.items()]
    try:
        output = run_layer(layer, hidden, call)
    except (RuntimeError, NotImplementedError) as error:
        # The path through the layer depends on the data: nothing can be said about sharing, and nothing need be.
        reason = one_line(error)
        log.warning("%s: inputs cannot be followed, so each linear gets statistics of its own (%s)", prefix, reason)
        return {name: index for index, name in enumerate(names)}
    finally:
        for handle in hooks:
            handle.remove()
    if not isinstance(output, Tensor) or output.shape != hidden.shape:
        raise ArmorError(f"{prefix}: returns something else than hidden states; the model is not supported")
    numbers: dict[tuple, int] = {}
    keys = {name: seen.get(name, (name,)) for name in names}
    for name, (expert, first) in alike(layer).items():  # one of a mixture's experts has run, in the name of all
        if (full := f"{prefix}.{name}") in keys:
            keys[full] = (expert, seen.get(f"{prefix}.{first}", first))
    return {name: numbers.setdefault(keys[name], len(numbers)) for name in names}
