"""From a text source to its documents, one by one: files, JSON lines, rows of a data set, articles of Wikipedia.

Rows of a data set count as they are, empty ones too: WikiText-2's blank lines are part of the field's numbers.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from armor.config.sources import TextSettings
from armor.core.errors import ArmorError, one_line
from armor.execution.packages import package_file
from armor.text.wikipedia import articles

__all__ = ["describe", "documents"]


def describe(settings: TextSettings) -> str:
    """The source of a text, for messages."""
    if settings.mixture:
        return f"{' / '.join(map(describe, settings.mixture))} in turn"
    if settings.files:
        return ", ".join(settings.files)
    return settings.called() if settings.dataset else f"{settings.package} {settings.file}"


def documents(settings: TextSettings) -> Iterator[str]:
    """The documents of a text source, one by one, those in `settings.documents` only, without stubs of articles.

    The numbers count files, JSON lines, rows, or articles (pages that are articles and no redirects).
    """
    stream: Iterator[Any]
    if settings.dataset is not None:
        stream = _dataset(settings)
    elif settings.files is not None:
        stream = (text for file in settings.files for text in _file(Path(file), settings.column))
    else:
        stream = _file(package_file(settings.package or "", settings.file or ""), settings.column)
    for document in islice(stream, *settings.documents):
        text: Any = document() if callable(document) else document
        if text or not callable(document):
            yield text


def _dataset(settings: TextSettings) -> Iterator[Any]:
    from datasets import load_dataset

    where = describe(settings)
    try:
        asked: Any = {"path": settings.dataset, "name": settings.subset, "streaming": settings.streaming}
        rows = iter(load_dataset(**asked, split=settings.split))
        while (row := next(rows, None)) is not None:
            if settings.column not in row:
                raise ArmorError(f"dataset {where}: has no column {settings.column}; it has {', '.join(map(str, row))}")
            yield row[settings.column]
    except ArmorError:
        raise
    except Exception as error:  # datasets passes on what its file systems and builders raise, also while it streams
        reason = one_line(error)
        raise ArmorError(f"dataset {where}: cannot be read: {reason or type(error).__name__}") from error


def _file(path: Path, column: str) -> Iterator[Any]:
    """The documents of a file, by suffix and first bytes; those that need cleaning as functions that return them."""
    openers = {".bz2": bz2.open, ".gz": gzip.open, ".xz": lzma.open}
    opener = openers.get(path.suffix, open)
    kind = (path.with_suffix("") if path.suffix in openers else path).suffix
    try:
        with opener(path, "rb") as file:
            if file.peek(16).lstrip().startswith((b"<mediawiki", b"<?xml")):
                yield from articles(file)
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
