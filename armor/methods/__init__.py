"""The methods of compression. Each is one file of this folder: it describes itself, and nothing else lists it.

A file holds a function `(weight, statistics..., *, settings...) -> Factorization` under the decorator `method`. Its
name is the method's in a configuration. Its parameters say what it takes. Those after `weight` are statistics of the
input, fields of `armor.format.statistics.Statistics`. Those after the star are settings of a recipe, or `seed`. One of
them may be `settings`: the method's own, of a type in its file. A recipe gives them under the method's name. Any other
parameter is refused when the file is imported. The configuration, its schema and its reference, `armor.compress`, the
checks of memory, the report and the table in the README read the registry `METHODS`. They do it without torch: a file
here imports torch, and what imports torch, within its functions.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from armor.core.errors import ArmorError
from armor.core.pattern import DENSE, Pattern
from armor.core.typed import Typed

if TYPE_CHECKING:
    from torch import Tensor

    from armor.core.factorization import Factorization
    from armor.core.quantization import Quantization

__all__ = ["DEFAULT", "METHODS", "SETTINGS", "STATISTICS", "UNCHANGED", "Method", "method"]

DEFAULT = "armor"
"""The method of a recipe that names none."""
UNCHANGED = "dense"
"""The method that leaves a weight as it is."""

STATISTICS = ("importance", "gram")
"""What a method may take of the calibration."""
SETTINGS = ("pattern", "block_size", "rank", "solver", "settings", "seed")
"""What a method may take of a recipe, its own settings, and the seed."""

Shape = tuple[int, int]


@dataclass(frozen=True)
class Method:
    """A method of compression: what it is called, what it takes, what it costs, where it is from.

    `name` is that of a configuration, `title` that of a report. `function` is None where the weight stays as it is.
    `statistics` are those of the input that it takes, `settings` the keys of a recipe. `idea` is its first paragraph.
    `memory(shape, itemsize, **settings)` is the peak in bytes of its run on a weight of `shape` (out, in) and
    `itemsize` bytes an entry, the weight included. `obstacle(shape, **settings)` says why a weight cannot be done as
    asked, None where it can; the method named `instead` then takes its place. The one named `priced_by` takes it where
    a budget tries what a choice costs. `stored(shape, **settings)` is how it holds a weight of `shape` in integers,
    every one of them; None for a method that holds the entries of a pattern, in floats.
    """

    name: str
    title: str
    source: str
    idea: str
    function: Callable[..., Factorization] | None
    memory: Callable[..., int] = lambda shape, itemsize: 0
    obstacle: Callable[..., str | None] = lambda shape, **settings: None
    instead: str = ""
    priced_by: str = ""
    stored: Callable[..., Quantization] | None = None
    statistics: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    own: Typed | None = None
    """Its own settings, all at their defaults; None if it has none."""

    @property
    def code(self) -> tuple[str, ...]:
        """The Python modules that its run executes, for the hash of the code."""
        return tuple(f"{__name__}.{name}" for name in (self.name, self.instead) if name)

    def chosen(self, settings: Any) -> dict[str, Any]:
        """Those of a recipe's settings that it takes, by the name of its parameter."""
        found = {key: getattr(settings, key) for key in self.settings if key not in ("settings", "seed")}
        return found if self.own is None else found | {"settings": getattr(settings, self.name) or self.own}

    def peak_bytes(self, shape: Shape, itemsize: int, settings: Any) -> int:
        """The peak of its memory with the settings of a recipe."""
        return self.memory(shape, itemsize, **self.chosen(settings))

    def why_not(self, shape: Shape, settings: Any) -> str | None:
        """Why it cannot do a weight of `shape` (out, in) with the settings of a recipe; None where it can."""
        return self.obstacle(shape, **self.chosen(settings))

    def pattern(self, settings: Any) -> Pattern:
        """The pattern of its cores with the settings of a recipe."""
        return Pattern.parse(settings.pattern) if "pattern" in self.settings else DENSE

    def integers(self, shape: Shape, settings: Any) -> Quantization | None:
        """How it holds a weight of `shape` (out, in) in integers with the settings of a recipe; None: in floats."""
        return self.stored(shape, **self.chosen(settings)) if self.stored else None

    def run(self, weight: Tensor, statistics: Any, settings: Any, seed: int) -> Factorization:
        """Compress weight (out, in) under its input's statistics, on the weight's device. Raises ValueError."""
        if self.function is None:
            raise ValueError(f"{self.name}: leaves a weight as it is; there is nothing to run")
        import torch

        given = self.chosen(settings) | ({"seed": seed} if "seed" in self.settings else {})
        inputs = [getattr(statistics, name).to(weight.device) for name in self.statistics]
        with torch.no_grad():
            return self.function(weight, *inputs, **given)


METHODS: dict[str, Method] = {}
"""Every method by its name."""


def method(
    title: str,
    source: str,
    memory: Callable[..., int],
    obstacle: Callable[..., str | None] = lambda shape, **settings: None,
    instead: str = "",
    priced_by: str = "",
    stored: Callable[..., Quantization] | None = None,
) -> Callable[[Callable[..., Factorization]], Callable[..., Factorization]]:
    """Register the function below under its own name, which is that of its file.

    Raises ArmorError for a parameter that is neither among STATISTICS nor, after the star, among SETTINGS, for own
    settings without a type, and for a function of its description that does not take the settings.
    """

    def register(function: Callable[..., Factorization]) -> Callable[..., Factorization]:
        parameters = list(inspect.signature(function).parameters.values())[1:]
        where = f"{function.__module__}: {function.__name__}"
        for parameter in parameters:
            _check_parameter(parameter, where)
        settings = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        for name, described in (("memory", memory), ("obstacle", obstacle), ("stored", stored)):
            _check_takes(described, (1, 1) if name == "memory" else (1,), settings, f"{where}: {name}")
        METHODS[function.__name__] = Method(
            name=function.__name__,
            title=title,
            source=source,
            idea=_first_paragraph(inspect.getmodule(function)),
            function=function,
            memory=memory,
            obstacle=obstacle,
            instead=instead,
            priced_by=priced_by,
            stored=stored,
            statistics=tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY),
            settings=settings,
            own=next((p.default for p in parameters if p.name == "settings"), None),
        )
        return function

    return register


def _check_parameter(parameter: inspect.Parameter, where: str) -> None:
    of_recipe = parameter.kind is parameter.KEYWORD_ONLY
    known, what, place = (SETTINGS, "setting", "after") if of_recipe else (STATISTICS, "statistic", "before")
    if parameter.name not in known:
        raise ArmorError(
            f"{where}: parameter {parameter.name}: no {what} of that name, expected {', '.join(known)} {place} the "
            "star; take it out, or make it a constant of the file"
        )
    if parameter.name == "settings" and not isinstance(parameter.default, Typed):
        found = "no default" if parameter.default is parameter.empty else repr(parameter.default)
        raise ArmorError(
            f"{where}: parameter settings: {found}, expected Settings(), of a class below armor.core.typed.Typed"
        )


def _check_takes(function: Callable | None, first: tuple, settings: tuple[str, ...], where: str) -> None:
    if function is None:
        return
    try:
        inspect.signature(function).bind(*first, **dict.fromkeys(name for name in settings if name != "seed"))
    except TypeError as error:
        expected = "(shape, itemsize, **settings)" if len(first) == 2 else "(shape, **settings)"
        raise ArmorError(f"{where}: {error}; expected a function {expected}, with all settings but the seed") from None


def _first_paragraph(module: Any) -> str:
    return " ".join((inspect.getdoc(module) or "").partition("\n\n")[0].split())


def _load(name: str) -> None:
    """Import a method's file. Raises ArmorError with file and line for a mistake in it, in one line."""
    try:
        importlib.import_module(f"{__name__}.{name}")
    except ArmorError:
        raise
    except Exception as error:
        file = f"{__path__[0]}/{name}.py"
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        at = error.lineno if isinstance(error, SyntaxError) else next(reversed(lines), None)
        said = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
        raise ArmorError(
            f"{file}:{at or '?'}: {type(error).__name__}: {said}; mend this file of a method, or take it out"
        ) from error


for _module in sorted(found.name for found in pkgutil.iter_modules(__path__) if not found.ispkg):
    _load(_module)
