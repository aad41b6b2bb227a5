"""states/{name}.json: the dense model's hidden states, of which a file for each decoder layer lies beside it."""

from __future__ import annotations

from typing import ClassVar, Literal

from armor.format.records.base import Made

__all__ = ["StatesRecord"]


class StatesRecord(Made):
    """`{model}/states/{states}.json`, by `armor states`: the sequences; hidden states lie in the folder of its name."""

    AGAIN: ClassVar[str] = "run armor states again"

    format_version: Literal[1] = 1
    fingerprint: str
    """That of the model."""
    text_fingerprint: str
    """The SHA-256 of the tokens."""
    sequences: int
    """Token sequences, those that are held out among them."""
    length: int
    """Tokens in a sequence."""
    dtype: str
    """The dtype that the model was run in, and that of the states."""
    bytes: int
    """The size of all states."""
