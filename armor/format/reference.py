"""The reference of typed fields, made from their types: a table for each type, and all records on one page.

A type's JSON schema says what its values may be and what they are when nothing is given. The text below a field says
what it is. docs/RECORDS.md and the reference in config/README.md come from here, so neither can say anything else.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel

from armor.core.typed import Typed
from armor.format import layout, records
from armor.format.records.base import Record

__all__ = ["field_table", "layout_tree", "record_reference", "record_table", "record_types", "table", "words"]

ORDER = (
    "run",
    "source",
    "topology",
    "calibration",
    "sensitivity",
    "budget",
    "layer",
    "states",
    "refine",
    "tune",
    "checkpoint",
    "predictions",
    "evaluation",
    "benchmark",
    "serving",
    "report",
)
"""The modules of records in the order of the data; others follow by name, and what they share comes last."""
PLAIN = {"string": "text", "boolean": "true or false", "object": "mapping", "integer": "integer", "number": "number"}
"""JSON schema's names of types in plain words."""


def words(schema: dict[str, Any]) -> str:
    """What a value of this JSON schema is, in plain words: "integer ≥ 1", "list of text". Types are links by name."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:  # null is said by the default, or by the text
        return " or ".join(words(each) for each in schema["anyOf"] if each.get("type") != "null")
    kind = schema.get("type")
    if kind is None:
        return "any value"
    if "prefixItems" in schema:
        return f"list [{', '.join(words(each) for each in schema['prefixItems'])}]"
    if kind == "array":
        inner = words(schema["items"])
        return f"list of {'mappings' if inner == 'mapping' else inner}"
    if kind == "object" and (inner := [*schema.get("patternProperties", {}).values()]):
        return f"mapping of name to {words(inner[0])}"
    if kind == "object" and isinstance(inner := schema.get("additionalProperties"), dict) and inner:
        return f"mapping to {words(inner)}"
    for key, sign in {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}.items():
        if key in schema:
            return f"{PLAIN[kind]} {sign} {schema[key]:g}"
    return PLAIN[kind]


def field_table(kind: type[BaseModel], *, defaults: bool, hidden: Iterable[str] = ()) -> str:
    """The fields of `kind` as a Markdown table: name, type, default (of settings), text; without those `hidden`."""
    schema = kind.model_json_schema()
    schema = schema["$defs"][kind.__name__] if "$ref" in schema else schema  # so is a type that holds itself
    required, rows = schema.get("required", []), []
    for name, field in schema["properties"].items():
        if name in {*hidden}:
            continue
        text = kind.model_fields[name].description or ""
        nullable = any(each.get("type") == "null" for each in field.get("anyOf", []))
        what = words(field) + (", or null" if nullable and not defaults else "")
        default = "required" if name in required else _default(field.get("default"))
        rows.append((f"`{name}`", what, *([default] if defaults else []), " ".join(text.split())))
    heads = ("key", "type", "default", "meaning") if defaults else ("field", "type", "meaning")
    return table(heads, rows)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a cell may have any text without line breaks.

    By hand: tabulate pads every cell to the longest of its column, here a paragraph, and lets a | in a cell end it.
    """
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines)


def _default(value: Any) -> str:
    if value is None or value == [] or isinstance(value[0] if isinstance(value, list) else value, dict):
        return "–"
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    text = json.dumps(value, ensure_ascii=False)
    return f"`{text}`" if not isinstance(value, str) or "\n" in value else f"`{value}`"


def record_types() -> list[type[Typed]]:
    """Every type of armor.format.records: in the order of the data, and in each module what is a file first."""
    names = [module.name for module in pkgutil.iter_modules(records.__path__)]
    names.sort(key=lambda name: (name == "base", ORDER.index(name) if name in ORDER else len(ORDER), name))
    return [kind for name in names for kind in _types(f"{records.__name__}.{name}")]


def _types(module: str) -> list[type[Typed]]:
    found = importlib.import_module(module)
    kinds = [value for value in vars(found).values() if isinstance(value, type) and issubclass(value, Typed)]
    own = [kind for kind in kinds if kind.__module__ == module or kind.__name__ in found.__all__]
    return sorted(own, key=lambda kind: not (_is_file(kind) or kind is Record))


def _is_file(kind: type[Typed]) -> bool:
    return issubclass(kind, Record) and "format_version" in kind.model_fields


def layout_tree() -> str:
    """What lies where in results/: the list in the docstring of armor.format.layout, as a block of code."""
    lines = (layout.__doc__ or "").splitlines()
    return "\n".join(["```", *textwrap.dedent("\n".join(x for x in lines if x.startswith("    "))).splitlines(), "```"])


def record_table() -> str:
    """A row for each kind of record: where it lies in results/, its type, what it holds, and what writes it."""
    rows = []
    for kind in record_types():
        if _is_file(kind):
            path, _, text = (inspect.getdoc(kind) or "").partition("\n")[0].partition(", by ")
            writer, _, what = text.partition(": ")
            rows.append((path, f"`{kind.__name__}`", what.removesuffix("."), writer))
    return table(("path in `results/`", "type", "what it holds", "written by"), rows)


def record_reference() -> str:
    """What lies where, and a section for each record: its version, its fields, and the types within them."""
    parts = ["## Where everything lies", layout_tree()]
    for kind in record_types():
        if kind is Record:
            parts.append("## What records share")
            continue
        text = " ".join((inspect.getdoc(kind) or "").split())
        text = textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
        hidden = {"format_version"}
        if issubclass(kind, Record) and _is_file(kind):
            parts += [f"## {kind.__name__}", text]
            parts.append(f"Format version {kind.version()}. A file of another version is refused: {kind.AGAIN}.")
        else:
            parts += [f"### {kind.__name__}", text]
        base = kind.__mro__[1]
        if issubclass(base, Typed) and base.model_fields:
            parts.append(f"It has the fields of [{base.__name__}](#{base.__name__.lower()}), and:")
            hidden |= base.model_fields.keys()
        parts.append(field_table(kind, defaults=False, hidden=hidden))
    return "\n\n".join(parts)
