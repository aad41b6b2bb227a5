"""What factorization needs to know of a linear's input x: the mean of x², and on request of x xᵀ, over tokens.

Sums run in float64: over a million tokens a float32 sum loses the small channels beside the large ones. Linears that
are fed the same tensor share one set of statistics, stored under the name of the first of them.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from armor.core.errors import ArmorError
from armor.execution.files import open_safetensors, save_safetensors
from armor.format.names import layer_file
from armor.format.records.base import File
from armor.format.records.calibration import CalibrationRecord

__all__ = [
    "STATISTICS_VERSION",
    "Accumulator",
    "Statistics",
    "listed_statistics",
    "read_statistics",
    "statistics_of",
    "write_statistics",
]

STATISTICS_VERSION = 1


@dataclass(frozen=True)
class Statistics:
    """importance (in,) float32, the mean of x²; gram (in, in) float32, the mean of x xᵀ, or None; how many tokens."""

    importance: Tensor
    gram: Tensor | None
    tokens: int


class Accumulator:
    """Running sums over the tokens of one input of `features` channels, on `device`."""

    def __init__(self, features: int, gram: bool, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.weight = self.weight_squared = 0.0
        self.squares = torch.zeros(features, dtype=torch.float64, device=device)
        self.products = torch.zeros(features, features, dtype=torch.float64, device=device) if gram else None

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens: x (..., in), any float dtype. Products of one batch are float32, their sum is float64.

        `weights` (tokens, 1) multiply them; the mean is then that of w²x² over that of w².
        """
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.tokens += x.shape[0]
        if weights is None:
            self.weight += x.shape[0]
            self.weight_squared += x.shape[0]
        else:
            given = weights.detach().float()
            x = x * given
            self.weight += given.square().sum(dtype=torch.float64).item()
            self.weight_squared += given.pow(4).sum(dtype=torch.float64).item()
        self.squares += x.square().sum(0, dtype=torch.float64)
        if self.products is not None:
            self.products += x.T @ x

    def finite(self) -> bool:
        """Whether no NaN and no infinity was added."""
        return bool(self.squares.sum().isfinite())

    def statistics(self) -> Statistics:
        """The means so far, on the CPU."""
        gram = None if self.products is None else (self.products / self.weight).float().cpu()
        return Statistics((self.squares / self.weight).float().cpu(), gram, self.tokens)

    def effective_tokens(self) -> float:
        """How many tokens of equal weight say as much as those that were added: (Σw²)² / Σw⁴, Kish 1965."""
        return self.weight**2 / self.weight_squared if self.weight_squared else 0.0


def write_statistics(path: Path, inputs: dict[str, Statistics], users: dict[str, str], fingerprint: str) -> None:
    """Write the statistics of one decoder layer atomically; same input, same bytes.

    `inputs` by name of the input, which is the first linear that uses it; `users` gives the input of each linear;
    `fingerprint` is the model's.
    """
    tensors = {f"{name}.importance": s.importance for name, s in inputs.items()}
    tensors |= {f"{name}.gram": s.gram for name, s in inputs.items() if s.gram is not None}
    tokens = {s.tokens for s in inputs.values()}
    header = {
        "format_version": STATISTICS_VERSION,
        "fingerprint": fingerprint,
        "tokens": max(tokens, default=0),
        "inputs": users,
    }
    save_safetensors(path, tensors, {"armor": json.dumps(header, sort_keys=True)})


def read_statistics(
    path: Path | str, fingerprint: str | None = None, gram: bool = True, linears: Collection[str] | None = None
) -> dict[str, Statistics]:
    """The statistics of one decoder layer by the full name of each linear, or of those in `linears` alone.

    With `fingerprint`, those of another model raise ArmorError; with gram=False Gram matrices are left on disk. Raises
    ArmorError too if the file is missing, corrupt, of another format, or holds values that no input can have.
    """
    with open_safetensors(path) as file:
        try:
            header = json.loads((file.metadata() or {}).get("armor", "{}"))
        except json.JSONDecodeError:
            header = {}
        version = header.get("format_version")
        if type(version) is not int or version != STATISTICS_VERSION:
            raise ArmorError(
                f"{path}: statistics of format {version!r}, expected {STATISTICS_VERSION}; calibrate again"
            )
        if fingerprint is not None and header["fingerprint"] != fingerprint:
            raise ArmorError(
                f"{path}: statistics of another model (fingerprint {header['fingerprint'][:12]}, expected "
                f"{fingerprint[:12]}); calibrate again"
            )
        names = set(file.keys())
        users = {linear: name for linear, name in header["inputs"].items() if linears is None or linear in linears}
        inputs: dict[str, Statistics] = {}
        for name in sorted(set(users.values())):
            if f"{name}.importance" not in names:
                raise ArmorError(f"{path}: has no statistics of the input of {name}; calibrate again")
            importance = file.get_tensor(f"{name}.importance")
            if not bool(importance.isfinite().all()) or bool((importance < 0).any()):
                raise ArmorError(f"{path}: {name}.importance holds NaN, infinity or a negative number; calibrate again")
            matrix = file.get_tensor(f"{name}.gram") if gram and f"{name}.gram" in names else None
            inputs[name] = Statistics(importance, matrix, header["tokens"])
    return {linear: inputs[name] for linear, name in users.items()}


def statistics_of(calibration: Path, layer: int) -> Path:
    """The file with the statistics of decoder layer `layer`, beside `calibration`, its record.

    The record is written last, and has the hash of the file. Where the record is missing or the hash is another, the
    statistics are of a run that did not end, or of another one. Raises ArmorError.
    """
    path, expected = listed_statistics(calibration, layer)
    if File.of(path) != expected:
        raise ArmorError(f"{path}: differs from its hash in {calibration.name}; {CalibrationRecord.again(calibration)}")
    return path


def listed_statistics(calibration: Path, layer: int) -> tuple[Path, File]:
    """As `statistics_of`, and what the record says of the file, of which no more than the size is held against it."""
    path = layer_file(calibration.parent, layer)
    expected = CalibrationRecord.read(calibration).files.get(path.name)
    if expected is None:
        raise ArmorError(f"{calibration}: lists no {path.name}; {CalibrationRecord.again(calibration)}")
    if not path.is_file():
        raise ArmorError(f"{path}: missing, listed in {calibration.name}; {CalibrationRecord.again(calibration)}")
    if path.stat().st_size != expected.bytes:
        raise ArmorError(f"{path}: differs from its hash in {calibration.name}; {CalibrationRecord.again(calibration)}")
    return path, expected
