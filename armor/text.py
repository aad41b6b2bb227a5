"""From a text source to token blocks, the field's way: one stream of tokens, cut into consecutive blocks.

Documents are joined by a separator, the whole is tokenized as one text with the tokenizer's own defaults (so the tokens
of a single file are `tokenizer(text).input_ids`), and no more documents are read than the blocks need. Rows of a data
set count as they are, empty ones too: WikiText-2's blank lines are part of the field's numbers. If asked, its
tokenization is undone in the joined text, by lm-eval's function, so that the variant means the same here and there. A
MediaWiki export is parsed as it streams and only the wanted articles are cleaned: ten and more a second, so nothing is
cached.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from armor.config import TextSettings
from armor.errors import ArmorError
from armor.model.packages import package_file

__all__ = ["blocks", "clean_article", "describe", "documents", "token_blocks"]

CHARACTERS_PER_TOKEN = 5  # a first guess; English has a little less
MARGIN = 16  # tokens beyond the last block: where the text was cut off, the last few may differ
MINIMUM_ARTICLE = 1000  # characters; below it an article is a stub, or little more than a list of links


def token_blocks(settings: TextSettings, tokenizer: Any, count: int | None, length: int) -> Tensor:
    """The first `count` consecutive blocks of `length` tokens of a text (count, length) int64; all if count is None.

    Raises ArmorError if the text is not there, unreadable, or too short (it says what was found and needed).
    """

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
    wanted = None if needed is None else int(needed * CHARACTERS_PER_TOKEN * 1.1) + 1000
    while True:
        complete = _gather(stream, texts, wanted)
        tokens = tokenizer(join(texts), return_attention_mask=False, verbose=False).input_ids if texts else []
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


def _detokenize_wikitext(text: str) -> str:
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    return wikitext_detokenizer({"page": text})


def _gather(stream: Iterator[str], texts: list[str], characters: int | None) -> bool:
    """Append documents until there are enough characters; whether the stream came to its end."""
    total = sum(map(len, texts))
    while characters is None or total < characters:
        text = next(stream, None)
        if text is None:
            return True
        texts.append(text)
        total += len(text)
    return False


def describe(settings: TextSettings) -> str:
    """The source of a text, for messages."""
    if settings.files:
        return ", ".join(settings.files)
    name = settings.dataset or f"{settings.package} {settings.file}"
    return " ".join(filter(None, (name, settings.subset, settings.split if settings.dataset else None)))


def documents(settings: TextSettings) -> Iterator[str]:
    """The documents of a text source, one by one, those in `settings.documents` only, without stubs of articles.

    The numbers count files, JSON lines, rows, or articles (pages that are articles and no redirects).
    """
    if settings.dataset is not None:
        stream = _dataset(settings)
    elif settings.files is not None:
        stream = (text for file in settings.files for text in _file(Path(file), settings.column))
    else:
        stream = _file(package_file(settings.package or "", settings.file or ""), settings.column)
    for document in islice(stream, *settings.documents):
        text = document() if callable(document) else document
        if text or not callable(document):
            yield text


def _dataset(settings: TextSettings) -> Iterator[str]:
    from datasets import load_dataset

    where = describe(settings)
    try:
        rows = iter(load_dataset(settings.dataset, settings.subset, split=settings.split, streaming=settings.streaming))
        while (row := next(rows, None)) is not None:
            if settings.column not in row:
                raise ArmorError(f"dataset {where}: has no column {settings.column}; it has {', '.join(map(str, row))}")
            yield row[settings.column]
    except ArmorError:
        raise
    except Exception as error:  # datasets passes on what its file systems and builders raise, also while it streams
        reason = " ".join(str(error).split())[:300]
        raise ArmorError(f"dataset {where}: cannot be read: {reason or type(error).__name__}") from error


def _file(path: Path, column: str) -> Iterator[Any]:
    """The documents of a file, by suffix and first bytes; those that need cleaning as functions that return them."""
    openers = {".bz2": bz2.open, ".gz": gzip.open, ".xz": lzma.open}
    opener = openers.get(path.suffix, open)
    kind = (path.with_suffix("") if path.suffix in openers else path).suffix
    try:
        with opener(path, "rb") as file:
            if file.peek(16).lstrip().startswith((b"<mediawiki", b"<?xml")):
                yield from _articles(file)
            elif kind in (".jsonl", ".json"):
                yield from _json_lines(file, path, column)
            else:
                yield io.TextIOWrapper(file, "utf-8", newline="").read()
    except FileNotFoundError:
        raise ArmorError(f"{path}: no such file; expected text") from None
    except UnicodeDecodeError as error:
        raise ArmorError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except ElementTree.ParseError as error:
        raise ArmorError(f"{path}: not a whole MediaWiki export ({error}); get it again") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ArmorError(f"{path}: cannot be read ({error}); expected text, plain or compressed") from None


def _json_lines(file: BinaryIO, path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        try:
            text = json.loads(line)[column]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ArmorError(
                f"{path}: line {number} is no JSON object with a text {column!r}; check the file or column"
            )
        yield text


def _articles(file: BinaryIO) -> Iterator[Any]:
    """The articles of a MediaWiki export (no other pages, no redirects), each as a function that returns its text."""
    namespaces = {"file", "image", "category"}
    events = ElementTree.iterparse(file, ("start", "end"))
    _, root = next(events)
    for event, element in events:
        if event == "start":
            continue
        tag = element.tag.rpartition("}")[2]
        if tag == "namespace" and element.text:
            namespaces.add(element.text.lower())
        elif tag == "page":
            if element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None:
                markup = element.findtext("{*}revision/{*}text") or ""
                yield lambda markup=markup: _article(markup, namespaces)
            root.clear()


def _article(markup: str, namespaces: set[str]) -> str:
    text = clean_article(markup, namespaces)
    return text if len(text) >= MINIMUM_ARTICLE else ""


# Sections at the end that are lists of links and sources.
_APPENDIX = re.compile(
    r"^=+\s*(see also|notes|references|notes and references|citations|sources|bibliography|further reading"
    r"|external links)\s*=+\s*$",
    re.IGNORECASE | re.MULTILINE,
)
_EMPTY_BRACKETS = re.compile(r"[ \t]*\(\s*[,;:\s]*\)|[ \t]*\[\s*\]")
# What is left of a table whose markup is broken, and the gap where a template stood.
_TABLE_LINE = re.compile(r"^(\{\||\||!).*$", re.MULTILINE)
_GAP = re.compile(r"[ \t]+(?=[,.;:](\s|$))")
_LEADING_PUNCTUATION = re.compile(r"\(\s*[,;:]\s*")
_SKIPPED_TAGS = {"ref", "table", "gallery", "math", "score", "timeline", "imagemap", "references"}


def clean_article(markup: str, namespaces: set[str] = frozenset({"file", "image", "category"})) -> str:
    """The prose of a page in wiki markup: no templates, tables, references, pictures, appendices.

    Links to pages of `namespaces` (lower case) are pictures and categories, and go too.
    """
    import mwparserfromhell

    appendix = _APPENDIX.search(markup)
    code = mwparserfromhell.parse(markup[: appendix.start()] if appendix else markup)
    for tag in code.ifilter_tags(recursive=True):
        if str(tag.tag).strip().lower() in _SKIPPED_TAGS:
            tag.contents = ""
    for link in code.ifilter_wikilinks(recursive=True):
        space, colon, _ = str(link.title).partition(":")
        if colon and space.strip().lower() in namespaces:
            link.title, link.text = "", None
    text = code.strip_code(normalize=True, collapse=True)
    text = _EMPTY_BRACKETS.sub("", _TABLE_LINE.sub("", text))
    text = _GAP.sub("", _LEADING_PUNCTUATION.sub("(", text))
    lines = (re.sub(r"[ \t\xa0]+", " ", line).strip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
