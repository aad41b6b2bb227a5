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

__all__ = ["code_hash", "executed_by", "modules"]

ROOT = Path(__file__).resolve().parents[2]
"""The folder that this package lies in."""
WITHOUT_EFFECT = (
    "armor",  # the version, and compress for users
    "armor.config.reading",  # what it reads, the settings, is compared itself; all else of it is messages
    "armor.core.errors",  # messages
    "armor.execution.devices",  # which device is free
    "armor.execution.log",  # messages
    "armor.execution.machine",  # what provenance says of the machine
    "armor.execution.nvml",  # what cards say of themselves
    "armor.format.provenance",  # provenance
    "armor.training.memory",  # refuses a small device, and says where layers lie: a better estimate reruns no training
)


def code_hash(*entries: str, root: Path = ROOT) -> str:
    """A hexadecimal hash of the code that these modules, like "armor.factorize.layer", execute from this package.

    With `root`, of the package as it lies there. A file is read once for each root.
    """
    text = "\n".join(f"{name} {_parsed(root, name)[0]}" for name in sorted(executed_by(*entries, root=root)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def executed_by(*entries: str, root: Path = ROOT) -> set[str]:
    """The modules of this package that these modules execute and that can change a result, themselves among them."""
    seen: set[str] = set()
    waiting = list(entries)
    while waiting:
        name = waiting.pop()
        if name not in seen and name not in WITHOUT_EFFECT:
            seen.add(name)
            waiting.extend(_parsed(root, name)[1])
            waiting.append(name.rpartition(".")[0])  # importing a.b executes a too
    return seen


@cache
def modules(root: Path = ROOT) -> dict[str, Path]:
    """The files of all modules of this package, by name."""
    files = {file.relative_to(root).with_suffix(""): file for file in root.glob("armor/**/*.py")}
    return {".".join(path.parts).removesuffix(".__init__"): file for path, file in files.items()}


@cache
def _parsed(root: Path, name: str) -> tuple[str, tuple[str, ...]]:
    """The hash of one module's code, and the modules of this package that it imports."""
    files = modules(root)
    if name not in files:
        raise ArmorError(f"{name}: no module of this release; what names it was made by another one")
    code, imported = _read(files[name].read_bytes())
    digest = hashlib.sha256(code.encode())
    if files[name].name == "__init__.py":
        for other in sorted(path for path in files[name].parent.glob("*") if path.suffix in (".j2", ".c", ".h")):
            digest.update(other.read_bytes())
    return digest.hexdigest(), tuple(sorted(imported & files.keys()))


@cache
def _read(text: bytes) -> tuple[str, frozenset[str]]:
    """The hash of a module's syntax tree without docstrings, and what it imports, or what could be a module of it."""
    tree = ast.parse(text)
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
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), frozenset(imported)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _drop_title(decorator: ast.expr) -> None:
    """Take title and source out of `@method(title, source=...)`: words, which the report has among its settings."""
    if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "method":
        decorator.args = [value for value in decorator.args if not _is_text(value)]
        decorator.keywords = [given for given in decorator.keywords if given.arg not in ("title", "source")]
