"""The file with the factorizations of one decoder layer, layer_{k}.safetensors.

Tensors are keyed by module name. Training changes norms and biases of the layer too: these stand beside the factors
under their own full names, and take the place of the source's. There is one entry of metadata: several would be written
in random order, and the same factors would not give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from armor.core.errors import ArmorError
from armor.core.factorization import Factorization
from armor.core.packing import unpack
from armor.core.pattern import Pattern
from armor.execution.files import open_safetensors, save_safetensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FACTORS_VERSION",
    "TRAINED_FACTORS_VERSION",
    "FactorsHeader",
    "read_factors",
    "read_others",
    "write_factors",
]

FACTORS_VERSION = 1
TRAINED_FACTORS_VERSION = 2
"""That of a trained layer, whose file holds other tensors too: who reads version 1 alone would lose them."""


def write_factors(
    path: Path, factors: Mapping[str, Factorization], metadata: dict, others: Mapping[str, Tensor] | None = None
) -> None:
    """Write the factors of one decoder layer, by module name, atomically; same input, same bytes.

    `others` are further tensors of the layer by full name, those that training changed.
    """
    tensors = {f"{name}.{key}": t for name, f in factors.items() for key, t in f.tensors().items()}
    modules = {
        name: {"pattern": str(f.pattern), "in_features": f.core.shape[1], "loss": f.loss, "start_loss": f.start_loss}
        for name, f in factors.items()
    }
    header = {"format_version": TRAINED_FACTORS_VERSION if others else FACTORS_VERSION, **metadata, "modules": modules}
    if others:
        header["others"] = sorted(others)
    save_safetensors(path, {**tensors, **(others or {})}, {"armor": json.dumps(header, sort_keys=True)})


def read_factors(path: Path) -> tuple[dict[str, Factorization], dict]:
    """The factors of one decoder layer by module name, and their metadata. Raises ArmorError for another file."""
    with open_safetensors(path) as file:
        header = _header(path, file)
        factors = {}
        for name, module in header["modules"].items():
            keys = [k for k in ("core_values", "core_mask", "left", "right") if f"{name}.{k}" in file.keys()]
            tensors = {k: file.get_tensor(f"{name}.{k}") for k in keys}
            pattern = Pattern.parse(module["pattern"])
            core, mask = unpack(tensors.pop("core_values"), tensors.pop("core_mask"), module["in_features"], pattern)
            factors[name] = Factorization(
                core,
                mask,
                pattern,
                **tensors,
                loss=module["loss"],
                start_loss=module["start_loss"],
            )
        return factors, header


def read_others(path: Path) -> dict[str, Tensor]:
    """The other tensors of the layer in a factors file, by full name. Raises ArmorError for another file."""
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in _header(path, file).get("others", ())}


@dataclass(frozen=True)
class FactorsHeader:
    """What a factors file says of itself: its model's fingerprint, the pattern of each linear, the other tensors."""

    fingerprint: str | None
    patterns: dict[str, str]
    others: tuple[str, ...]

    @classmethod
    def of(cls, file: Any) -> FactorsHeader:
        """The header of an opened safetensors file; one of another kind of file is empty."""
        header = json.loads((file.metadata() or {}).get("armor", "{}"))
        patterns = {name: module.get("pattern") for name, module in header.get("modules", {}).items()}
        return cls(header.get("fingerprint"), patterns, tuple(sorted(header.get("others", ()))))


def _header(path: Path, file) -> dict:
    header = json.loads((file.metadata() or {}).get("armor", "{}"))
    found = header.get("format_version", "none")
    if found not in (FACTORS_VERSION, TRAINED_FACTORS_VERSION):
        known = f"{FACTORS_VERSION} or {TRAINED_FACTORS_VERSION}"
        raise ArmorError(f"{path}: format version {found}, expected {known}: not a factors file of this release")
    return header
