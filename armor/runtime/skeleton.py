"""A model without its weights, whose decoder layers are filled one at a time.

Nothing here knows an architecture. The skeleton comes from transformers on the meta device; its decoder layers are the
list of as many modules as the configuration counts. What is outside of them, embeddings and norms and the head, is
loaded by itself. `armor.runtime.calls` runs the layers one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel

from armor.core.errors import ArmorError, one_line
from armor.execution.files import read_json
from armor.format.shards import Part, Shards
from armor.runtime.auto import from_config
from armor.runtime.conv1d import Turned, turn
from armor.runtime.fused import parts_of, unfuse
from armor.runtime.names import Names

__all__ = [
    "Made",
    "Skeleton",
    "State",
    "compute_dtype",
    "decoder_layers",
    "named_here",
    "open_skeleton",
    "stored_tensors",
    "tensors_of",
]


LARGE = 1 << 27  # numbers


def compute_dtype(dtype: str, device: str = "cpu") -> torch.dtype:
    """The dtype to run a model of `dtype` in: its own if the device multiplies in it, else float32."""
    own: torch.dtype = getattr(torch, dtype)
    if device != "cpu":
        return own
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return own if own == torch.bfloat16 and native else torch.float32


State = tuple[Tensor, ...]
"""What goes into a decoder layer: hidden states, then what it or a later one takes of earlier layers beside them."""


@dataclass(frozen=True)
class Made:
    """What a decoder layer makes beside hidden states, on the meta device."""

    behind: tuple[Any, ...] | None
    """What it returns behind them; None where it returns them alone."""
    added: list[dict[Any, Any]]
    """What it puts into each dictionary that it is handed."""
    leaves: list[Any]
    """Those of its output, and of its arguments after the run."""
    used: list[Tensor]
    """Tensors of earlier layers that it computes with."""


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
    def made(self) -> dict[int, Made]:
        """What each decoder layer makes beside hidden states, where layers may take more of each other.

        `armor.runtime.calls.observe` fills it, and `links`.
        """
        return {}

    @cached_property
    def links(self) -> list[tuple[State, tuple[int, ...]]]:
        """What is carried into each decoder layer, and handed on by it (`armor.runtime.calls.Call`)."""
        return []

    @cached_property
    def names(self) -> Names:
        """What checkpoints and the model call the same tensor."""
        return Names(self.model)

    @cached_property
    def tied(self) -> dict[str, str]:
        """Tensors of decoder layers that are those of an earlier layer, by name: files have the earlier alone.

        Zamba's layers share one block of attention and MLP.
        """
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        return {name: first for name, first in tied.items() if first.startswith(f"{self.prefix}.")}

    @cached_property
    def shared(self) -> set[str]:
        """All tensors that several decoder layers have."""
        return {*self.tied, *self.tied.values()}

    def inside_of(self, index: int, names: Iterable[str]) -> set[str]:
        """Those of `names` that are in decoder layer `index`, as they are called within it."""
        prefix = f"{self.prefix}.{index}."
        return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}

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

    def away(self) -> set[int]:
        """The ids of the modules that are not loaded with what is outside: decoder layers, other models beside."""
        models = [m for child in self.beside.values() for m in child.modules() if isinstance(m, PreTrainedModel)]
        return {id(module) for away in (self.layers, *models) for module in away.modules()}

    def outside(self, head: bool = False) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
        """(full name, owner, name in the owner, tensor) of what the base model holds outside of the decoder layers.

        With `head`, of what the whole model holds there. Not of models of images or sound, which no text passes.
        """
        names = {id(module): name for name, module in self.model.named_modules()}
        away = self.away()
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
        with init_empty_weights(include_buffers=False), _LargeOnMeta():
            model = from_config(config, dtype)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = one_line(error).partition(" Model type should be one of")[0]
        raise ArmorError(f"{place}: transformers makes no causal language model of it: {reason}") from error
    unfuse(model)
    turn(model)
    model.eval().requires_grad_(False)
    prefix, layers = decoder_layers(model, folder)
    return Skeleton(model, layers, prefix)


class _LargeOnMeta(TorchFunctionMode):
    """Large empty tensors are on the meta device from the start.

    All experts of a layer are one. Made on the CPU first, it may be more than a machine will give.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty and args:
            sizes = args if isinstance(args[0], int) else args[0]
            if math.prod(sizes) > LARGE:
                kwargs = kwargs | {"device": "meta"}
        return function(*args, **kwargs)


def tensors_of(skeleton: Skeleton, folder: Path | str) -> Shards:
    """The tensors in `folder`, a checkpoint of the skeleton's model, under the names that the skeleton has for them."""
    return named_here(skeleton, stored_tensors(skeleton, folder))


def named_here(skeleton: Skeleton, stored: Shards) -> Shards:
    """The tensors of a checkpoint under the names that the skeleton has for them, and what it makes of several."""
    shards = stored.renamed(skeleton.names.here)
    for axis, groups in skeleton.names.joins(set(shards.names())).items():
        shards = shards.joined(groups, axis)
    return shards.also({n: first for n, first in skeleton.tied.items() if n not in shards and first in shards})


def stored_tensors(skeleton: Skeleton, folder: Path | str) -> Shards:
    """The tensors in `folder` under the names that records have for them: those in its files, but one for each expert.

    Where experts are stored fused, the names are made up like those of other checkpoints. So are those of linears that
    are stored as one tensor. Weights are (out, in), where files have Conv1D's too.
    """
    shards, parts = Shards(folder), parts_of(skeleton.model)
    fused, here = {part.tensor for part in parts.values()}, skeleton.names.here
    shards = shards.renamed(lambda name: here(name) if parts and here(name) in fused else name)
    shards = shards.split({name: _as_stored(skeleton, name, part, shards) for name, part in parts.items()})
    inside = f"{skeleton.prefix}."
    splits = skeleton.names.splits(shards.names())
    shards = shards.split({name: part for name, part in splits.items() if here(name).startswith(inside)})
    linears = {f"{name}.weight" for name, module in skeleton.model.named_modules() if isinstance(module, nn.Linear)}
    for axis, groups in skeleton.names.joins(set(shards.names())).items():
        own = {name: parts for name, parts in groups.items() if here(name) in linears and here(name).startswith(inside)}
        shards = shards.joined(own, axis, keep=False)
    turned = {f"{name}.weight" for name, module in skeleton.model.named_modules() if isinstance(module, Turned)}
    return shards.turned(name for name in shards.names() if turned and here(name) in turned)


def _as_stored(skeleton: Skeleton, name: str, part: Part, shards: Shards) -> Part:
    """The part, turned if the tensor is stored so: as in transformers, where its shape does not fit as it is."""
    if part.tensor not in shards or not name.endswith(".weight"):
        return part
    *_, rows, columns = shards.shape(part.tensor)
    linear: Any = skeleton.model.get_submodule(name.removesuffix(".weight"))
    fits = (rows if part.transposed else columns) == linear.in_features
    return part if fits else replace(part, transposed=not part.transposed)


def decoder_layers(model: PreTrainedModel, where: Path | str) -> tuple[str, nn.ModuleList]:
    """The decoder layers of a model and their name in it, like model.layers. ArmorError, naming `where`, if none."""
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    counts = {count, getattr(config, "num_layers", count)}  # LongCat-Flash counts two layers for each that it has
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) in counts}
    for part in (model.get_decoder(), model.base_model):  # a wrapper's other models may have as many layers
        inside = {id(module) for module in part.modules()}
        if found := {name: layers for name, layers in lists.items() if id(layers) in inside}:
            return max(found.items(), key=lambda item: _weights_of_linears(item[1]))
    raise ArmorError(
        f"{where}: {type(model).__name__} has no list of decoder layers (num_hidden_layers is {count}); "
        "expected a decoder-only transformer"
    )


def _weights_of_linears(layers: nn.Module) -> int:
    """How many weights the linears in `layers` have."""
    return sum(module.weight.numel() for module in layers.modules() if isinstance(module, nn.Linear))
