"""No reader spells a record's key: outside of armor/format records are read and written through their types."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

from armor.core.typed import Typed
from armor.format import records

PACKAGE = Path(__file__).resolve().parents[2] / "armor"


def keys() -> set[str]:
    """The names of all fields of all records and of what is in them."""
    found = set()
    for module in pkgutil.iter_modules(records.__path__):
        for kind in vars(importlib.import_module(f"{records.__name__}.{module.name}")).values():
            if isinstance(kind, type) and issubclass(kind, Typed):
                found |= kind.model_fields.keys()
    return found


def spelled(tree: ast.AST) -> list[tuple[int, str]]:
    """Every x["key"] and x.get("key"), with its line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            of, key = node.value, node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
            of, key = node.func.value, node.args[0] if node.args else None
        else:
            continue
        if isinstance(of, ast.Name) and of.id == "config":  # config.json, which is transformers'
            continue
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            found.append((node.lineno, key.value))
    return found


NOT_OF_RECORDS = {
    ("execution/machine.py", "model"): "a line of /proc/cpuinfo",
    ("plan/submitted.py", "threads"): "a job, as Snakemake announces it",
    ("runtime/quantizer.py", "format_version"): "config.json's quantization_config",
}


def test_no_reader_spells_a_key():
    known, found = keys(), []
    assert {"seconds", "made_by", "block_size", "fingerprint"} <= known
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        if not name.startswith("format/"):
            spelt = [(line, key) for line, key in spelled(ast.parse(file.read_bytes())) if key in known]
            found += [f"{name}:{line}: {key}" for line, key in spelt if (name, key) not in NOT_OF_RECORDS]
    assert not found, "\n".join(found)
