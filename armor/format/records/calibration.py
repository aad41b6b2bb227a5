"""calibration.json: the statistics of every decoder layer, written after all of their files."""

from __future__ import annotations

from typing import ClassVar, Literal

from armor.format.records.base import File, Made

__all__ = ["CalibrationRecord"]


class CalibrationRecord(Made):
    """`{model}/calibration/{calibration}/calibration.json`, by `armor calibrate`: what was read; statistics beside."""

    AGAIN: ClassVar[str] = "run armor calibrate again"

    format_version: Literal[3] = 3
    fingerprint: str
    """That of the model."""
    text_fingerprint: str
    """The SHA-256 of the tokens."""
    statistics_fingerprint: str
    """One fingerprint for all files."""
    sequences: int
    """Token sequences."""
    length: int
    """Tokens in a sequence."""
    tokens: int
    """Tokens in all: sequences · length."""
    dtype: str
    """The dtype that the model was run in."""
    device: str
    """The torch device that it was run on."""
    files: dict[str, File]
    """The statistics by file name, one file for each decoder layer."""
    unrouted_experts: tuple[str, ...] = ()
    """The experts that the router sent no token to; they have the statistics of all tokens."""
    hidden_states_bytes: int
    """The size of the hidden states between two layers, in bytes."""
    spilled_bytes: int
    """How many bytes of them were on disk and not in memory."""
    tokens_per_second: float
    """Tokens divided by the seconds of the work."""
