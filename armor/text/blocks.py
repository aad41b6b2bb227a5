"""From documents to token blocks, the field's way: one stream of tokens, cut into consecutive blocks.

Documents are joined by a separator. The whole is tokenized as one text with the tokenizer's own defaults, so the tokens
of a single file are `tokenizer(text).input_ids`. No more documents are read than the blocks need, and no more of a long
one is tokenized. If asked, WikiText's tokenization is undone in the joined text, by lm-eval's function, so that the
variant means the same here and there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from armor.config.sources import TextSettings
from armor.core.errors import ArmorError
from armor.text.sources import describe, documents

__all__ = ["blocks", "token_blocks"]

CHARACTERS_PER_TOKEN = 5  # a first guess; English has a little less
MARGIN = 16  # tokens beyond the last block: where the text was cut off, the last few may differ


def token_blocks(settings: TextSettings, tokenizer: Any, count: int | None, length: int) -> Tensor:
    """The first `count` consecutive blocks of `length` tokens of a text (count, length) int64; all if count is None.

    The texts of a mixture take turns: block i is of text i modulo their number.
    Raises ArmorError if the text is not there, unreadable, or too short (it says what was found and needed).
    """
    if settings.mixture:
        return _in_turn(settings.mixture, tokenizer, count, length)

    def join(texts: list[str]) -> str:
        text = settings.separator.join(texts)
        return _detokenize_wikitext(text) if settings.detokenize else text

    return blocks(documents(settings), tokenizer, count, length, describe(settings), join)


def blocks(
    stream: Iterator[str],
    tokenizer: Any,
    count: int | None,
    length: int,
    where: str,
    join: Callable[[list[str]], str] = "\n\n".join,
) -> Tensor:
    """The first `count` blocks of `length` tokens of the documents in `stream`, as `token_blocks` makes them.

    Raises ArmorError, naming `where`, if there is too little text.
    """
    needed = None if count is None else count * length
    texts: list[str] = []
    wanted = sys.maxsize if needed is None else int(needed * CHARACTERS_PER_TOKEN * 1.1) + 1000
    while True:
        complete = _gather(stream, texts, wanted)
        text = join(texts)
        if len(text) > wanted:
            text, complete = (text[:wanted].rsplit(maxsplit=1) or [""])[0], False  # not within a word
        tokens = tokenizer(text, return_attention_mask=False, verbose=False).input_ids if texts else []
        if complete or (needed is not None and len(tokens) >= needed + MARGIN):
            break
        wanted *= 2
    needed = needed or length
    if len(tokens) < needed:
        raise ArmorError(
            f"{where}: found {len(tokens)} tokens in {len(texts)} documents, needed "
            f"{count or 1} x {length} = {needed}; give more text, or fewer or shorter sequences"
        )
    count = count or len(tokens) // length
    return torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length)


def _in_turn(texts: list[TextSettings], tokenizer: Any, count: int | None, length: int) -> Tensor:
    """The first `count` blocks of several texts, one of each in turn; all if count is None, until one text ends."""
    turns = len(texts)
    shares = [None if count is None else len(range(turn, count, turns)) for turn in range(turns)]
    parts = [token_blocks(text, tokenizer, n, length) for text, n in zip(texts, shares, strict=True) if n != 0]
    count = count or turns * min(map(len, parts))
    return torch.stack([parts[block % turns][block // turns] for block in range(count)])


def _detokenize_wikitext(text: str) -> str:
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    return wikitext_detokenizer({"page": text})


def _gather(stream: Iterator[str], texts: list[str], characters: int) -> bool:
    """Append documents until there are enough characters; whether the stream came to its end."""
    total = sum(map(len, texts))
    while total < characters:
        text = next(stream, None)
        if text is None:
            return True
        texts.append(text)
        total += len(text)
    return False
