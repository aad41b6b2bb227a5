"""From YAML, in a file or inline, to checked settings, or to one line that says what is wrong.

What pydantic finds is put the way a user needs it: the first mistake alone, its key, what stood there, and the nearest
thing that exists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from armor.config.common import nearest
from armor.core.errors import ArmorError

__all__ = ["parse_settings", "read_yaml"]

T = TypeVar("T", bound=BaseModel)


def parse_settings(kind: type[T], value: str | dict, where: str = "--settings") -> T:
    """Settings of one stage from a mapping, inline JSON or YAML, or the path of such a file. Raises ArmorError."""
    if isinstance(value, str):
        is_path = Path(value).suffix in (".json", ".yaml", ".yml")
        where, value = (value, read_yaml(Path(value))) if is_path else (where, _mapping(value, where))
    if not isinstance(value, dict):
        raise ArmorError(f"{where}: expected a mapping of keys to values, found {value!r}")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise ArmorError(f"{where}: {_explain(error, kind)}") from None


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML or JSON file. Raises ArmorError if there is none, or where a key is given twice."""
    try:
        return _mapping(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ArmorError(f"{path}: {error.strerror}; expected a YAML or JSON file") from None
    except UnicodeDecodeError as error:
        raise ArmorError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _mapping(text: str, where: str) -> dict:
    try:
        _check(yaml.compose(text, yaml.SafeLoader), where, "", {})
        value = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ArmorError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ArmorError(f"{where}: expected a mapping of keys to values, found {value!r}")
    return value


def _check(node: yaml.Node | None, where: str, place: str, done: dict[int, bool]) -> None:
    """Refuse a key that a mapping has twice, of which YAML takes the last in silence, and a node that holds itself.

    `done` has every node that was visited, by its id: True once all below it was. An alias is the node itself.
    """
    if not isinstance(node, yaml.CollectionNode) or done.get(id(node)):
        return
    if id(node) in done:
        line = node.start_mark.line + 1
        raise ArmorError(
            f"{where}: {place}: what begins on line {line} holds itself by an alias; write out what is meant"
        )
    done[id(node)] = False
    lines: dict[str, int] = {}
    for part in node.value:
        if isinstance(node, yaml.SequenceNode):
            _check(part, where, place, done)
            continue
        key, value = part
        _check(key, where, place, done)
        name, line = f"{place}.{key.value}".lstrip("."), key.start_mark.line + 1
        if name in lines:
            raise ArmorError(f"{where}: {name}: given on line {lines[name]} and again on line {line}; keep one of them")
        lines[name] = line
        _check(value, where, name, done)
    done[id(node)] = True


_UNION_TAGS = ("str", "list[str]")  # pydantic's names for the types that a value may have, at the end of its place


def _explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake of a ValidationError, in one line: key, what was found, what was expected."""
    # An unknown key first: a misspelt one leaves the right one missing, and its name says more than that.
    first = min(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in first["loc"] if part not in _UNION_TAGS)
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(str(first['loc'][-1]), _fields_at(root, first['loc'][:-1]))}"
    if first["type"] == "literal_error":
        known = [part.strip(" '") for part in first.get("ctx", {})["expected"].replace(" or ", ",").split(",")]
        return f"{where}: {first['input']!r} is unknown{nearest(first['input'], known)}"
    message = first["msg"].removeprefix("Value error, ")
    found = "" if first["type"] in ("missing", "value_error") else f", found {first['input']!r}"
    return f"{where + ': ' if where else ''}{message}{found}"


def _fields_at(model: type[BaseModel], location: tuple) -> list[str]:
    """The keys that exist at `location`, followed from `model` through dictionaries and lists."""
    annotation: Any = model
    for part in location:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            annotation = annotation.model_fields[part].annotation
            inner = [a for a in get_args(annotation) if a is not type(None)]
            if type(None) in get_args(annotation):
                annotation = inner[0]
        else:  # dict[Name, X] or list[X]
            annotation = get_args(annotation)[-1]
    return list(annotation.model_fields)
