"""The prose of Wikipedia: a MediaWiki export is parsed as it streams, and only the wanted articles are cleaned.

Nothing is cached: cleaning takes little time (docs/TRIED.md).
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Set
from typing import Any, BinaryIO

__all__ = ["articles", "clean_article"]

MINIMUM_ARTICLE = 1000  # characters; below it an article is a stub, or little more than a list of links


def articles(file: BinaryIO) -> Iterator[Any]:
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


def clean_article(markup: str, namespaces: Set[str] = frozenset({"file", "image", "category"})) -> str:
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
