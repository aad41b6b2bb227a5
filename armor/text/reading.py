"""A text as one model reads it: blocks of tokens that fit its context."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from armor.config.sources import TextSettings
from armor.core.errors import ArmorError
from armor.execution.log import log
from armor.runtime.folder import context_length, load_tokenizer, read_config
from armor.text.blocks import token_blocks
from armor.text.sources import describe

__all__ = ["Blocks", "block_length", "read_blocks"]


@dataclass(frozen=True)
class Blocks:
    """A text as tokens (n, L) int64."""

    tokens: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Tokens in a block, L."""
        return self.tokens.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the tokens, not of how they are cut: of the text as read, whatever becomes of its files."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()


def read_blocks(folder: Path, text: TextSettings, count: int | None, length: int | None) -> Blocks:
    """The first `count` blocks of a text (None: all) for the model in `folder`, of `length` tokens (None: its context).

    Raises ArmorError where `block_length` does, and for a text that is not there or too short.
    """
    length = block_length(folder, length)
    tokenizer = load_tokenizer(folder)
    log.info("reading %s blocks of %d tokens of %s", "all" if count is None else count, length, describe(text))
    return Blocks(token_blocks(text, tokenizer, count, length))


def block_length(folder: Path, length: int | None) -> int:
    """`length`, or else the number of tokens that the model in `folder` was made for.

    Raises ArmorError for a folder that is no model, a length beyond its context, and none where it names no context.
    """
    longest = context_length(read_config(folder))
    length = length or longest
    if length is None:
        raise ArmorError(f"{folder / 'config.json'}: names no context length; set sequence_length")
    if longest is not None and length > longest:
        raise ArmorError(f"sequence_length: found {length}, but the context length of {folder} is {longest}; lower it")
    return length
