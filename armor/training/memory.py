"""What training takes at its peak, in bytes, from shapes alone: a device too small is refused before work starts.

Everything that is trained takes 16 bytes a number: value, gradient and two moments; a look has the rounded value in the
place of the gradient. All else of the model takes 4. The best values stay on the host, whatever computes: up to 4 bytes
a number. So do the dense model's predictions. The inside of a layer is A·S·B, what its rounding keeps for the gradient
where S holds integers, and what goes into and comes out of the linears for one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from armor.execution.files import open_safetensors
from armor.format.checkpoint import SUFFIXES
from armor.format.records.topology import Topology
from armor.format.records.tune import KEPT_TOKENS
from armor.format.shards import Shards
from armor.training.spread import spread

__all__ = [
    "Shapes",
    "best_bytes",
    "factor_shapes",
    "predictions_bytes",
    "refine_bytes",
    "saved_bytes",
    "sensitivity_bytes",
    "tune_bytes",
]

Shapes = Mapping[str, Sequence[int]]
"""The tensors of a layer's factors file by full name, int4 numbers one by one."""


def factor_shapes(file: Path) -> Shapes:
    """Those of the factors file `file`, from its header."""
    found = {}
    with open_safetensors(file) as opened:
        for name in opened.keys():
            part = opened.get_slice(name)
            rows, *others = part.get_shape()
            two_in_a_byte = name.endswith(".core_values") and part.get_dtype() == "U8"
            found[name] = [rows, 2 * others[0]] if two_in_a_byte else [rows, *others]
    return found


@dataclass(frozen=True)
class _Layer:
    """Numbers of one layer: trained, fixed; weights that A·S·B stands for; those of them whose S holds integers; rows
    and columns of its linears, summed.

    `replaced` are the source's tensors in whose place the factors stand.
    """

    trained: int
    fixed: int
    weights: int
    rounded: int
    features: int
    replaced: set[str]

    @classmethod
    def of(cls, shapes: Shapes, core: bool) -> _Layer:
        trained = fixed = weights = rounded = features = 0
        replaced = set()
        for name, shape in shapes.items():
            module, _, suffix = name.rpartition(".")
            entries = math.prod(shape)
            if suffix == "core_mask":
                fixed += entries
                weights += 8 * entries
                rounded += 8 * entries if f"{module}.core_scales" in shapes else 0
                features += shape[0] + 8 * shape[1]
            elif suffix in ("core_values", "core_scales") and not core:
                fixed += 4 * entries
            else:
                trained += entries
            replaced.add(f"{module}.weight" if suffix in SUFFIXES else name)
        return cls(trained, fixed, weights, rounded, features, replaced)

    def inside(self, length: int, recompute: bool = False) -> int:
        """Its inside with one sequence of `length` tokens."""
        return (12 if recompute else 20) * self.weights + 20 * self.rounded + 12 * length * self.features


def best_bytes(layers: Iterable[Shapes], core: bool) -> int:
    """What the best values of all `layers` take on the host."""
    return sum(4 * _Layer.of(shapes, core).trained for shapes in layers)


def predictions_bytes(tokens: int) -> int:
    """What is kept on the host of the dense model's predictions of so many tokens."""
    return 4 * (2 * KEPT_TOKENS + 1) * tokens


def saved_bytes(layers: Iterable[Shapes], core: bool) -> int:
    """What a training of all `layers` needs on disk: two looks at once, values, moments and best values in each."""
    return sum(2 * 16 * _Layer.of(shapes, core).trained for shapes in layers)


def refine_bytes(shards: Shards, prefix: str, shapes: Shapes, core: bool, length: int) -> int:
    """The memory of a decoder layer (`prefix`) while it is trained on sequences of `length` tokens.

    `core`: whether the values of S are trained too.
    """
    layer = _Layer.of(shapes, core)
    others = (name for name in shards.names() if name.startswith(f"{prefix}.") and name not in layer.replaced)
    return 16 * layer.trained + layer.fixed + 4 * _entries(shards, others) + layer.inside(length)


def tune_bytes(
    shards: Shards, layers: Iterable[Shapes], core: bool, length: int, recompute: bool = True, devices: int = 1
) -> tuple[list[int], int]:
    """The device of each layer while the whole model is trained, and the memory of the fullest of `devices`.

    `core`: whether the values of S are trained too. With `recompute` the inside of one layer at a time is there. The
    first device also has what is outside of the layers, and the logits.
    """
    found = [_Layer.of(shapes, core) for shapes in layers]
    inside = [layer.inside(length, recompute) for layer in found]
    kept = [16 * layer.trained + layer.fixed for layer in found]
    if not recompute:
        kept = [sum(own) for own in zip(kept, inside, strict=True)]
    replaced = set().union(*(layer.replaced for layer in found))
    left = [name for name in shards.names() if name not in replaced]
    vocabulary = max((shards.shape(name)[0] for name in left if len(shards.shape(name)) == 2), default=0)
    outside = 4 * _entries(shards, left) + 12 * length * vocabulary
    places, held = spread(kept, devices, outside), [outside] + [0] * (devices - 1)
    for place, own in zip(places, kept, strict=True):
        held[place] += own
    return places, max(held) + (max(inside) if recompute else 0)


def sensitivity_bytes(topology: Topology, length: int, itemsize: int) -> int:
    """The memory of a decoder layer while its gradients are taken on one sequence of `length` tokens.

    These are its weights and their gradients, the squares of the largest of them in float32, twice, and what the
    backward pass keeps of the sequence.
    """
    peaks = [0]
    for layer in topology.layers:
        entries = [linear.out_features * linear.in_features for linear in layer.linears]
        features = sum(linear.out_features + linear.in_features for linear in layer.linears)
        peaks.append(2 * itemsize * sum(entries) + 8 * max(entries, default=0) + 3 * itemsize * length * features)
    return max(peaks)


def _entries(shards: Shards, names: Iterable[str]) -> int:
    return sum(math.prod(shards.shape(name)) for name in names)
