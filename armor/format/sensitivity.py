"""How the predictions of a model depend on its linears: two vectors for each, in one safetensors file.

Replace the weight W (out, in) of a linear by W + D. To second order the KL divergence of the predictions from those
before, the mean over tokens, is ½ Σ_ij M_ij D_ij². Let G be the gradient by W of the log-likelihood of a sequence of
tokens that the model itself draws. M is G², entry by entry, divided by the number of tokens: the mean over sequences.
That is the diagonal of the true Fisher matrix: what the errors of two entries have to do with each other is left out.
The diagonal is as large as the model. So it is kept as the product of two vectors that has its sums over rows and over
columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from armor.core.errors import ArmorError
from armor.execution.files import open_safetensors, save_safetensors, sha256
from armor.format.names import factors_beside
from armor.format.records.sensitivity import SensitivityRecord

__all__ = ["SENSITIVITY_VERSION", "Sensitivity", "read_sensitivities", "write_sensitivities"]

SENSITIVITY_VERSION = 1


@dataclass(frozen=True)
class Sensitivity:
    """rows (out,) and columns (in,) float32; M ~ rows columnsᵀ, and columns add up to 1."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor) -> Sensitivity:
        """From the sums of M over rows (out,) and over columns (in,), float64."""
        total = columns.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return cls(rows.float().cpu(), (columns / total).float().cpu())

    def predicted_kl(self, change: Tensor) -> float:
        """The KL divergence, in nats per token, of a weight that differs by `change` (out, in)."""
        return 0.5 * float(self.rows.double() @ (change.float().square() @ self.columns).double())


def write_sensitivities(path: Path, found: Mapping[str, Sensitivity], fingerprint: str) -> None:
    """Write the sensitivities of linears by full name, atomically; same input, same bytes.

    `fingerprint` is the model's.
    """
    tensors = {f"{name}.rows": s.rows for name, s in found.items()}
    tensors |= {f"{name}.columns": s.columns for name, s in found.items()}
    header = {"format_version": SENSITIVITY_VERSION, "fingerprint": fingerprint}
    save_safetensors(path, tensors, {"armor": json.dumps(header, sort_keys=True)})


def read_sensitivities(record: Path, names: list[str], fingerprint: str) -> dict[str, Sensitivity]:
    """The sensitivities of these linears, from the file beside `record`.

    Raises ArmorError if it is missing, not what the record describes, of another model, or lacks one of them.
    """
    known, path = SensitivityRecord.read(record), factors_beside(record)
    again = known.again(record)
    if known.fingerprint != fingerprint:
        raise ArmorError(f"{record}: of another model (its fingerprint differs); {again}")
    if not path.is_file() or sha256(path) != known.sha256:
        raise ArmorError(f"{path}: {'not what its JSON describes' if path.is_file() else 'missing'}; {again}")
    with open_safetensors(path) as file:
        there = {*file.keys()}
        if missing := [name for name in names if f"{name}.rows" not in there]:
            raise ArmorError(f"{path}: holds nothing of {missing[0]}; {again}")
        return {n: Sensitivity(file.get_tensor(f"{n}.rows"), file.get_tensor(f"{n}.columns")) for n in names}
