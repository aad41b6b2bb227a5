"""The file with the factorizations of one decoder layer, layer_{k}.safetensors.

Tensors are keyed by module name. Training changes norms and biases of the layer too: these stand beside the factors
under their own full names, and take the place of the source's. There is one entry of metadata: several would be written
in random order, and the same factors would not give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from armor.core.errors import ArmorError
from armor.core.factorization import SUFFIXES, Factorization, owner
from armor.core.pattern import Pattern
from armor.core.quantization import Quantization
from armor.execution.files import atomic_path, open_safetensors, save_safetensors, sha256
from armor.format.holes import Hole, write_holes
from armor.format.names import record_beside
from armor.format.records.layer import LayerRecord
from armor.format.shards import DTYPES, PIECE

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FACTORS_VERSION",
    "INTEGER_FACTORS_VERSION",
    "TRAINED_FACTORS_VERSION",
    "FactorsHeader",
    "join_factors",
    "read_factors",
    "read_others",
    "read_start",
    "write_factors",
]

FACTORS_VERSION = 1
TRAINED_FACTORS_VERSION = 2
"""That of a trained layer, whose file holds other tensors too: who reads version 1 alone would lose them."""
INTEGER_FACTORS_VERSION = 3
"""That of a file with factors that are quantized, share B, or have a pair of low rank."""


def write_factors(
    path: Path, factors: Mapping[str, Factorization], metadata: dict, others: Mapping[str, Tensor] | None = None
) -> None:
    """Write the factors of one decoder layer, by module name, atomically; same input, same bytes.

    `others` are further tensors of the layer by full name, those that training changed.
    """
    tensors = {f"{name}.{key}": t for name, f in factors.items() for key, t in f.tensors().items()}
    modules = {
        name: {"pattern": str(f.pattern), "in_features": f.core.shape[1], "loss": f.loss, "start_loss": f.start_loss}
        | ({"quantization": asdict(f.quantization)} if f.quantization else {})
        | ({"right_of": f.right_of} if f.right_of else {})
        for name, f in factors.items()
    }
    version = TRAINED_FACTORS_VERSION if others else FACTORS_VERSION
    if any(f.quantization or f.right_of or f.up is not None for f in factors.values()):
        version = INTEGER_FACTORS_VERSION
    header = {"format_version": version, **metadata, "modules": modules}
    if others:
        header["others"] = sorted(others)
    save_safetensors(path, {**tensors, **(others or {})}, {"armor": json.dumps(header, sort_keys=True)})


def join_factors(path: Path, parts: Sequence[Path], metadata: dict) -> None:
    """Write the factors of the files `parts` as one, atomically: the file that `write_factors` makes of them all.

    They are copied from file to file, and take no memory. Raises ArmorError for another file, and for a module in two.
    """
    places: dict[str, tuple[Hole, Path, int]] = {}
    modules, version = {}, FACTORS_VERSION
    for part in parts:
        with open_safetensors(part) as file:
            header = _header(part, file)
            pieces = [(name, file.get_slice(name)) for name in file.offset_keys()]
        if twice := modules.keys() & header["modules"].keys():
            raise ArmorError(f"{part}: {min(twice)}: is in another of the files too; give each expert once")
        modules |= header["modules"]
        version = max(version, header["format_version"])
        holes = {name: _hole(piece.get_dtype(), piece.get_shape()) for name, piece in pieces}
        start = part.stat().st_size - sum(hole.bytes for hole in holes.values())  # they fill the file to its end
        for name, hole in holes.items():
            places[name] = hole, part, start
            start += hole.bytes
    # The order of safetensors' own writer: wide numbers first, so that all are aligned.
    order = sorted(places, key=lambda name: (-DTYPES[places[name][0].dtype][1], places[name][0].dtype, name))
    text = json.dumps({"format_version": version, **metadata, "modules": modules}, sort_keys=True)
    with atomic_path(path) as temporary:
        write_holes(temporary, {name: places[name][0] for name in order}, {"armor": text})
        with open(temporary, "r+b") as target:
            target.seek(temporary.stat().st_size - sum(hole.bytes for hole, *_ in places.values()))
            for name in order:
                hole, part, start = places[name]
                with open(part, "rb") as file:
                    file.seek(start)
                    for begin in range(0, hole.bytes, PIECE):
                        target.write(file.read(min(PIECE, hole.bytes - begin)))


def _hole(dtype: str, shape: Sequence[int]) -> Hole:
    return Hole(dtype, shape, math.prod(shape) * DTYPES[dtype][1])


def read_factors(path: Path) -> tuple[dict[str, Factorization], dict]:
    """The factors of one decoder layer by module name, and their metadata. Raises ArmorError for another file."""
    with open_safetensors(path) as file:
        header = _header(path, file)
        factors = {}
        for name, module in header["modules"].items():
            holder, stored = module.get("right_of"), file.keys()
            places = {key: f"{owner(name, key, holder)}.{key}" for key in SUFFIXES}
            tensors = {key: file.get_tensor(place) for key, place in places.items() if place in stored}
            quantization = Quantization(**module["quantization"]) if "quantization" in module else None
            found = Factorization.of_tensors(
                tensors, module["in_features"], Pattern.parse(module["pattern"]), quantization
            )
            factors[name] = replace(found, loss=module["loss"], start_loss=module["start_loss"], right_of=holder)
        return factors, header


def read_others(path: Path) -> dict[str, Tensor]:
    """The other tensors of the layer in a factors file, by full name. Raises ArmorError for another file."""
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in _header(path, file).get("others", ())}


@dataclass(frozen=True)
class FactorsHeader:
    """What a factors file says of itself: its model's fingerprint, pattern and quantization of each linear, the other
    tensors."""

    fingerprint: str | None
    patterns: dict[str, str]
    quantizations: dict[str, Quantization | None]
    others: tuple[str, ...]

    @classmethod
    def of(cls, file: Any) -> FactorsHeader:
        """The header of an opened safetensors file; one of another kind of file is empty."""
        header = json.loads((file.metadata() or {}).get("armor", "{}"))
        modules = header.get("modules", {})
        patterns = {name: module.get("pattern") for name, module in modules.items()}
        quantizations = {n: Quantization(**q) if (q := m.get("quantization")) else None for n, m in modules.items()}
        return cls(header.get("fingerprint"), patterns, quantizations, tuple(sorted(header.get("others", ()))))


def _header(path: Path, file) -> dict:
    header = json.loads((file.metadata() or {}).get("armor", "{}"))
    found = header.get("format_version", "none")
    if found not in (FACTORS_VERSION, TRAINED_FACTORS_VERSION, INTEGER_FACTORS_VERSION):
        known = f"{FACTORS_VERSION} to {INTEGER_FACTORS_VERSION}"
        raise ArmorError(f"{path}: format version {found}, expected {known}: not a factors file of this release")
    return header


def read_start(factors: Path, fingerprint: str) -> LayerRecord:
    """The record beside a layer's factors, held against them. Raises ArmorError for those of another model."""
    record = LayerRecord.read(record_beside(factors))
    if record.fingerprint != fingerprint:
        raise ArmorError(f"{factors}: factors of another model (its fingerprint differs); factorize it again")
    if not factors.is_file() or sha256(factors) != record.sha256:
        raise ArmorError(f"{factors}: not what the JSON beside it describes; make this layer again")
    return record
