"""A whole configuration from files, merged key by key as snakemake's --configfile does, and what it names on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from armor.config.reading import parse_settings, read_yaml
from armor.config.run import Config
from armor.config.sources import TextSettings

__all__ = ["load_config", "missing_paths"]


def load_config(*paths: str | Path) -> Config:
    """Read and check a configuration (YAML), later files over earlier ones, key by key, as snakemake's --configfile.

    Raises ArmorError with one line for the first mistake.
    """
    value: dict = {}
    for path in paths:
        value = _merged(value, read_yaml(Path(path)))
    return parse_settings(Config, value, " ".join(map(str, paths)))


def missing_paths(config: Config) -> list[str]:
    """A line for every local path in `config` at which there is nothing: its key, the path, what was expected."""
    named = []
    for name, model in config.models.items():
        named += [(f"models.{name}.folder", model.folder, True), (f"models.{name}.gguf", model.gguf, False)]
    for kind in ("calibrations", "evaluations"):
        for name, task in getattr(config, kind).items():
            named += _text_files(f"{kind}.{name}.text", task.text) if task.text else []
    for name, evaluation in config.evaluations.items():
        named += [(f"evaluations.{name}.tasks", file, False) for file in evaluation.task_files()]
    return [
        f"{key}: {path}: no such {'folder' if folder else 'file'}"
        for key, path, folder in named
        if path is not None and not (Path(path).is_dir() if folder else Path(path).is_file())
    ]


def _text_files(key: str, text: TextSettings) -> Iterator[tuple[str, str, bool]]:
    """The files of a text, and of those that it is a mixture of, each with its key."""
    for turn, part in enumerate(text.mixture or ()):
        yield from _text_files(f"{key}.mixture.{turn}", part)
    yield from ((f"{key}.files.{index}", file, False) for index, file in enumerate(text.files or ()))


def _merged(below: dict, above: dict) -> dict:
    both = {key: _merged(below[key], above[key]) for key in below.keys() & above.keys() if _dicts(below, above, key)}
    return below | above | both


def _dicts(below: dict, above: dict, key: str) -> bool:
    return isinstance(below[key], dict) and isinstance(above[key], dict)
