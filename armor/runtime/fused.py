"""From transformers' module that holds all experts of a layer to one that has them as modules of their own.

transformers has a few tensors for all experts, (expert, out, in), and multiplies with slices of them. Most checkpoints
on the Hub hold a weight for each expert, and transformers fuses them while it loads. Others hold the fused tensors;
their experts get names of the same kind here (`parts_of`). `unfuse` puts an `Experts` in the place of the fused module.
What is stored in another form, or is not called by transformers' experts interface, stays as it is, but for families
that have an adapter (`armor.runtime.families`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from armor.format.shards import Part
from armor.runtime.experts import Expert, Experts
from armor.runtime.families import ADAPTERS
from armor.runtime.names import Names

__all__ = ["fused_experts", "mixtures", "parts_of", "routers", "unfuse"]

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that hold several experts in a tensor and are called by transformers' experts interface.

    Those with a norm behind each expert, or with tensors beside the experts', are not among them.
    """
    found = {}
    for name, module in model.named_modules():
        if adapter := ADAPTERS.get(type(module).__name__):
            for flag in FLAGS:
                setattr(module, flag, adapter.LAYOUT.get(flag, flag == "has_gate"))
        flags = [getattr(module, flag, None) for flag in FLAGS]
        if None in flags or getattr(module, "has_post_expert_norm", False):  # transformers 5.19 knows no such norm
            continue
        own = {n for n, _ in module.named_parameters()} | {n for n, _ in module.named_buffers()}
        expected = {_first(module), "down_proj"}
        expected |= {f"{n}_bias" for n in expected} if flags[1] else set()
        if own == expected:
            found[name] = module
    return found


def mixtures(layer: nn.Module) -> dict[str, int]:
    """The names, within `layer`, of modules that hold experts, and how many each holds."""
    found = {path: module.count for path, module in layer.named_modules() if isinstance(module, Experts)}
    return found | {path: len(module.get_parameter("down_proj")) for path, module in fused_experts(layer).items()}


def routers(layer: nn.Module) -> list[str]:
    """The names, within `layer`, of linears that choose or weigh experts: beside them, with one output for each or one.

    And those that are in a router by name, whatever experts it has. They are small, and what an error in them does is
    out of proportion to that.
    """
    found = [
        name for name, module in layer.named_modules() if isinstance(module, nn.Linear) and "router" in name.split(".")
    ]
    for path, count in mixtures(layer).items():
        above = path.rpartition(".")[0]
        for name, beside in layer.get_submodule(above).named_modules(prefix=above):
            inside = f"{name}.".startswith(f"{path}.")
            if isinstance(beside, nn.Linear) and not inside and beside.out_features in (1, count):
                found.append(name)
    return found


def unfuse(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Put an Experts in the place of each fused module that checkpoints store as it is, or expert by expert.

    Weights are views of the fused tensors where their layout allows it, on their device. Returns the modules that were
    replaced, by name.
    """
    replaced = {}
    if fused := fused_experts(model):
        names = Names(model)
        for path, module in fused.items():
            stored = [_sources(names.converters, f"{path}.{tensor}") for tensor in (_first(module), "down_proj")]
            leaves = _leaves(module, path, stored)
            if leaves is not None:
                model.set_submodule(path, _unfused(module, leaves, stored == [None, None]))
                replaced[path] = module
    return replaced


def parts_of(model: nn.Module) -> dict[str, Part]:
    """The tensors of experts of `model` that checkpoints store fused, by name, as parts of tensors of transformers'."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Experts) and module.is_stored_fused:
            leaves = dict(module.get_submodule("0").named_children())
            width: Any = leaves[[*leaves][-1]].in_features
            for name, part in _parts(module.fused, [*leaves], module.count, width).items():
                found[f"{path}.{name}"] = replace(part, tensor=f"{path}.{part.tensor}")
    return found


def _first(fused: nn.Module) -> str:
    """The tensor that comes before the activation."""
    return "gate_up_proj" if fused.has_gate else "up_proj"


def _sources(converters: Sequence[WeightConverter], tensor: str) -> list[str] | None:
    """The tensors of a checkpoint, with * for the expert's number, that transformers stacks and joins into `tensor`.

    Their order is that in which they are joined. None where it takes `tensor` as it is or turned, nothing where it does
    more.
    """
    for converter in converters:
        back = converter.reverse_transform()
        renamed, pattern = back.rename_source_key(tensor)
        if pattern is not None:
            if [type(step) for step in converter.operations] == [Transpose]:
                return None  # which way it is stored, shapes tell
            if any(type(step) not in (MergeModulelist, Concatenate) for step in converter.operations):
                return []
            return [renamed.replace(back.target_patterns[0], target) for target in back.target_patterns]
    return None


def _leaves(module: nn.Module, path: str, stored: list[list[str] | None]) -> tuple[str, ...] | None:
    """The names of the linears of an expert of the fused module at `path`: gate (if it has one), up, down.

    `stored` are the sources of its two tensors. None where they are stored in another form.
    """
    if stored == [None, None]:
        return ("gate_proj", "up_proj", "down_proj") if module.has_gate else ("up_proj", "down_proj")
    leaves = [name.removeprefix(f"{path}.*.").removesuffix(".weight") for names in stored for name in names or ()]
    is_plain = len(leaves) == (3 if module.has_gate else 2) and not module.is_transposed and not module.has_bias
    return tuple(leaves) if is_plain and not any("." in leaf or "*" in leaf for leaf in leaves) else None


def _parts(fused: nn.Module, leaves: Sequence[str], count: int, width: int) -> dict[str, Part]:
    """The tensors of `count` experts of a fused module, by their name in an Experts, as parts of the module's.

    `width` is the number of inputs of an expert's down projection.
    """
    *first, down = leaves
    halves = [slice(width), slice(width, None)] if fused.is_concatenated else [slice(0, None, 2), slice(1, None, 2)]
    rows = dict(zip(leaves, [*(halves if len(first) == 2 else [slice(None)]), slice(None)], strict=True))
    found = {}
    for expert, leaf in itertools.product(range(count), leaves):
        tensor = "down_proj" if leaf == down else _first(fused)
        weight = Part(tensor, expert, rows[leaf], bool(fused.is_transposed))
        found[f"{expert}.{leaf}.weight"] = weight
        if fused.has_bias:
            found[f"{expert}.{leaf}.bias"] = replace(weight, tensor=f"{tensor}_bias", transposed=False)
    return found


class _Given(nn.Linear):
    """A linear that draws no weight, for it is given one. Of tens of thousands of experts that takes minutes."""

    def reset_parameters(self) -> None:
        pass


def _unfused(fused: nn.Module, leaves: Sequence[str], is_stored_fused: bool) -> Experts:
    """An Experts of the fused module's tensors, which it loses."""
    tensors: Any = {name: fused._parameters.pop(name) for name in tuple(fused._parameters)}
    count, *shape = tensors["down_proj"].shape
    parts = _parts(fused, leaves, count, shape[0 if fused.is_transposed else 1])
    own = {name: part.of(tensors[part.tensor][part.expert]).detach() for name, part in parts.items()}

    def linear(name: str) -> nn.Linear:
        rows, columns = own[f"{name}.weight"].shape
        made = _Given(columns, rows, f"{name}.bias" in own, "meta")
        for kind, _ in list(made.named_parameters()):
            made.register_parameter(kind, nn.Parameter(own[f"{name}.{kind}"], requires_grad=False))
        return made

    experts = [Expert({leaf: linear(f"{expert}.{leaf}") for leaf in leaves}) for expert in range(count)]
    return ADAPTERS.get(type(fused).__name__, Experts)(fused, experts, is_stored_fused)
