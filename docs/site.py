"""A hook of mkdocs: the pages that lie outside docs/ become pages of the site, and links are those of the repository.

Pages are written for the repository: README.md at its top, links relative to the file. Here each link is followed from
the file as it lies in the repository. A link to a page becomes that page's, one to any other file becomes its name, and
one to nothing is refused. mkdocs checks the rest: anchors, and pages that nothing leads to. The page of records has all
their fields on the site.
"""

from __future__ import annotations

import os.path
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from armor.format.reference import record_reference

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "config/README.md": "configuration.md",
}
"""The pages outside docs/, each with its name in the site."""

LINK = re.compile(r"(?<!`)(?P<text>\[[^\]]*\])\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Bring in the pages outside docs/."""
    for path, name in PAGES.items():
        files.append(File.generated(config, name, content=(REPOSITORY / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site has them, outside blocks of code."""
    name = page.file.src_uri
    if name == "RECORDS.md":
        markdown += f"\n{record_reference()}\n"
    source = next((path for path, site in PAGES.items() if site == name), f"docs/{name}")
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(lambda m: linked(m, source), part) for part in parts)


def linked(found: re.Match[str], source: str) -> str:
    """The link as the site has it; `source` is the path of its page in the repository."""
    target, anchor = found["target"], found["anchor"] or ""
    if not target or re.match(r"[a-z]+:", target):
        return found[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if not (REPOSITORY / path).exists():
        raise PluginError(f"{source}: {target}: there is no such file")
    if path not in PAGES and not path.startswith("docs/"):
        return f"{found['text'][1:-1]} (`{path}`)" if found["text"][1:-1] != path else f"`{path}`"
    here = PAGES.get(source, source.removeprefix("docs/"))
    there = PAGES.get(path, path.removeprefix("docs/"))
    return f"{found['text']}({os.path.relpath(there, posixpath.dirname(here) or '.')}{anchor})"
