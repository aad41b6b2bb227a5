"""No reader spells a record's key as text: records are read, changed and written through their types."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from armor.core.typed import Typed
from armor.format import records
from armor.format.records.base import File

PACKAGE = Path(__file__).resolve().parents[2] / "armor"


def keys() -> set[str]:
    """The names of all fields of all records and of what is in them."""
    found = set()
    for module in pkgutil.iter_modules(records.__path__):
        for kind in vars(importlib.import_module(f"{records.__name__}.{module.name}")).values():
            if isinstance(kind, type) and issubclass(kind, Typed):
                found |= kind.model_fields.keys()
    return found


def named(tree: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """What names a field, and of what: x[key], x.get(key), getattr(x, key), key in x, x.f(update=key), x.name == key,
    and Column(key)."""
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=of, slice=key):
                yield key, of
            case ast.Call(func=ast.Attribute(value=of, attr="get" | "pop" | "setdefault"), args=[key, *_]):
                yield key, of
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[of, key, *_]):
                yield key, of
            case ast.Compare(left=key, ops=[ast.In() | ast.NotIn()], comparators=[of]):
                yield key, of
            case ast.Compare(left=ast.Attribute(value=of, attr="name"), comparators=[key]):
                yield key, of
            case ast.Call(func=ast.Name(id="Column") as of, args=[key, *_]):
                yield key, of
            case ast.Call(func=ast.Attribute(value=of), keywords=given):
                yield from ((each.value, of) for each in given if each.arg in ("update", "include", "exclude"))


def texts(node: ast.expr | None) -> set[str]:
    """The texts in an expression, if it is a text, or a list, tuple, set or the keys of a table of them."""
    match node:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.List(elts=inner) | ast.Tuple(elts=inner) | ast.Set(elts=inner):
            return {text for each in inner for text in texts(each)}
        case ast.Dict(keys=inner):
            return {text for each in inner for text in texts(each)}
    return set()


def spelled(tree: ast.AST) -> set[tuple[int, str]]:
    """Every text that names a field, with its line: it stands there, or the name there goes through a list with it."""
    loops: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.comprehension):
            names = [each.id for each in ast.walk(node.target) if isinstance(each, ast.Name)]
            for name in names:
                loops.setdefault(name, set()).update(texts(node.iter))
    found = set()
    for key, of in named(tree):
        of_type = isinstance(of, ast.Name) and of.id == "Literal"
        of_method = isinstance(of, ast.Attribute) and of.attr == "settings"  # the names of a method's parameters
        if not of_type and not of_method:
            own = loops.get(key.id, set()) if isinstance(key, ast.Name) else texts(key)
            found |= {(key.lineno, text) for text in own}
    return found


@pytest.mark.parametrize(
    "code",
    [
        'x["seconds"]',
        'x["seconds"] = 1',
        'config.get("seconds")',
        'getattr(x, "seconds")',
        '"seconds" in read_json(path)',
        'x.model_copy(update={"seconds": 1})',
        'x.model_dump(exclude={"seconds"})',
        '[getattr(x, key) for key in ("seconds", "loss")]',
        'for key, unit in (("seconds", "s"), ("loss", "")):\n    print(x[key])',
        'column.name == "seconds"',
        'Column("seconds", "s")',
    ],
)
def test_a_key_is_found_however_it_is_spelled(code):
    assert "seconds" in {key for _, key in spelled(ast.parse(code))}


def test_a_changed_copy_has_the_fields_of_its_type():
    own = File(bytes=1, sha256="a")
    assert own.replace(bytes=2) == File(bytes=2, sha256="a") and own.bytes == 1
    with pytest.raises(TypeError, match="File: no field size"):
        own.replace(size=2)


NOT_OF_RECORDS = {
    "assemble/export.py": ("config.json, which is transformers'", "dtype model_type"),
    "benchmark/linears.py": ("the bytes of a packed linear", "core"),
    "core/factorization.py": ("the tensors of the class itself", "core left"),
    "evaluate/tasks.py": ("lm-eval's list of what it knows", "tasks"),
    "execution/machine.py": ("a line of /proc/cpuinfo", "model"),
    "format/checkpoint.py": (
        "config.json's quantization_config, which it writes and reads",
        "format_version group in_features modules out_features pattern quantization right_of",
    ),
    "format/checksums.py": ("checksums.json, which it writes and reads", "files format_version sha256"),
    "format/factors.py": (
        "the header of its file",
        "fingerprint format_version in_features loss modules pattern quantization right_of start_loss",
    ),
    "format/logits.py": ("the header of its file", "format_version"),
    "format/records/base.py": ("the version that all records have", "format_version"),
    "format/reference.py": ("whether a type is that of a whole file; a JSON schema", "format_version items"),
    "format/states.py": ("the header of its file", "format_version"),
    "format/statistics.py": ("the header of its file", "fingerprint format_version inputs tokens"),
    "methods/__init__.py": ("the names of a function's parameters", "settings"),
    "model/tensors.py": ("config.json, which is transformers'", "model_type"),
    "plan/submitted.py": ("a job, as Snakemake announces it", "threads"),
    "report/columns.py": (
        "the field of Row that a column shows: its one home",
        "bits_per_weight block_sizes checkpoint_bytes compressed_share decode_tokens_per_second factorize_seconds kl "
        "method pattern perplexity relative_loss top1_agreement",
    ),
    "runtime/linear.py": ("a buffer of the module", "core"),
    "runtime/quantizer.py": ("config.json's quantization_config", "format_version"),
    "runtime/skeleton.py": ("config.json, which is transformers'", "model_type"),
    "training/trainable.py": ("the tensors of a linear", "core left right"),
}
"""What else has names that a field of a record has too, by module, and these names."""


def test_no_reader_spells_a_key():
    known, found, lines = keys(), set(), []
    assert {"seconds", "made_by", "block_sizes", "fingerprint"} <= known
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        own = {(line, key) for line, key in spelled(ast.parse(file.read_bytes())) if key in known}
        found |= {(name, key) for _, key in own}
        lines += [f"{name}:{line}: {key}" for line, key in sorted(own) if key not in words_of(name)]
    assert not lines, "\n".join(lines)
    assert found == {(name, key) for name in NOT_OF_RECORDS for key in words_of(name)}


def words_of(module: str) -> set[str]:
    return {*NOT_OF_RECORDS.get(module, ("", ""))[1].split()}
