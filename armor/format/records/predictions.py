"""predictions/{evaluation}.json: what the dense model predicts on the text of an evaluation."""

from __future__ import annotations

from typing import ClassVar, Literal

from armor.format.records.base import Made

__all__ = ["PredictionsRecord"]


class PredictionsRecord(Made):
    """`{model}/predictions/{evaluation}.json`, by `armor predict`: the dense model's loss; logits while needed."""

    AGAIN: ClassVar[str] = "run armor predict again"

    format_version: Literal[2] = 2
    evaluation: str
    """The evaluation's name."""
    fingerprint: str | None
    """That of the model; null for a folder that has none."""
    text_fingerprint: str
    """The SHA-256 of the tokens."""
    blocks: int
    """Blocks of text."""
    length: int
    """Tokens in a block."""
    vocabulary: int
    """Logits for a token."""
    asked_dtype: str
    """The dtype of the evaluation's settings."""
    dtype: str
    """The dtype that the model computed in, which is that of the logits."""
    block_means: tuple[float, ...]
    """The mean negative log-likelihood of each block, in nats."""
    logits_bytes: int
    """The bytes that the logits take on disk, or would."""
    hashes: tuple[str, ...] | None
    """The SHA-256 of the logits of each block; null where they are not stored."""
    not_stored: str | None
    """Why the logits are not stored; null where they are."""
