"""model.json: what a model is made of. Read without torch: the workflow needs the number of layers before any job."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import ClassVar, Literal

from armor.core.errors import ArmorError
from armor.core.typed import Typed
from armor.format.records.base import Record

__all__ = ["DecoderLayer", "Linear", "Topology"]

EXPERT = re.compile(r"\.experts\.(\d+)\.")


class Linear(Typed):
    """A linear y = W x (+ bias) of a decoder layer; its weight (out, in) is the tensor `{name}.weight` of `shard`."""

    name: str
    """The full name of the module, like model.layers.0.mlp.up_proj."""
    out_features: int
    """The rows of the weight."""
    in_features: int
    """The columns of the weight."""
    dtype: str
    """The dtype of the weight."""
    bias: bool
    """Whether it has a bias."""
    shard: str
    """The safetensors file that holds the weight."""
    input_group: int
    """Linears of a layer with the same number are fed the same tensor, and share their statistics."""


class DecoderLayer(Typed):
    """A decoder layer; its tensors are those whose name starts with `prefix` and a dot."""

    index: int
    """Its number, from 0."""
    prefix: str
    """The full name of its module, like model.layers.0."""
    linears: tuple[Linear, ...]
    """The linears that can be compressed, in the model's order."""
    dense_parameters: tuple[str, ...] = ()
    """Matrices that stay as they are: they belong to no linear, or to one that is not called as one."""

    def groups(self) -> list[list[Linear]]:
        """The linears by shared input, in order; the first of each group gives the statistics their name."""
        found: dict[int, list[Linear]] = {}
        for linear in self.linears:
            found.setdefault(linear.input_group, []).append(linear)
        return list(found.values())

    def experts(self) -> dict[int, list[Linear]]:
        """The linears of each expert of its mixture, by the expert's number; none where it has no mixture."""
        found: dict[int, list[Linear]] = {}
        for linear in self.linears:
            if expert := EXPERT.search(linear.name):
                found.setdefault(int(expert[1]), []).append(linear)
        return found

    def group(self, experts: str) -> DecoderLayer:
        """The same layer with the linears of a group of experts alone, given as first and last, like 0-63.

        Raises ArmorError for others than it has.
        """
        own, (first, _, last) = self.experts(), experts.partition("-")
        if not (first.isdigit() and last.isdigit() and int(first) <= int(last) and {int(first), int(last)} <= {*own}):
            raise ArmorError(
                f"experts: found {experts!r}, expected FIRST-LAST of the {len(own)} experts of layer {self.index}"
            )
        return self.only({linear.name for n in range(int(first), int(last) + 1) for linear in own.get(n, ())})

    def only(self, names: Collection[str]) -> DecoderLayer:
        """The same layer with those of its linears alone that have one of the `names`."""
        return self.replace(linears=tuple(linear for linear in self.linears if linear.name in names))


class Topology(Record):
    """`{model}/model.json`, by `armor inspect`: decoder layers, their linears, and which of these share an input."""

    AGAIN: ClassVar[str] = "run armor inspect again"

    format_version: Literal[2] = 2
    model_type: str
    """transformers' name of the architecture."""
    fingerprint: str
    """That of source.json."""
    dtype: str
    """The dtype of most of the weights' bytes."""
    context_length: int | None
    """Tokens; null if the model does not say."""
    hidden_size: int
    """The width of the hidden states."""
    parameters: int
    """All parameters of the model, tied ones counted once."""
    linear_parameters: int
    """The weights of the linears of all decoder layers."""
    decoder_parameters: int
    """All parameters of all decoder layers."""
    tied_embeddings: bool
    """Whether the output head is the embedding."""
    layers: tuple[DecoderLayer, ...]
    """The decoder layers in order."""

    def linears(self) -> list[Linear]:
        """All linears of all decoder layers, in order."""
        return [linear for layer in self.layers for linear in layer.linears]

    def has_experts(self) -> bool:
        """Whether it is a mixture of experts."""
        return any(layer.experts() for layer in self.layers)

    def compressed_share(self, kept_dense: Collection[str] = ()) -> float:
        """The share of the decoder layers' weights that is compressed where the linears `kept_dense` are not."""
        kept = set(kept_dense)
        numbers = (linear.out_features * linear.in_features for linear in self.linears() if linear.name not in kept)
        return sum(numbers) / self.decoder_parameters
