"""tuned.json: what tuning did to the whole model; the factors of all layers lie beside it, in tuned/."""

from __future__ import annotations

from typing import ClassVar, Literal

from armor.format.records.base import Made
from armor.format.records.layer import Training

__all__ = ["KEPT_TOKENS", "TuneRecord"]

KEPT_TOKENS = 256
"""Tokens of each prediction that tune keeps."""


class TuneRecord(Made):
    """`{model}/{recipe}/tuned.json`, by `armor tune`: how the whole model was trained; its layers lie in tuned/."""

    AGAIN: ClassVar[str] = "run armor tune again"

    format_version: Literal[2] = 2
    fingerprint: str
    """That of the model."""
    sha256: tuple[str, ...]
    """The SHA-256 of the factors' files, layer by layer."""
    kept_tokens: int
    """How many of the most likely tokens are kept of each of the dense model's predictions. All others count as
    one more token."""
    training: Training
    """What was done; its tensors and losses are those of all layers."""
