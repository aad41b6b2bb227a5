"""layer_{k}.json: what became of the linears of one decoder layer."""

from __future__ import annotations

from typing import ClassVar, Literal

from armor.format.records.base import Made
from armor.typed import Typed

__all__ = ["BlockSizes", "LayerRecord", "LinearRecord"]


class BlockSizes(Typed):
    """The sizes of the blocks around a core; null where a side has none."""

    left: int | None = None
    """A's: it divides the linear's outputs."""
    right: int | None = None
    """B's: it divides the linear's inputs."""


class LinearRecord(Typed):
    """One linear's factors. Losses are proxy losses relative to that of a zero matrix."""

    method: str
    """The method that was used; it may be another than was asked for, and `note` says why."""
    pattern: str | None
    """The pattern of the core; null if the linear stays dense."""
    block_size: BlockSizes | None
    """Null without blocks."""
    start_loss: float
    """The loss of plain NoWag-P pruning."""
    loss: float
    """The loss of the factors as they are stored."""
    condition: float | None = None
    """The worst condition number of the blocks of A and B, as stored: how far an error in one of their entries can
    grow; 1e16 for a singular block, null without blocks."""
    trace: tuple[tuple[int, float, float], ...]
    """Points (iteration, seconds, best loss so far), at most 100."""
    seed: int
    device: str
    """The torch device that it was computed on."""
    seconds: float
    peak_memory_bytes: int
    """The most memory of the process until this linear was done."""
    note: str | None
    """What was done otherwise than asked."""


class LayerRecord(Made):
    """`layer_{k}.json`, by `armor factorize`; the factors lie beside it, in layer_{k}.safetensors."""

    AGAIN: ClassVar[str] = "factorize this layer again"

    format_version: Literal[2] = 2
    layer: int
    fingerprint: str
    """That of the model."""
    sha256: str
    """That of the factors' file."""
    statistics_fingerprint: str | None
    """That of the statistics' file; null where it was not there, as nothing needed it."""
    modules: dict[str, LinearRecord]
    """The linears by full name."""
