"""A model without its weights, whose decoder layers are filled and run one at a time.

Nothing here knows an architecture. The skeleton comes from transformers on the meta device; its decoder layers are the
list of as many modules as the configuration counts. What a layer is called with is found by recording, for masks,
rotary embeddings and the like differ by layer, family and release. Every decoder layer is replaced by a recorder that
notes its arguments and passes the hidden states on. The model's own forward runs once. Each real layer is then called
with what its recorder saw. What comes after the layers is the model's own forward too, the last recorder handing out
what the last layer made. This holds for models in which a layer's output goes straight into the next layer and layers
do not talk to each other by other ways; `observe` and `armor.model.inspect` check it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel

from armor.core.errors import ArmorError
from armor.execution.files import read_json
from armor.format.shards import Shards
from armor.runtime.auto import auto_class
from armor.runtime.conv1d import Turned, turn
from armor.runtime.experts import parts_of, unfuse
from armor.runtime.names import Names

__all__ = [
    "Call",
    "Skeleton",
    "compute_dtype",
    "decoder_layers",
    "finish",
    "finite",
    "load_layer",
    "load_outside",
    "named_here",
    "open_skeleton",
    "place_outside",
    "place_tensor",
    "read_layer",
    "readers",
    "observe",
    "observe_each",
    "stored_tensors",
    "tensors_of",
    "unload_outside",
]


def compute_dtype(dtype: str, device: str = "cpu") -> torch.dtype:
    """The dtype to run a model of `dtype` in: its own if the device multiplies in it, else float32."""
    own: torch.dtype = getattr(torch, dtype)
    if device != "cpu":
        return own
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return own if own == torch.bfloat16 and native else torch.float32


@dataclass(frozen=True)
class Call:
    """What a decoder layer is called with beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states that a decoder layer, so called, makes of `hidden`: its output or the first of it."""
        output = layer(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple | list) else output

    def map(self, function) -> Call:
        """The call with `function` applied to each of its tensors."""
        return Call(*pytree.tree_map_only(Tensor, function, (self.args, self.kwargs)))

    def equals(self, other: Call) -> bool:
        """Whether both hold the same structure with equal values."""
        mine, structure = pytree.tree_flatten((self.args, self.kwargs))
        theirs, other_structure = pytree.tree_flatten((other.args, other.kwargs))
        return structure == other_structure and all(map(_same, mine, theirs))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    return a is b or (isinstance(a, bool | int | float | str) and type(a) is type(b) and a == b)


@dataclass(frozen=True)
class Skeleton:
    """A causal language model on the meta device and its decoder layers; `prefix` is their name, like model.layers.

    Experts are modules of their own in it (`armor.runtime.experts`). It may be the text model of a wrapper, which has
    models of images or sound beside it: they stay on the meta device.
    """

    model: PreTrainedModel
    layers: nn.ModuleList
    prefix: str

    @cached_property
    def beside_hidden(self) -> dict[type, tuple[Any, ...] | None]:
        """What decoder layers of a class return behind the hidden states, tensors on the meta device; None: no tuple.

        `observe` fills it where the model wants more than hidden states.
        """
        return {}

    @cached_property
    def names(self) -> Names:
        """What checkpoints and the model call the same tensor."""
        return Names(self.model)

    def inside(self, index: int, module: str) -> str:
        """The name, within decoder layer `index`, of a module that checkpoints and records call `module`."""
        return self.names.module_here(module).removeprefix(f"{self.prefix}.{index}.")

    @cached_property
    def beside(self) -> dict[str, nn.Module]:
        """What a wrapper has beside its text model, by name: models of images or sound, what joins them to the text."""
        parts, path_of = self.prefix.split("."), "{}.{}".format
        paths = [".".join(parts[:count]) for count in range(len(parts))]
        text = [isinstance(self.model.get_submodule(path), PreTrainedModel) for path in paths][::-1].index(True)
        own = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        return {
            full: child
            for path in paths[: len(paths) - 1 - text]
            for name, child in self.model.get_submodule(path).named_children()
            if (full := path_of(path, name).removeprefix(".")) not in paths
            and any(True for _ in child.parameters())
            and not any(module is one for module in child.modules() for one in own)
        }

    def _away(self) -> set[int]:
        """The ids of the modules that are not loaded with what is outside: decoder layers, other models beside."""
        models = [m for child in self.beside.values() for m in child.modules() if isinstance(m, PreTrainedModel)]
        return {id(module) for away in (self.layers, *models) for module in away.modules()}

    def outside(self, head: bool = False) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
        """(full name, owner, name in the owner, tensor) of what the base model holds outside of the decoder layers.

        With `head`, of what the whole model holds there. Not of models of images or sound, which no text passes.
        """
        names = {id(module): name for name, module in self.model.named_modules()}
        away = self._away()
        for module in (self.model if head else self.model.base_model).modules():
            if id(module) in away:
                continue
            for name in module.state_dict(keep_vars=True).keys() & {*module._parameters, *module._buffers}:
                owner = names[id(module)]
                yield f"{owner}.{name}" if owner else name, module, name, getattr(module, name)


def open_skeleton(folder: Path, dtype: torch.dtype) -> Skeleton:
    """The skeleton of the model in `folder`, to compute in `dtype`. ArmorError if transformers cannot make it."""
    place = folder / "config.json"
    family = read_json(place).get("model_type") if place.is_file() else None
    if family is not None and family not in CONFIG_MAPPING:
        raise ArmorError(
            f"{place}: model_type {family} is no family of transformers {transformers.__version__}; install a release "
            "that has it, or take another model"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
        # Buffers are computed, not stored (rotary frequencies): they must be real.
        with init_empty_weights(include_buffers=False):
            model = auto_class(config).from_config(config, dtype=dtype)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArmorError(f"{place}: transformers makes no causal language model of it: {reason}") from error
    unfuse(model)
    turn(model)
    model.eval().requires_grad_(False)
    prefix, layers = decoder_layers(model, folder)
    return Skeleton(model, layers, prefix)


def tensors_of(skeleton: Skeleton, folder: Path | str) -> Shards:
    """The tensors in `folder`, a checkpoint of the skeleton's model, under the names that the skeleton has for them."""
    return named_here(skeleton, stored_tensors(skeleton, folder))


def named_here(skeleton: Skeleton, stored: Shards) -> Shards:
    """The tensors of a checkpoint under the names that the skeleton has for them, and what it makes of several."""
    shards = stored.renamed(skeleton.names.here)
    for axis, groups in skeleton.names.joins(set(shards.names())).items():
        shards = shards.joined(groups, axis)
    return shards


def stored_tensors(skeleton: Skeleton, folder: Path | str) -> Shards:
    """The tensors in `folder` under the names that records have for them: those in its files, but one for each expert.

    Where experts are stored fused, the names are made up like those of other checkpoints. Weights are (out, in), where
    files have Conv1D's too.
    """
    shards, parts = Shards(folder), parts_of(skeleton.model)
    fused, here = {part.tensor for part in parts.values()}, skeleton.names.here
    shards = shards.renamed(lambda name: here(name) if parts and here(name) in fused else name).split(parts)
    turned = {f"{name}.weight" for name, module in skeleton.model.named_modules() if isinstance(module, Turned)}
    return shards.turned(name for name in shards.names() if turned and here(name) in turned)


def decoder_layers(model: PreTrainedModel, where: Path | str) -> tuple[str, nn.ModuleList]:
    """The decoder layers of a model and their name in it, like model.layers. ArmorError, naming `where`, if none."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    for part in (model.get_decoder(), model.base_model):  # a wrapper's other models may have as many layers
        inside = {id(module) for module in part.modules()}
        if found := {name: layers for name, layers in lists.items() if id(layers) in inside}:
            name = max(found, key=lambda name: sum(parameter.numel() for parameter in found[name].parameters()))
            return name, found[name]
    raise ArmorError(
        f"{where}: {type(model).__name__} has no list of decoder layers (num_hidden_layers is {count}); "
        "expected a decoder-only transformer"
    )


def load_outside(skeleton: Skeleton, shards: Shards, head: bool = False, values: bool = True) -> None:
    """Give the base model its real tensors outside of the decoder layers: embeddings, norms; the `head` if asked to.

    Without `values`, zeros that take no memory: enough to see what layers are called with.
    """
    tied = getattr(skeleton.model, "all_tied_weights_keys", None) or {}
    for full, owner, name, tensor in skeleton.outside(head):
        if head and full in tied:
            continue
        full = full if full in shards else tied.get(full, full)
        if full in shards:
            if values:
                _place(owner, name, shards.read(full, _target(tensor)), full, shards)
            else:
                place_tensor(owner, name, torch.zeros((), dtype=tensor.dtype).expand(shards.shape(full)))
        elif tensor.is_meta:
            raise ArmorError(
                f"{shards.folder}: has no tensor {full}, which {type(skeleton.model).__name__} needs; load the model "
                "with transformers and save it again, so that names are those of the model"
            )
    if head:
        skeleton.model.tie_weights()


def place_outside(skeleton: Skeleton, device: str) -> None:
    """Move what `load_outside` loaded, and what is computed beside it, to `device`."""
    away = skeleton._away()  # on the meta device, from where nothing can be moved
    for module in skeleton.model.modules():
        if id(module) not in away:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(device)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)


def unload_outside(skeleton: Skeleton) -> None:
    """Drop what `load_outside` loaded; `observe` cannot run after it."""
    for _, owner, name, tensor in list(skeleton.outside()):
        place_tensor(owner, name, tensor.to("meta"))


def load_layer(skeleton: Skeleton, index: int, shards: Shards, device: str = "cpu") -> nn.Module:
    """Fill decoder layer `index` from its shards and return it; `.to("meta")` empties it again.

    Raises ArmorError, naming tensor and file, if one is missing, has another shape, or holds NaN or infinity.
    """
    return _fill(skeleton.layers[index], f"{skeleton.prefix}.{index}", shards, device)


def read_layer(skeleton: Skeleton, index: int, shards: Shards, device: str = "cpu") -> nn.Module:
    """As `load_layer`, but a copy: the skeleton's own layer, with the buffers that are computed, stays as it is."""
    return _filled(skeleton.layers[index], f"{skeleton.prefix}.{index}", shards, device)


def _filled(layer: nn.Module, prefix: str, shards: Shards, device: str) -> nn.Module:
    return _fill(copy.deepcopy(layer), prefix, shards, device)


def _fill(layer: nn.Module, prefix: str, shards: Shards, device: str) -> nn.Module:
    for name, tensor in layer.state_dict(keep_vars=True).items():
        full = f"{prefix}.{name}"
        if full not in shards and not tensor.is_meta:
            continue  # a buffer that is computed
        owner, _, last = name.rpartition(".")
        _place(layer.get_submodule(owner), last, shards.read(full, _target(tensor)).to(device), full, shards)
    return layer.to(device)


def _target(tensor: Tensor) -> torch.dtype | None:
    """As in transformers: floats take the model's dtype, the rest keeps its own."""
    return tensor.dtype if tensor.is_floating_point() else None


def _place(owner: nn.Module, name: str, tensor: Tensor, full: str, shards: Shards) -> None:
    expected = getattr(owner, name).shape
    where = f"{shards.folder / shards.file_of(full)}: {full}"
    if tensor.shape != expected:
        raise ArmorError(f"{where} has shape {tuple(tensor.shape)}, expected {tuple(expected)} by config.json")
    if tensor.is_floating_point() and not finite(tensor):
        raise ArmorError(f"{where} holds NaN or infinity; the weights are damaged, fetch the model again")
    place_tensor(owner, name, tensor)


def place_tensor(owner: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter or buffer `name` of `owner`, which has one."""
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[name] = tensor


def finite(tensor: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor infinity; its extremes tell, in one pass and without a copy."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


class _StandIn(nn.Module):
    """Stands in for a decoder layer, and has its attributes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # a tuple hides it from nn.Module, whose attributes it would become

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)


class _Recorder(_StandIn):
    """Notes what it is called with, and returns what was `made`, or the hidden states, as the layer would.

    Where that is a tuple, what stands behind them has no numbers.
    """

    made: Tensor | None = None
    seen: tuple[Any, Call] | None = None
    times = 0

    def __init__(self, layer: nn.Module, beside: dict[type, tuple[Any, ...] | None], learn: bool) -> None:
        super().__init__(layer)
        self._beside, self._learn = beside, learn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, call = args[0] if args else None, Call(args[1:], kwargs)
        self.times += 1
        self.seen = hidden, call
        layer = self._layer[0]
        if self._learn and type(layer) not in self._beside and isinstance(hidden, Tensor):
            self._beside[type(layer)] = _behind(layer, hidden, call)
        behind = self._beside.get(type(layer))
        hidden = hidden if self.made is None else self.made
        return hidden if behind is None else (hidden, *behind)


@torch.no_grad()
def _behind(layer: nn.Module, hidden: Tensor, call: Call) -> tuple[Any, ...] | None:
    """What a decoder layer returns behind the hidden states, on the meta device; None where it returns them alone."""
    call = call.map(lambda tensor: tensor.to("meta"))
    empty = {name: t.to("meta") for name, t in [*layer.named_parameters(), *layer.named_buffers()]}
    output = functional_call(layer, empty, (hidden.to("meta"), *call.args), call.kwargs)
    return tuple(output[1:]) if isinstance(output, tuple | list) else None


class _Reader(_StandIn):
    """Reads the layer when it is called, and drops it after."""

    def __init__(self, layer: nn.Module, name: str, shards: Shards, device: str) -> None:
        super().__init__(layer)
        self._source = name, shards, device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _filled(self._layer[0], *self._source)(*args, **kwargs)


@contextlib.contextmanager
def _replaced(skeleton: Skeleton, stand_ins: Sequence[_StandIn]) -> Iterator[None]:
    """The stand-ins are in the decoder layers' place for as long as the context lasts."""
    layers = list(skeleton.layers)
    try:
        for index, stand_in in enumerate(stand_ins):
            skeleton.layers[index] = stand_in
        yield
    finally:
        for index, layer in enumerate(layers):
            skeleton.layers[index] = layer


@contextlib.contextmanager
def _recorders(skeleton: Skeleton, learn: bool = False) -> Iterator[list[_Recorder]]:
    """Recorders in the decoder layers' place; they `learn` what these return by running one of each class."""
    recorders = [_Recorder(layer, skeleton.beside_hidden, learn) for layer in skeleton.layers]
    with _replaced(skeleton, recorders):
        yield recorders


@contextlib.contextmanager
def readers(skeleton: Skeleton, shards: Shards, device: str = "cpu") -> Iterator[PreTrainedModel]:
    """The model as one that runs whole, on `device`: its decoder layers are read when they are called, dropped after.

    What is outside of the layers must be loaded and placed. A forward pass raises ArmorError where `load_layer` does.
    """
    named = [(layer, f"{skeleton.prefix}.{index}") for index, layer in enumerate(skeleton.layers)]
    with _replaced(skeleton, [_Reader(layer, name, shards, device) for layer, name in named]):
        yield skeleton.model


def observe(skeleton: Skeleton, tokens: Tensor) -> tuple[Tensor, list[Call]]:
    """The hidden states (batch, length, hidden) before the first decoder layer, and what every layer is called with.

    tokens (batch, length) int64. What is outside of the layers must be loaded. Raises ArmorError if the model does
    something else with hidden states between two layers than to pass them on.
    """
    if not skeleton.beside_hidden and len(skeleton.layers) > 1:
        with contextlib.suppress(Exception):  # of a model that wants more of its layers than a tensor
            return _observed(skeleton, tokens, learn=False)
    return _observed(skeleton, tokens, learn=True)


def _observed(skeleton: Skeleton, tokens: Tensor, learn: bool) -> tuple[Tensor, list[Call]]:
    """As `observe`."""
    with _recorders(skeleton, learn) as recorders, torch.no_grad():
        skeleton.model.base_model(input_ids=tokens, use_cache=False)
    hidden: Any = recorders[0].seen[0] if recorders[0].seen else None
    calls = []
    for index, recorder in enumerate(recorders):
        if recorder.seen is None or not isinstance(hidden, Tensor) or recorder.seen[0] is not hidden:
            raise ArmorError(
                f"{skeleton.prefix}.{index}: {type(skeleton.model).__name__} does not simply pass hidden states from "
                "one decoder layer to the next; its layers cannot be run one by one, and the model is not supported"
            )
        if recorder.times > 1:
            raise ArmorError(
                f"{skeleton.prefix}.{index}: {type(skeleton.model).__name__} calls it {recorder.times} times in one "
                "pass; its layers cannot be run one by one, and the model is not supported"
            )
        given = pytree.tree_leaves((recorder.seen[1].args, recorder.seen[1].kwargs))
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in given):
            raise ArmorError(
                f"{skeleton.prefix}.{index}: takes more of an earlier decoder layer than hidden states; its layers "
                "cannot be run one by one, and the model is not supported"
            )
        calls.append(recorder.seen[1])
    return hidden, calls


def observe_each(skeleton: Skeleton, tokens: Tensor) -> Iterator[tuple[Tensor, list[Call]]]:
    """`observe` of one sequence after the other, tokens (sequences, length).

    Sequences of one length are mostly called with equal masks and rotary embeddings: those are one object.
    """
    shared: list[Call] = []
    for row in tokens:
        hidden, calls = observe(skeleton, row[None])
        shared = shared or calls
        yield hidden, [a if a.equals(b) else b for a, b in zip(shared, calls, strict=True)]


def finish(skeleton: Skeleton, tokens: Tensor, hidden: Tensor) -> Tensor:
    """The logits (batch, length, vocabulary) from the hidden states (batch, length, hidden) after the last layer.

    tokens (batch, length) int64. What is outside of the layers must be loaded, the head too. A gradient goes through
    if `hidden` wants one.
    """
    with _recorders(skeleton) as recorders:
        recorders[-1].made = hidden
        return skeleton.model(input_ids=tokens, use_cache=False).logits
