"""The token sequences that a model is trained on, and what fits its context."""

from __future__ import annotations

import hashlib

from torch import Tensor

from armor.config.sample import Sample
from armor.core.errors import ArmorError
from armor.execution.log import log
from armor.model.source import Source
from armor.runtime.load import context_length, load_tokenizer
from armor.text.blocks import token_blocks
from armor.text.sources import describe

__all__ = ["fingerprint_of", "sample_tokens"]


def sample_tokens(source: Source, sample: Sample) -> Tensor:
    """The sequences of `sample` for the model `source`, (sequences, length) int64.

    Raises ArmorError where the text is too short, or a sequence longer than the model's context.
    """
    longest = context_length(source.path)
    length = sample.sequence_length or longest
    if length is None:
        raise ArmorError(f"{source.path / 'config.json'}: names no context length; set sequence_length")
    if longest is not None and length > longest:
        raise ArmorError(f"sequence_length: found {length}, but the model's context length is {longest}; lower it")
    log.info("reading %d x %d tokens of %s", sample.sequences, length, describe(sample.text))
    return token_blocks(sample.text, load_tokenizer(source.path), sample.sequences, length)


def fingerprint_of(tokens: Tensor) -> str:
    """The SHA-256 of tokens."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
