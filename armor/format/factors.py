"""The file with the factorizations of one decoder layer, layer_{k}.safetensors.

Tensors are keyed by module name. There is one entry of metadata: several would be written in random order, and the same
factors would not give the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

from armor.core.errors import ArmorError
from armor.core.factorization import Factorization
from armor.core.packing import unpack
from armor.core.pattern import Pattern
from armor.execution.files import open_safetensors, save_safetensors

__all__ = ["FACTORS_VERSION", "read_factors", "write_factors"]

FACTORS_VERSION = 1


def write_factors(path: Path, factors: dict[str, Factorization], metadata: dict) -> None:
    """Write the factors of one decoder layer, by module name, atomically; same input, same bytes."""
    tensors = {f"{name}.{key}": t for name, f in factors.items() for key, t in f.tensors().items()}
    modules = {
        name: {"pattern": str(f.pattern), "in_features": f.core.shape[1], "loss": f.loss, "start_loss": f.start_loss}
        for name, f in factors.items()
    }
    header = {"format_version": FACTORS_VERSION, **metadata, "modules": modules}
    save_safetensors(path, tensors, {"armor": json.dumps(header, sort_keys=True)})


def read_factors(path: Path) -> tuple[dict[str, Factorization], dict]:
    """The factors of one decoder layer by module name, and their metadata. Raises ArmorError for another file."""
    with open_safetensors(path) as file:
        header = json.loads((file.metadata() or {}).get("armor", "{}"))
        if header.get("format_version") != FACTORS_VERSION:
            found = header.get("format_version", "none")
            raise ArmorError(
                f"{path}: format version {found}, expected {FACTORS_VERSION}: not a factors file of this release"
            )
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
