"""The columns of the summary: what each says of a recipe, and how a person reads it.

To add a column, add a field of that name to `Row` (armor/format/records/report.py). It gives the column its place in
summary.csv. Then add an entry to `COLUMNS` here. It gives the column its place in the tables of page, terminal,
Markdown and LaTeX. Its `of` may give anything that has a value and a standard error, if Row has a field `{name}_se`
too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from armor.format.records.report import Row, Score
from armor.methods import METHODS
from armor.report.numbers import GAP, duration, number, percent, plus_minus, score, size, span
from armor.report.results import ModelResults, RecipeResults, decode_speed

__all__ = ["COLUMNS", "Column", "shown_columns", "summary_rows", "task_columns"]

LOWEST, HIGHEST = False, True
"""Which value is the best."""


@dataclass(frozen=True)
class Column:
    """A column: the field of Row, or the task, that it shows, its heading, and how to show it.

    `of` gives what it says of a recipe; None for a task, which rows hold by themselves. `shown` writes a value that is
    no gap, and its standard error where it has one. `higher_is_better` is None for what is not compared. `by_text`
    says that it has a value for every text, of which the summary shows the first. `is_known(rows)` says whether a
    reader of the table knows it without the column, which is then left out, but not on the page if `on_page`. The
    terminal has room for its standard error if `error_in_terminal`.
    """

    name: str
    heading: str
    of: Callable[[RecipeResults], Any] | None
    shown: Callable[..., str] = str
    higher_is_better: bool | None = None
    by_text: bool = False
    is_known: Callable[[Sequence[Row]], bool] = lambda rows: False
    on_page: bool = False
    error_in_terminal: bool = False

    @property
    def has_error(self) -> bool:
        """Whether rows have a field for its standard error."""
        return f"{self.name}_se" in Row.model_fields

    def measure(self, recipe: RecipeResults) -> tuple[Any, float | None]:
        """What it says of a recipe, and the standard error; None for a gap and for what has none."""
        found = self.of(recipe) if self.of else None
        if found is None or not self.has_error:
            return found, None
        return found.value, found.standard_error

    def read(self, row: Row) -> tuple[Any, float | None]:
        """What a row holds of it, as `measure`."""
        if self.of is None:
            found = row.score(self.name)
            return found.value, found.standard_error
        return getattr(row, self.name), getattr(row, f"{self.name}_se", None)

    def text(self, value: Any, error: float | None = None) -> str:
        """What a person reads."""
        if value is None:
            return GAP
        return self.shown(value) if error is None else self.shown(value, error)

    def best(self, values: Mapping[str, Any]) -> set[str]:
        """The keys of the best values, without gaps; those that read the same are equally good, none if all do."""
        known = {key: value for key, value in values.items() if value is not None}
        texts = {key: self.text(value) for key, value in known.items()}
        if self.higher_is_better is None or len({*texts.values()}) < 2:
            return set()
        first = (max if self.higher_is_better else min)(known, key=known.__getitem__)
        return {key for key in known if texts[key] == texts[first]}


def _title(method: str) -> str:
    """A summary of another release may name a method that this one has not."""
    return METHODS[method].title if method in METHODS else method


COLUMNS = (
    Column(
        "method",
        "method",
        lambda recipe: recipe.pair.method,
        _title,
        is_known=lambda rows: all(row.method in row.recipe for row in rows),
    ),
    Column(
        "pattern",
        "pattern",
        lambda recipe: None if recipe.dense else recipe.pair.pattern,
        is_known=lambda rows: len({row.pattern for row in rows} - {None}) == 1,
        on_page=True,
    ),
    Column("block_sizes", "block", lambda recipe: recipe.block_sizes, span),
    Column(
        "perplexity",
        "perplexity",
        lambda recipe: recipe.evaluation,
        plus_minus,
        LOWEST,
        by_text=True,
        error_in_terminal=True,
    ),
    Column("kl", "KL", lambda recipe: recipe.kl, partial(plus_minus, digits=3), LOWEST, by_text=True),
    Column("top1_agreement", "same top", lambda recipe: recipe.top1, percent, HIGHEST, by_text=True),
    Column("relative_loss", "rel. loss", lambda recipe: recipe.relative_loss, partial(number, digits=3), LOWEST),
    Column("bits_per_weight", "bits/weight", lambda recipe: recipe.bits_per_weight, "{:.2f}".format, LOWEST),
    Column(
        "compressed_share",
        "compressed",
        lambda recipe: recipe.compressed_share,
        percent,
        is_known=lambda rows: {percent(row.compressed_share) for row in rows} <= {percent(1), GAP},
    ),
    Column("checkpoint_bytes", "size", lambda recipe: recipe.checkpoint_bytes, size, LOWEST),
    Column("factorize_seconds", "factorize", lambda recipe: recipe.factorize_seconds, duration, LOWEST),
    Column(
        "decode_tokens_per_second",
        "tokens/s",
        lambda recipe: recipe.benchmark and decode_speed(recipe.benchmark),
        partial(number, digits=3),
        HIGHEST,
    ),
)
"""All columns but the names of model and recipe, in the order of the tables."""


def summary_rows(models: list[ModelResults]) -> tuple[Row, ...]:
    """One row per model and recipe, all with the same tasks."""
    names = dict.fromkeys(name for model in models for name in model.task_names())
    return tuple(_row(model, recipe, list(names)) for model in models for recipe in model.recipes)


def _row(model: ModelResults, recipe: RecipeResults, tasks: list[str]) -> Row:
    fields: dict[str, Any] = {}
    for column in COLUMNS:
        value, error = column.measure(recipe)
        fields |= {column.name: value} | ({f"{column.name}_se": error} if column.has_error else {})
    scores = tuple(_score(recipe, task) for task in tasks)
    return Row(model=model.name, recipe=recipe.name, **fields, tasks=scores)


def _score(recipe: RecipeResults, task: str) -> Score:
    found = recipe.task_results.get(task)
    if found is None:
        return Score(task=task)
    better = found.higher_is_better
    return Score(task=task, value=found.value, standard_error=found.standard_error, higher_is_better=better)


def task_columns(rows: Sequence[Row]) -> list[Column]:
    """A column for each task of the rows; what lm-eval says of a task, it says of all recipes."""
    found = []
    for task in (result.task for result in rows[0].tasks):
        told = [row.score(task).higher_is_better for row in rows]
        better = next((higher for higher in told if higher is not None), None)
        found.append(Column(task, task, None, score, better))
    return found


def shown_columns(rows: Sequence[Row]) -> list[Column]:
    """Those of COLUMNS that say more of these recipes than their names, one pattern and all weights compressed do."""
    return [column for column in COLUMNS if not column.is_known(rows)]
