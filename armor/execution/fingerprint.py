"""The code hash of a stage: what Snakemake compares to know that a stage's code has changed.

The hash covers the modules that a stage executes. They are found by following `import armor...` statements from its
entry module. A module counts as its syntax tree without docstrings; comments and formatting do not count. Templates and
C sources of the packages on the way count as they are. A method's title and source do not count. Modules that cannot
change a result are left out: messages, devices, estimates of memory and provenance touch no number. The messages
include the reader of settings, for what it reads is compared itself. What is found by name at run time, as methods are,
is not followed: it is named as an entry.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

from armor.core.errors import ArmorError

__all__ = ["code_hash", "executed_by"]

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_EFFECT = (
    "armor",
    "armor.config.reading",
    "armor.core.errors",
    "armor.execution.devices",
    "armor.execution.log",
    "armor.execution.machine",
    "armor.execution.nvml",
    "armor.format.provenance",
    "armor.training.memory",
)


def code_hash(*entries: str) -> str:
    """A hexadecimal hash of the code that these modules, like "armor.factorize.layer", execute from this package."""
    text = "\n".join(f"{name} {_parsed(name)[0]}" for name in sorted(executed_by(*entries)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def executed_by(*entries: str) -> set[str]:
    """The modules of this package that these modules execute and that can change a result, themselves among them."""
    seen: set[str] = set()
    waiting = list(entries)
    while waiting:
        name = waiting.pop()
        if name not in seen and name not in WITHOUT_EFFECT:
            seen.add(name)
            waiting.extend(_parsed(name)[1])
            waiting.append(name.rpartition(".")[0])  # importing a.b executes a too
    return seen


def _file(name: str) -> Path | None:
    base = ROOT.joinpath(*name.split("."))
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


@cache
def _parsed(name: str) -> tuple[str, tuple[str, ...]]:
    """The hash of one module's syntax tree without docstrings, and the modules of this package that it imports."""
    file = _file(name)
    if file is None:
        raise ArmorError(f"{name}: no module of this release; what names it was made by another one")
    tree = ast.parse(file.read_bytes())
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module)
            imported.update(f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            # A bare string as a statement is a docstring, also below a class's field.
            node.body = [n for n in node.body if not (isinstance(n, ast.Expr) and _is_text(n.value))] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                _drop_title(decorator)
    digest = hashlib.sha256(ast.dump(tree).encode())
    if file.name == "__init__.py":
        for other in sorted(path for path in file.parent.glob("*") if path.suffix in (".j2", ".c", ".h")):
            digest.update(other.read_bytes())
    ours = tuple(sorted(module for module in imported if module.split(".")[0] == "armor" and _file(module)))
    return digest.hexdigest(), ours


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _drop_title(decorator: ast.expr) -> None:
    """Take title and source out of `@method(title, source=...)`: words, which the report has among its settings."""
    if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "method":
        decorator.args = [value for value in decorator.args if not _is_text(value)]
        decorator.keywords = [given for given in decorator.keywords if given.arg not in ("title", "source")]
