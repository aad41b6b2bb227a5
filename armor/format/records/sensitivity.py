"""sensitivity/{name}.json: how the predictions of the dense model depend on the outputs of each linear."""

from __future__ import annotations

from typing import ClassVar, Literal

from armor.format.records.base import Made

__all__ = ["SensitivityRecord"]


class SensitivityRecord(Made):
    """`{model}/sensitivity/{sensitivity}.json`, by `armor sensitivity`: what was read; the numbers lie beside it."""

    AGAIN: ClassVar[str] = "run armor sensitivity again"

    format_version: Literal[1] = 1
    fingerprint: str
    """That of the model."""
    sha256: str
    """That of the file with the numbers."""
    text_fingerprint: str
    """The SHA-256 of the tokens."""
    sequences: int
    """Token sequences."""
    length: int
    """Tokens in a sequence."""
    dtype: str
    """The dtype that the model was run in."""
