"""The summary in five forms: CSV, plain text for a terminal, Markdown, LaTeX, HTML for the page.

A gap is an empty field in the CSV and a dash to a reader; it is never a zero. In the forms for readers the best value
among the compressed recipes of a model stands out. The page's summary says of each cell what it sorts by (an HTML
`data` element), so that its script need not read numbers written for people. `armor.report.columns` has the columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup

from armor.format.records.report import Row
from armor.report.columns import COLUMNS, Column, shown_columns, task_columns
from armor.report.numbers import GAP
from armor.report.results import ModelResults
from armor.report.table import Table, escaped

__all__ = ["by_text", "csv_text", "html_table", "latex_text", "markdown_text", "print_table", "rows_table"]

Cells = dict[str, dict[str, str]]
WIDTH = 110
"""Characters of a line in the terminal."""


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows, each by column, as CSV with a header; a gap is an empty field."""
    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")


def _by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {name: [row for row in rows if row.model == name] for name in dict.fromkeys(row.model for row in rows)}


def _best(rows: Sequence[Row], columns: Sequence[Column]) -> set[tuple[str, str]]:
    """Recipe and heading of every value that no compressed recipe beats, of the rows of one model."""
    rivals = [row for row in rows if row.pattern is not None]  # a dense model has no pattern
    values = {column.heading: column.best({row.recipe: column.read(row)[0] for row in rivals}) for column in columns}
    return {(recipe, heading) for heading, recipes in values.items() for recipe in recipes}


def rows_table(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """The rows of one model, with standard errors."""
    cells = {row.recipe: {column.heading: column.text(*column.read(row)) for column in columns} for row in rows}
    return Table(cells, _best(rows, columns))


def _title(model: str, rows: Sequence[Row]) -> str:
    """The model, and the pattern if all recipes have the same."""
    patterns = {row.pattern for row in rows if row.pattern}
    return ", ".join([model, *(patterns if len(patterns) == 1 else [])])


def print_table(rows: Sequence[Row]) -> str:
    """The summary for a terminal, model by model, columns beyond WIDTH below; * marks the best compressed values."""
    columns, tasks, parts = shown_columns(rows), task_columns(rows), []
    for model, own in _by_model(rows).items():
        cells: Cells = {row.recipe: {} for row in own}
        for column in columns:
            for row in own:
                value, error = column.read(row)
                cells[row.recipe][column.heading] = column.text(value, error if column.error_in_terminal else None)
        heading, *lines = Table(cells, _best(own, columns)).plain(WIDTH).splitlines()
        parts += [_title(model, rows), heading, "-" * len(heading), *lines, ""]
        if tasks:
            parts += [rows_table(own, tasks).plain(WIDTH), ""]
    return "\n".join([*parts, f"* best among the compressed   {GAP} not measured, or not applicable"]) + "\n"


def by_text(model: ModelResults) -> Table:
    """What is measured on texts on every one of them: perplexity, KL and agreement."""
    cells: Cells = {recipe.name: {} for recipe in model.recipes}
    best = set()
    for evaluation in model.evaluation_names():
        for place, column in enumerate(column for column in COLUMNS if column.by_text):
            heading = f"{evaluation}: {column.heading}" if place else evaluation
            found = {recipe.name: column.measure(recipe.on(evaluation)) for recipe in model.recipes}
            for name, (value, error) in found.items():
                cells[name][heading] = column.text(value, error)
            values = {recipe.name: found[recipe.name][0] for recipe in model.compressed}
            best |= {(name, heading) for name in column.best(values)}
    return Table(cells, best)


def _tables(rows: Sequence[Row], models: Sequence[ModelResults]) -> Iterator[tuple[str, Table]]:
    """Each table of the summary and what stands above it.

    Each model of the rows has its own; those of `models` that were evaluated on several texts, one of these.
    """
    columns = [*shown_columns(rows), *task_columns(rows)]
    for name, own in _by_model(rows).items():
        yield _title(name, rows), rows_table(own, columns)
        for model in models:
            if model.name == name and len(model.evaluation_names()) > 1:
                yield f"{name}, by text", by_text(model)


def markdown_text(rows: Sequence[Row], models: Sequence[ModelResults] = ()) -> str:
    """The summary as Markdown, a table for each model, with standard errors, the best compressed values in bold.

    Of `models` evaluated on several texts a table with all of them follows.
    """
    return "\n".join(f"## {escaped(title)}\n\n{table.markdown()}\n" for title, table in _tables(rows, models))


def latex_text(rows: Sequence[Row], models: Sequence[ModelResults] = ()) -> str:
    """The summary as LaTeX, a table for each model, as `markdown_text`."""
    return "\n".join(["% \\usepackage{booktabs}\n", *(table.latex(title) for title, table in _tables(rows, models))])


def html_table(rows: Sequence[Row], name: str, places: Mapping[str, str]) -> Markup:
    """The rows of one model as an HTML table for the page's script to sort, the best compressed values in bold.

    What was measured stands first, for a phone shows no more than the first columns at once. A recipe links to the id
    in the page that `places` has for it.
    """
    shown = shown_columns(rows)
    compared = [column for column in shown if column.higher_is_better is not None]
    described = [column for column in COLUMNS if column.higher_is_better is None]
    columns = compared + [column for column in described if column in shown or column.on_page]
    link = Markup('<a href="#{}">{}</a>')
    labels = {row.recipe: row.recipe for row in rows}
    labels |= {recipe: link.format(place, recipe) for recipe, place in places.items()}
    cells: Cells = {labels[row.recipe]: {_capital(c.heading): _sorted_by(c, row) for c in columns} for row in rows}
    best = {(labels[recipe], _capital(heading)) for recipe, heading in _best(rows, columns)}
    return Table(cells, best).html(name, "data sortable")


def _sorted_by(column: Column, row: Row) -> str:
    """The cell with what it sorts by, in HTML; a gap has nothing to sort by."""
    value, error = column.read(row)
    text = column.text(value, error)
    first = value[0] if isinstance(value, tuple) else value
    return text if value is None else Markup('<data value="{}">{}</data>').format(first, text)


def _capital(heading: str) -> str:
    return heading[0].upper() + heading[1:]
