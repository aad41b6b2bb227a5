"""The reference of the configuration, made from its types: a JSON schema, and what people read.

A part of a page between the comments `<!-- generated: COMMAND -->` and `<!-- end -->` is what COMMAND prints. `fresh`
makes these parts anew; `armor schema --write FILE...` does it in place.
"""

from __future__ import annotations

import inspect
import json
import re

from armor.config.budget import BudgetSettings
from armor.config.layers import Choice, Override
from armor.config.measures import BenchmarkSettings, EvaluationSettings
from armor.config.quantization import QuantizeOverride, QuantizeSettings
from armor.config.recipes import Recipe
from armor.config.run import Config, Run
from armor.config.sources import CalibrationSettings, ModelSettings, TextSettings
from armor.config.training import RefineSettings, TuneSettings
from armor.core.errors import ArmorError
from armor.core.typed import Typed
from armor.format.reference import field_table, record_table, table
from armor.methods import METHODS, Method
from armor.methods.solver.settings import SolverSettings

__all__ = ["PARTS", "fresh", "json_schema", "markdown", "methods", "short_methods"]

SECTIONS = {
    "The whole file": Config,
    "A model": ModelSettings,
    "A text": TextSettings,
    "A calibration": CalibrationSettings,
    "A recipe": Recipe,
    "The solver": SolverSettings,
    "An override": Override,
    "A budget": BudgetSettings,
    "A choice": Choice,
    "Refinement": RefineSettings,
    "Tuning": TuneSettings,
    "Quantization": QuantizeSettings,
    "An override of it": QuantizeOverride,
    "An evaluation": EvaluationSettings,
    "A benchmark": BenchmarkSettings,
    "A run": Run,
}
"""The types of a configuration, from the whole to its parts, each under its heading."""


def json_schema() -> str:
    """The JSON schema of a configuration, as indented text."""
    return json.dumps(Config.model_json_schema(), indent=2, sort_keys=True) + "\n"


def markdown() -> str:
    """Every key of a configuration: a section with a table for each type; the methods after the recipe."""
    own = {f"Settings of {name}": type(method.own) for name, method in METHODS.items() if method.own is not None}
    sections = SECTIONS | own
    parts = []
    for heading, kind in sections.items():
        parts += [f"## {heading}", inspect.getdoc(kind) or "", _linked(field_table(kind, defaults=True), sections)]
        if kind is Recipe:
            parts += ["## The methods", methods()]
    return "\n\n".join(parts)


def _linked(table: str, sections: dict[str, type[Typed]]) -> str:
    """The names of types as links to their sections; a part of a type that has one leads there."""
    parts = {"SolverChange": "the solver"}
    anchors = {kind.__name__: heading.lower() for heading, kind in sections.items()} | parts
    for heading, kind in sections.items():  # as pydantic calls a type whose name another one has too
        anchors[f"{kind.__module__}__{kind.__name__}".replace(".", "__")] = heading.lower()
    return re.sub(
        r"\[(\w+)\]\(#\w+\)",
        lambda found: f"[{anchors[found[1]]}](#{anchors[found[1]].replace(' ', '-')})",
        table,
    )


def methods() -> str:
    """The registered methods: what each takes of the calibration and of the recipe, its idea and its source."""
    heads = ("method", "title", "of the calibration", "of the recipe", "idea", "source")
    rows = [
        (f"`{m.name}`", m.title, _needs(m), _takes(m), m.idea, m.source or "–")
        for m in sorted(METHODS.values(), key=lambda m: (m.function is not None, m.name))
    ]
    return table(heads, rows)


def short_methods() -> str:
    """The registered methods, each with its title and source."""
    return table(
        ("method", "title", "source"),
        [(f"`{m.name}`", m.title, m.source) for _, m in sorted(METHODS.items()) if m.function is not None],
    )


def _needs(method: Method) -> str:
    return ", ".join(f"`{name}`" for name in method.statistics) or "–"


def _takes(method: Method) -> str:
    own = {"settings": method.name}  # a recipe has them under the method's name
    return ", ".join(f"`{own.get(name, name)}`" for name in method.settings if name != "seed") or "–"


PARTS = {
    "armor schema --markdown": markdown,
    "armor schema --methods": short_methods,
    "armor schema --records": record_table,
}
"""What each command prints that a page may have as a part."""

_PART = re.compile(r"(<!-- generated: (?P<command>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def fresh(text: str, where: str = "") -> str:
    """`text` with every generated part made anew. Raises ArmorError for a command that makes none."""

    def made(found: re.Match[str]) -> str:
        if found["command"] not in PARTS:
            raise ArmorError(f"{where}: generated: {found['command']!r}: expected one of {', '.join(PARTS)}")
        return f"{found[1]}\n{PARTS[found['command']]()}\n\n{found[3]}"

    return _PART.sub(made, text)
