"""What a model is made of, as `armor inspect` found it: decoder layers, their linears, and which share an input.

Read without torch, for the workflow needs the number of layers before any job runs. Linears with the same
`input_group` in a layer are fed the same tensor (q, k and v; gate and up), so they share their statistics.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from armor.errors import ArmorError
from armor.execution.files import read_json

__all__ = ["FORMAT_VERSION", "DecoderLayer", "Linear", "Topology", "read_topology"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Linear:
    """A linear y = W x (+ bias) of a decoder layer; its weight (out, in) is the tensor `{name}.weight` of `shard`."""

    name: str
    out_features: int
    in_features: int
    dtype: str
    bias: bool
    shard: str
    input_group: int


@dataclass(frozen=True)
class DecoderLayer:
    """A decoder layer; its tensors are those whose name starts with `prefix` and a dot.

    `dense_parameters` are matrices that belong to no linear and stay as they are.
    """

    index: int
    prefix: str
    linears: tuple[Linear, ...]
    dense_parameters: tuple[str, ...] = ()

    def groups(self) -> list[list[Linear]]:
        """The linears by shared input, in order; the first of each group gives the statistics their name."""
        found: dict[int, list[Linear]] = {}
        for linear in self.linears:
            found.setdefault(linear.input_group, []).append(linear)
        return list(found.values())


@dataclass(frozen=True)
class Topology:
    """A model: its decoder layers, and counts. `context_length` is in tokens, None if the model does not say."""

    model_type: str
    fingerprint: str
    dtype: str
    context_length: int | None
    hidden_size: int
    parameters: int
    linear_parameters: int
    tied_embeddings: bool
    layers: tuple[DecoderLayer, ...]

    def linears(self) -> list[Linear]:
        """All linears of all decoder layers, in order."""
        return [linear for layer in self.layers for linear in layer.linears]

    def to_json(self) -> dict:
        """The content of model.json."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}


def read_topology(path: Path | str) -> Topology:
    """Read model.json. Raises ArmorError if it is missing or of another format."""
    value = read_json(path)
    version = value.pop("format_version", None)
    if type(version) is not int or version != FORMAT_VERSION:
        raise ArmorError(f"{path}: format {version!r}, expected {FORMAT_VERSION}; run armor inspect again")
    try:
        layers = tuple(
            DecoderLayer(
                **(
                    layer
                    | {
                        "linears": tuple(Linear(**linear) for linear in layer["linears"]),
                        "dense_parameters": tuple(layer["dense_parameters"]),
                    }
                )
            )
            for layer in value["layers"]
        )
        return Topology(**(value | {"layers": layers}))
    except (KeyError, TypeError) as error:
        raise ArmorError(f"{path}: not a model.json of this version ({error}); run armor inspect again") from None
