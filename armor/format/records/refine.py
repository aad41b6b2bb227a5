"""refined.json: what refinement did to the decoder layers of a model, summed up from their records."""

from __future__ import annotations

from typing import ClassVar, Literal

from armor.format.records.base import Made

__all__ = ["RefineRecord"]


class RefineRecord(Made):
    """`{model}/{recipe}/refined.json`, by `armor refined`: losses of all layers, whose factors lie in refined/.

    Losses are the relative error of a layer's output on the held-out sequences. `seconds` are those of all layers.
    """

    AGAIN: ClassVar[str] = "run armor refined again"

    format_version: Literal[2] = 2
    fingerprint: str
    """That of the model."""
    sha256: tuple[str, ...]
    """The SHA-256 of the factors' files, layer by layer."""
    start_losses: tuple[float | None, ...]
    """The loss of every layer before; null where all of it is dense."""
    losses: tuple[float | None, ...]
    """The loss of every layer as it is stored; never above that before."""
    kept: tuple[int | None, ...]
    """The step that is stored of every layer; 0: it stayed as it was."""
