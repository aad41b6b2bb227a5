"""What a report is about: what was asked for, in the order of its rows."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from armor.config.common import Name
from armor.config.layers import MethodName
from armor.core.typed import Typed

__all__ = ["ReportPair", "ReportSettings"]


class ReportPair(Typed):
    """A model and a recipe to report on: what was asked for, and the names of the results."""

    model: Name
    recipe: Name
    method: MethodName
    title: str
    """The method's title."""
    pattern: str = "2:4"
    """That of the cores; 1:1 where every weight stays, as an integer."""
    block_size: int | None = Field(default=None, ge=1)
    """What was asked for; unset where a budget chooses."""
    calibration: Name | None = None
    """The calibration that the recipe uses; unset for a recipe without one."""
    chain: list[tuple[str, Name]] = []
    """The stages that made the factors, in order, each with the recipe that asks for it; unset: factorize, by this
    one."""
    evaluations: list[Name] = []
    """Perplexities, the first of which goes into the summary."""
    tasks: dict[Name, list[str]] = {}
    """Evaluations on tasks, and the names of their tasks."""
    benchmarks: list[Name] = []
    """Benchmarks in one process, the first of which goes into the summary."""
    serving: list[Name] = []
    """Benchmarks behind a server."""


class ReportSettings(Typed):
    """What the report is about, in the order of its rows."""

    title: str = "ARMOR report"
    pairs: list[ReportPair] = Field(min_length=1)
    config: dict[str, Any] = {}
    """The configuration that asks for all this, without its defaults: the page offers it to those who want it again."""
