"""source.json: where a model is, and what tells it from others."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from armor.format.records.base import File, Record

__all__ = ["SourceRecord"]


class SourceRecord(Record):
    """`{model}/source.json`, by `armor fetch`: a Hugging Face folder with a dense model."""

    AGAIN: ClassVar[str] = "run armor fetch again"

    format_version: Literal[2] = 2
    path: str
    """The folder: relative to this file if it is below it, else absolute."""
    fingerprint: str
    """The SHA-256 over config.json and the weights."""
    dtype: str
    """The dtype of most of the weights' bytes."""
    files: dict[str, File]
    """The files of the model by name."""
    hub: str | None
    """Its name on the Hugging Face hub; null if it did not come from there."""
    settings: dict[str, Any]
    """The settings that named the model, without defaults."""
