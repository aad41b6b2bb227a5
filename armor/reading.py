"""From YAML, in a file or inline, to checked settings, or to one line that says what is wrong.

What pydantic finds is put the way a user needs it: the first mistake alone, its key, what stood there, and the nearest
thing that exists. Files are merged key by key, as snakemake's --configfile does, so that `armor check` sees what a run
would see.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from armor.config import Config, nearest
from armor.errors import ArmorError

__all__ = ["load_config", "missing_paths", "parse_settings"]

T = TypeVar("T", bound=BaseModel)


def load_config(*paths: str | Path) -> Config:
    """Read and check a configuration (YAML), later files over earlier ones, key by key, as snakemake's --configfile.

    Raises ArmorError with one line for the first mistake.
    """
    value: dict = {}
    for path in paths:
        part = _yaml(_text(Path(path)), str(path))
        if not isinstance(part, dict):
            raise ArmorError(f"{path}: expected a mapping of keys to values, found {part!r}")
        value = _merged(value, part)
    return parse_settings(Config, value, " ".join(map(str, paths)))


def parse_settings(kind: type[T], value: str | dict, where: str = "--settings") -> T:
    """Settings of one stage from a mapping, inline JSON or YAML, or the path of such a file. Raises ArmorError."""
    if isinstance(value, str):
        if Path(value).suffix in (".json", ".yaml", ".yml"):
            where, value = value, _text(Path(value))
        value = _yaml(value, where)
    if not isinstance(value, dict):
        raise ArmorError(f"{where}: expected a mapping of keys to values, found {value!r}")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise ArmorError(f"{where}: {_explain(error, kind)}") from None


def missing_paths(config: Config) -> list[str]:
    """A line for every local path in `config` at which there is nothing: its key, the path, what was expected."""
    named = []
    for name, model in config.models.items():
        named += [(f"models.{name}.folder", model.folder, True), (f"models.{name}.gguf", model.gguf, False)]
    for kind in ("calibrations", "evaluations"):
        for name, task in getattr(config, kind).items():
            files = enumerate(task.text and task.text.files or [])
            named += [(f"{kind}.{name}.text.files.{index}", file, False) for index, file in files]
    for name, evaluation in config.evaluations.items():
        named += [(f"evaluations.{name}.tasks", file, False) for file in evaluation.task_files()]
    return [
        f"{key}: {path}: no such {'folder' if folder else 'file'}"
        for key, path, folder in named
        if path is not None and not (Path(path).is_dir() if folder else Path(path).is_file())
    ]


def _merged(below: dict, above: dict) -> dict:
    both = {key: _merged(below[key], above[key]) for key in below.keys() & above.keys() if _dicts(below, above, key)}
    return below | above | both


def _dicts(below: dict, above: dict, key: str) -> bool:
    return isinstance(below[key], dict) and isinstance(above[key], dict)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ArmorError(f"{path}: {error.strerror}; expected a YAML or JSON file") from None
    except UnicodeDecodeError as error:
        raise ArmorError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ArmorError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


_UNION_TAGS = ("str", "list[str]")  # pydantic's names for the types that a value may have, at the end of its place


def _explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake of a ValidationError, in one line: key, what was found, what was expected."""
    # An unknown key first: a misspelt one leaves the right one missing, and its name says more than that.
    first = min(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in first["loc"] if part not in _UNION_TAGS)
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(first['loc'][-1], _fields_at(root, first['loc'][:-1]))}"
    if first["type"] == "literal_error":
        known = [part.strip(" '") for part in first["ctx"]["expected"].replace(" or ", ",").split(",")]
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
