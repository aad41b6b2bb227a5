"""checkpoint.json and provenance.json: a packed checkpoint, and what made it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from armor.core.typed import Typed
from armor.format.records.base import File, Made, Origin

__all__ = ["CheckpointRecord", "FactorsMadeBy", "ProvenanceRecord"]


class FactorsMadeBy(Typed):
    """What made the factors of some decoder layers."""

    layers: tuple[int, ...]
    """Their numbers."""
    settings: dict[str, Any]
    """The settings of these layers."""
    code: str
    """The hash of the code that made them."""
    versions: dict[str, str]
    """Versions of Python and of packages."""


class ProvenanceRecord(Origin):
    """`{model}/{recipe}/checkpoint/provenance.json`, by `armor assemble`: what made it, wherever it is copied to."""

    AGAIN: ClassVar[str] = "assemble or copy the checkpoint again"

    format_version: Literal[2] = 2
    fingerprint: str
    """That of the source."""
    statistics_fingerprint: str
    """One fingerprint for the statistics of all layers."""
    factors: tuple[FactorsMadeBy, ...]
    """What made the factors, layers alike together."""
    trained: tuple[str, ...] = ()
    """The tensors beside the factors that are not the source's: norms and biases that were trained."""


class CheckpointRecord(Made):
    """`{model}/{recipe}/checkpoint.json`, by `armor assemble`: size and origin of checkpoint/, which lies beside it."""

    AGAIN: ClassVar[str] = "run armor assemble again"

    format_version: Literal[3] = 3
    fingerprint: str
    """That of the source."""
    statistics_fingerprint: str
    """One fingerprint for the statistics of all layers."""
    checkpoint_bytes: int
    """The size of all files of the checkpoint, in bytes."""
    bits_per_weight: float
    """The mean bits that a weight of the decoder layers' linears takes, compressed or not."""
    dense_bits_per_weight: float
    """The same of the source."""
    compressed_count: int
    """How many linears are compressed."""
    kept_dense: tuple[str, ...]
    """The linears that stay dense, by full name."""
    files: dict[str, File]
    """The files of the checkpoint by name."""
    factors: tuple[FactorsMadeBy, ...]
    """What made the factors, layers alike together."""
