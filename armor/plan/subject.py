"""A model as a plan sees it: its topology, and what each recipe will make of it, as folders of holes.

A recipe's checkpoint is written with its real header and no data (`armor.format.holes`). So whatever reads headers
answers for it as it will for the real one: the bytes on disk, the memory of an evaluation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from armor.assemble.folder import copy_others
from armor.assemble.writer import bits_per_weight, tensor_bytes
from armor.config.run import Config
from armor.core.errors import ArmorError
from armor.execution.files import read_json, write_json
from armor.factorize.asked import choices_of, layouts_of, stored_bits
from armor.format.checkpoint import PackedLinear, quantization_config
from armor.format.holes import Hole, write_holes
from armor.format.layout import Results
from armor.format.records.topology import DecoderLayer, Topology
from armor.format.shards import DTYPES, SINGLE, Shards
from armor.model.inspect import inspect
from armor.model.outline import outline
from armor.model.source import Source
from armor.model.tensors import recorded_tensors
from armor.runtime.calls import State, moved, observe, states_of
from armor.runtime.filling import load_outside
from armor.runtime.skeleton import Skeleton, compute_dtype, open_skeleton, tensors_of
from armor.training.memory import Shapes

__all__ = ["Packed", "Subject", "subject"]

CODES = {name: code for code, (name, _) in DTYPES.items()}
"""safetensors' name of a dtype by torch's."""
FOLLOWED = 4096
"""Tokens at most that are followed through a model; states of longer sequences take as much more."""


@dataclass(frozen=True)
class Packed:
    """What a recipe will make of a model: a checkpoint of holes, its linears by name, the factors of each layer."""

    folder: Path
    shards: Shards
    modules: dict[str, PackedLinear]
    layers: tuple[Shapes, ...]
    linear_bytes: dict[str, int]
    bits: float
    """A weight of the decoder layers' linears takes, in the mean."""
    more_bytes: int
    """That a budget spends beyond what the folder has, which is as the recipe says without it."""

    def layer_bytes(self, layer: DecoderLayer) -> int:
        """Those of the factors of a decoder layer's linears."""
        return sum(self.linear_bytes.get(linear.name, 0) for linear in layer.linears)

    @property
    def weights_bytes(self) -> int:
        """Those of the safetensors files."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors")) + self.more_bytes


@dataclass(frozen=True)
class Subject:
    """The model `name` of a configuration, from its headers in `folder`, and by recipe what it will become."""

    name: str
    folder: Path
    topology: Topology
    shards: Shards
    packed: dict[str, Packed]

    @cached_property
    def _skeleton(self) -> Skeleton:
        skeleton = open_skeleton(self.folder, compute_dtype(self.topology.dtype))
        load_outside(skeleton, tensors_of(skeleton, self.folder), values=False)
        return skeleton

    @cached_property
    def _largest(self) -> dict[tuple[torch.dtype, str | None], tuple[int, int]]:
        """What `largest_layer` has found."""
        return {}

    @cached_property
    def _states(self) -> dict[int, list[State]]:
        """By the length of a sequence, what goes into every decoder layer and comes out of the last."""
        return {}

    def state_bytes(self, length: int, dtype: torch.dtype) -> list[int]:
        """The bytes of what goes into every decoder layer, and out of the last, for a sequence of `length` tokens.

        Those are hidden states, floats in `dtype`, and what is carried with them to later layers.
        """
        followed = min(length, FOLLOWED)
        if followed not in self._states:
            tokens = torch.arange(followed).remainder(self.vocabulary)[None]
            self._states[followed] = states_of(*observe(self._skeleton, tokens))
        of_followed = [sum(t.nbytes for t in moved(state, "meta", dtype)) for state in self._states[followed]]
        return [size * length // followed for size in of_followed]

    def largest_layer(self, dtype: torch.dtype, owner: str | None) -> tuple[int, int]:
        """The bytes of the largest decoder layer, floats in `dtype`, dense or as recipe `owner` packs it.

        The second are those of the largest with one expert alone, as where they are read apart (`armor.runtime.apart`).
        """
        if (known := self._largest.get((dtype, owner))) is not None:
            return known
        shards = (self if owner is None else self.packed[owner]).shards
        place = {
            linear.name: (layer.prefix, number)
            for layer in self.topology.layers
            for number, linears in layer.experts().items()
            for linear in linears
        }
        experts: Counter[tuple[str, int]] = Counter()
        rest = Counter({layer.prefix: 0 for layer in self.topology.layers})
        layers = self.topology.layers[0].prefix.rpartition(".")[0]
        for name in shards.names():
            if name.startswith(f"{layers}."):
                stored = getattr(torch, shards.dtype(name))
                size = math.prod(shards.shape(name)) * (dtype if stored.is_floating_point else stored).itemsize
                index = name.removeprefix(f"{layers}.").partition(".")[0]
                expert = place.get(name.rpartition(".")[0])
                if expert is None:
                    rest[f"{layers}.{index}"] += size
                else:
                    experts[expert] += size
        whole, one = rest.copy(), Counter[str]()
        for (prefix, _), size in experts.items():
            whole[prefix] += size
            one[prefix] = max(one[prefix], size)
        found = max(whole.values()), max(size + one[prefix] for prefix, size in rest.items())
        self._largest[dtype, owner] = found
        return found

    def outside_names(self, head: bool = False) -> list[str]:
        """The tensors of the base model outside of its decoder layers; with `head`, those beside it too."""
        layers = self.topology.layers[0].prefix.rpartition(".")[0]
        base = f"{layers.rpartition('.')[0]}." if "." in layers else ""
        return [n for n in self.shards.names() if not n.startswith(f"{layers}.") and (head or n.startswith(base))]

    def outside(self, itemsize: int, head: bool = False) -> int:
        """The bytes of these tensors, each number of `itemsize`."""
        return self._bytes(self.outside_names(head), itemsize)

    def loaded_bytes(self, owner: str | None, dtype: str = "auto") -> int:
        """The memory for its weights, dense or as recipe `owner` packs them."""
        from armor.runtime.load import weights_bytes

        found = self if owner is None else self.packed[owner]
        return weights_bytes(found.folder, dtype, found.shards)

    @property
    def vocabulary(self) -> int:
        """The logits that it gives for a token."""
        from armor.runtime.folder import read_config

        return read_config(self.folder).get_text_config().vocab_size

    @property
    def weights_bytes(self) -> int:
        """Those of its safetensors files."""
        return sum((self.folder / file).stat().st_size for file in self.shards.files)

    @property
    def table_bytes(self) -> int:
        """Those of the table of embeddings, the largest matrix of the base model outside of its layers."""
        outside = self.outside_names()
        return max((self.shards.bytes_of(name) for name in outside if len(self.shards.shape(name)) == 2), default=0)

    @property
    def dense_bits(self) -> float:
        """Bits that a weight of the decoder layers' linears takes in the source."""
        size = sum(self.shards.stored_bytes(f"{linear.name}.weight") for linear in self.topology.linears())
        return 8 * size / self.topology.linear_parameters

    def _bytes(self, names: Iterable[str], itemsize: int) -> int:
        return itemsize * sum(math.prod(self.shards.shape(name)) for name in names)


def subject(config: Config, name: str, results: Path) -> Subject:
    """The model `name` of `config`; its folders of holes and its model.json go into `results`, a temporary one."""
    place = Path(Results(str(results)).topology(name))
    place.parent.mkdir(parents=True)
    (place.parent / "outline").mkdir()
    folder = outline(config.models[name], place.parent / "outline")
    topology = inspect(Source(folder, "planned", Shards(folder).main_dtype()), place)
    shards = recorded_tensors(folder, (linear.name for linear in topology.linears()))
    recipes = [recipe for model, recipe in config.pairs() if model == name and not config.is_dense(recipe)]
    owners = dict.fromkeys(config.owner(recipe) for recipe in recipes)
    packed = {owner: _packed(config, owner, topology, shards, place.parent / owner) for owner in owners}
    return Subject(name, folder, topology, shards, packed)


def _packed(config: Config, recipe: str, topology: Topology, shards: Shards, folder: Path) -> Packed:
    """What the factorization of `recipe` will make, into `folder`."""
    modules: dict[str, PackedLinear] = {}
    holes: dict[str, Hole] = {}
    layers, of_linears = [], {}
    for layer in topology.layers:
        settings, own = config.layer_settings(recipe, layer.index), {}
        dtypes = {linear.name: linear.dtype for linear in layer.linears}
        for linear, layout in layouts_of(layer, settings).items():
            modules[linear] = layout
            factors = _factors(linear, layout, dtypes[linear])
            of_linears[linear] = sum(hole.bytes for hole in factors.values())
            own |= factors
        layers.append({name: hole.shape for name, hole in own.items()})
        holes |= own
    size_of = {name: hole.bytes for name, hole in holes.items()}
    written = tensor_bytes(shards, size_of, modules)
    folder.mkdir()
    write_holes(folder / SINGLE, {n: holes.get(n) or _copied(shards, n, size) for n, size in written.items()})
    copy_others(shards.folder, folder)
    described = read_json(shards.folder / "config.json")
    described.pop("quantization_config", None)
    if modules:
        described["quantization_config"] = quantization_config(modules)
    write_json(folder / "config.json", described)
    bits, _ = bits_per_weight(topology, size_of, shards)
    spent = _budget(config, recipe, topology) or bits
    more = round((spent - bits) * topology.linear_parameters / 8)
    return Packed(folder, Shards(folder), modules, tuple(layers), of_linears, spent, more)


def _budget(config: Config, recipe: str, topology: Topology) -> float | None:
    """The bits per weight that `recipe` has to spend. Raises ArmorError where no choices come to them."""
    budget = config.recipes[recipe].budget
    if budget is None:
        return None
    offered = []
    for layer in topology.layers:
        settings = config.layer_settings(recipe, layer.index)
        for linear in layer.linears:
            offered.append([stored_bits(linear, asked) for _, asked in choices_of(linear, settings)])
    try:
        budget.check(offered, topology.linear_parameters)
    except ArmorError as error:
        raise ArmorError(f"recipes.{recipe}: {error}") from error
    return budget.bits


def _factors(name: str, layout: PackedLinear, dtype: str) -> Mapping[str, Hole]:
    """The tensors of a compressed linear."""
    dtypes, floats = layout.dtypes(), "bfloat16" if layout.quantization else dtype
    found = {}
    for suffix, shape in layout.shapes().items():
        code = CODES[dtypes.get(suffix, floats)]
        found[f"{name}.{suffix}"] = Hole(code, shape, math.prod(shape) * DTYPES[code][1])
    return found


def _copied(shards: Shards, name: str, size: int) -> Hole:
    """A tensor of the source; one that has another size there is the mark that stops other readers."""
    if size != shards.bytes_of(name):
        return Hole("U8", (size,), size)
    return Hole(CODES[shards.dtype(name)], shards.shape(name), size)
