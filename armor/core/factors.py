"""A factorization W ~ A·S·B of one linear, and the file that holds those of one decoder layer.

`core` is S, N:M sparse; `left` is A and `right` is B, block diagonal (see `armor.core.blockdiag`). Methods that only
prune have neither, and W ~ S. Files are safetensors, keyed by module name, with one metadata entry (several would be
written in random order, and the same factors would not give the same bytes).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from armor.core import blockdiag
from armor.core.nm import Pattern
from armor.core.packing import pack, unpack
from armor.errors import ArmorError
from armor.execution.files import open_safetensors, save_safetensors

__all__ = ["FORMAT_VERSION", "Factorization", "read_factors", "write_factors"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Factorization:
    """W ~ A·S·B, in the dtype that it is stored in.

    core (out, in), mask (out, in) bool, left (out/d, d, d) or None, right (in/d, d, d) or None. `loss` and `start_loss`
    are the proxy loss of these factors, as stored, and of plain NoWag-P pruning, both relative to that of a zero
    matrix; `trace` lists (iteration, seconds, best relative loss so far).
    """

    core: Tensor
    mask: Tensor
    pattern: Pattern
    left: Tensor | None = None
    right: Tensor | None = None
    loss: float = float("nan")
    start_loss: float = float("nan")
    trace: list[tuple[int, float, float]] = field(default_factory=list)

    def reconstruct(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A·S·B as a dense (out, in) matrix of `dtype`, multiplied in that dtype."""
        weight = self.core.to(dtype)
        if self.right is not None:
            weight = blockdiag.multiply(self.right.to(dtype).transpose(1, 2), weight)  # S B: each row s becomes Bᵀ s
        if self.left is not None:
            weight = blockdiag.multiply(self.left.to(dtype), weight.T).T
        return weight

    def tensors(self) -> dict[str, Tensor]:
        """The packed tensors by suffix, as factors files and checkpoints hold them."""
        values, bits = pack(self.core, self.mask)
        wrappers = {"left": self.left, "right": self.right}
        return {"core_values": values, "core_mask": bits} | {k: v for k, v in wrappers.items() if v is not None}


def write_factors(path: Path, factors: dict[str, Factorization], metadata: dict) -> None:
    """Write the factors of one decoder layer, by module name, atomically; same input, same bytes."""
    tensors = {f"{name}.{key}": t for name, f in factors.items() for key, t in f.tensors().items()}
    modules = {
        name: {"pattern": str(f.pattern), "in_features": f.core.shape[1], "loss": f.loss, "start_loss": f.start_loss}
        for name, f in factors.items()
    }
    header = {"format_version": FORMAT_VERSION, **metadata, "modules": modules}
    save_safetensors(path, tensors, {"armor": json.dumps(header, sort_keys=True)})


def read_factors(path: Path) -> tuple[dict[str, Factorization], dict]:
    """The factors of one decoder layer by module name, and their metadata. Raises ArmorError for another file."""
    with open_safetensors(path) as file:
        header = json.loads((file.metadata() or {}).get("armor", "{}"))
        if header.get("format_version") != FORMAT_VERSION:
            found = header.get("format_version", "none")
            raise ArmorError(
                f"{path}: format version {found}, expected {FORMAT_VERSION}: not a factors file of this release"
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
