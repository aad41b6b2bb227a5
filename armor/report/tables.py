"""The summary in five forms: rows for CSV and JSON, plain text for a terminal, Markdown, LaTeX, HTML for the page.

A gap is an empty field in the CSV, null in the JSON, and a dash to a reader; it is never a zero. In the forms for
readers the best value among the compressed recipes of a model stands out: lowest perplexity, KL, loss, size and time,
highest agreement with the dense model and speed, and of a task what lm-eval says is better. Values that read the same
are equally good. The page's summary says of each cell what it sorts by (an HTML `data` element), so that its script
need not read numbers written for people.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import pandas as pd
from markupsafe import Markup, escape

from armor.report.results import COLUMNS, ModelResults

__all__ = [
    "GAP",
    "METHODS",
    "best_cells",
    "cells_table",
    "csv_text",
    "duration",
    "evaluation_cells",
    "higher_is_better",
    "html_table",
    "latex_text",
    "markdown_text",
    "number",
    "percent",
    "plus_minus",
    "print_table",
    "score",
    "size",
    "summary_rows",
]

GAP = "–"
METHODS = {
    "dense": "dense",
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "nowag": "NoWag-P",
    "sparsegpt": "SparseGPT",
    "armor": "ARMOR",
}
HIGHER_IS_BETTER = {
    "perplexity": False,
    "kl": False,
    "top1_agreement": True,
    "relative_loss": False,
    "bits_per_weight": False,
    "checkpoint_bytes": False,
    "factorize_seconds": False,
    "decode_tokens_per_second": True,
}
COMPARED = tuple(HIGHER_IS_BETTER)
HEADINGS = {
    "model": "model",
    "recipe": "recipe",
    "method": "method",
    "pattern": "pattern",
    "block_size": "block",
    "perplexity": "perplexity",
    "perplexity_se": "± s.e.",
    "kl": "KL",
    "top1_agreement": "same top",
    "relative_loss": "rel. loss",
    "bits_per_weight": "bits/weight",
    "checkpoint_bytes": "size",
    "factorize_seconds": "factorize",
    "decode_tokens_per_second": "tokens/s",
}


def summary_rows(models: list[ModelResults]) -> list[dict]:
    """One row per model and recipe, with the keys COLUMNS and those of all tasks, TASK and TASK_se; None is a gap."""
    rows = [recipe.row() for model in models for recipe in model.recipes]
    keys = dict.fromkeys(key for row in rows for key in row)
    return [dict.fromkeys(keys) | row for row in rows]


def higher_is_better(models: list[ModelResults]) -> dict[str, bool]:
    """Of every column that compares, whether its best value is the highest; tasks of which that is unknown are not in.

    It is unknown where lm-eval does not say, as of a group whose tasks differ.
    """
    results = [result for model in models for recipe in model.recipes for result in recipe.task_results.items()]
    told = {task: result.get("higher_is_better") for task, result in results if result}
    return HIGHER_IS_BETTER | {task: higher for task, higher in told.items() if higher is not None}


def score(value: float | None, error: float | None) -> str:
    """The result of a task: a share in percent, anything else as it is; with its standard error."""
    return percent(value, error) if value is None or 0 <= value <= 1 else plus_minus(value, error)


def csv_text(rows: list[dict]) -> str:
    """The rows as CSV with a header; a gap is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits, thousands set apart, nothing in powers of ten; a dash for None."""
    if value is None:
        return GAP
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    rounded = round(value, decimals)
    # 9.9996 with four digits is 10.00: rounding may add a digit before the point.
    return f"{rounded:,.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def plus_minus(value: float | None, error: float | None, digits: int = 4) -> str:
    """A value and its standard error with as many decimals."""
    text = number(value, digits)
    return text if value is None or error is None else f"{text} ± {error:,.{len(text.partition('.')[2])}f}"


def percent(share: float | None, error: float | None = None) -> str:
    """A share in percent, with its standard error if given; a dash for None."""
    if share is None:
        return GAP
    return f"{100 * share:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + "%"


def size(count: float | None) -> str:
    """Bytes in MB or GB (powers of ten)."""
    if count is None:
        return GAP
    unit, scale = ("GB", 1e9) if count >= 1e10 else ("MB", 1e6) if count >= 1e6 else ("kB", 1e3)
    return f"{number(count / scale, 3)} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds as s, min or h."""
    if seconds is None:
        return GAP
    if seconds < 100:
        return f"{number(seconds, 2)} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _cell(row: dict, column: str) -> str:
    value = row[column]
    if column == "method":
        return METHODS.get(value, value)
    if column == "perplexity_se":
        return plus_minus(row["perplexity"], value).partition("± ")[2] or GAP
    shown = {
        "perplexity": number,
        "kl": lambda v: number(v, 3),
        "top1_agreement": percent,
        "relative_loss": lambda v: number(v, 3),
        "bits_per_weight": lambda v: GAP if v is None else f"{v:.2f}",
        "checkpoint_bytes": size,
        "factorize_seconds": duration,
        "decode_tokens_per_second": lambda v: number(v, 3),
    }
    if column in shown:
        return shown[column](value)
    if column not in COLUMNS:
        return score(value, None)
    return GAP if value is None else str(value)


def _with_error(row: dict, column: str) -> str:
    """The cell of a table that has no columns of its own for standard errors."""
    value, error = row[column], row.get(f"{column}_se")
    shown = {
        "perplexity": lambda: plus_minus(value, error),
        "kl": lambda: plus_minus(value, error, 3),
        "top1_agreement": lambda: percent(value, error),
    }
    if column in shown:
        return shown[column]()
    return _cell(row, column) if column in COLUMNS else score(value, error)


def _tasks(rows: list[dict]) -> list[str]:
    """The columns that are results of tasks."""
    return [key for key in rows[0] if key not in COLUMNS and f"{key}_se" in rows[0]]


def best_cells(rows: list[dict], better: dict[str, bool] = HIGHER_IS_BETTER) -> set[tuple[int, str]]:
    """The (row, column) of every value that no compressed recipe of the same model beats, where there are rivals.

    The columns are those of `better`, which says of each whether the highest value is the best.
    """
    found = set()
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [i for i, row in enumerate(rows) if row["model"] == model and row["method"] != "dense"]
        for column, highest in better.items():
            known = {i: rows[i][column] for i in own if rows[i][column] is not None}
            texts = {i: _cell(rows[i], column) for i in known}
            found |= {(i, column) for i in _best(known, texts, highest)}
    return found


def _best(values: dict[int, float], texts: dict[int, str], highest: bool) -> list[int]:
    """The keys of the best values, by what a reader sees: none if all read the same."""
    if len(set(texts.values())) < 2:
        return []
    first = (max if highest else min)(values, key=values.get)
    return [key for key in values if texts[key] == texts[first]]


def _pattern(rows: list[dict]) -> list[str]:
    """The pattern, if all recipes have the same: then it need not have a column."""
    patterns = {row["pattern"] for row in rows} - {None}
    return list(patterns) if len(patterns) == 1 else []


def _described(rows: list[dict]) -> list[str]:
    """The columns that say more of a recipe than its name."""
    named = all(row["method"] in row["recipe"] for row in rows)
    return ["method"] * (not named) + ["pattern"] * (not _pattern(rows)) + ["block_size"]


def print_table(rows: list[dict]) -> str:
    """The summary for a terminal, model by model, in under 110 columns; * marks the best compressed values."""
    best, described, pattern = best_cells(rows), _described(rows), _pattern(rows)
    columns = [c for c in HEADINGS if c not in ("model", "method", "pattern") or c in described]
    text_columns = ("recipe", "method", "pattern")
    # The asterisk's place belongs to the column, so that digits stand under digits.
    grid = [[HEADINGS[c] + " " * (c in COMPARED) for c in columns]]
    for i, row in enumerate(rows):
        grid.append([_cell(row, c) + ("*" if (i, c) in best else " ") * (c in COMPARED) for c in columns])
    widths = [max(len(line[c]) for line in grid) for c in range(len(columns))]
    lines = []
    for cells in grid:
        aligned = [
            text.ljust(width) if column in text_columns else text.rjust(width)
            for text, width, column in zip(cells, widths, columns, strict=True)
        ]
        lines.append(" ".join(aligned).rstrip())
    heading, *body = lines
    text, rule = [], "-" * max(map(len, lines))
    tasks = _tasks(rows)
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [line for line, row in zip(body, rows, strict=True) if row["model"] == model]
        text += [", ".join([model, *pattern]), heading, rule, *own, ""]
        cells = {
            row["recipe"]: {task: score(row[task], row[f"{task}_se"]) for task in tasks}
            for row in rows
            if row["model"] == model
        }
        if tasks:
            text += [pd.DataFrame.from_dict(cells, orient="index").to_string(line_width=110), ""]
    return "\n".join([*text, f"* best among the compressed   {GAP} not measured, or not applicable"]) + "\n"


def evaluation_cells(model: ModelResults) -> tuple[dict[str, dict[str, str]], set[tuple[int, str]]]:
    """Perplexity, KL and agreement on every text: what stands in the cell by recipe and column, and the best of them.

    The best are (row, column) of compressed recipes, where there are rivals.
    """
    cells: dict[str, dict[str, str]] = {recipe.name: {} for recipe in model.recipes}
    best = set()
    for evaluation in model.evaluation_names():
        for end, of, text, highest in (
            ("", lambda found: found, plus_minus, False),
            (": KL", lambda found: (found.get("against_dense") or {}).get("kl"), partial(plus_minus, digits=3), False),
            (": same top", lambda found: (found.get("against_dense") or {}).get("top1"), percent, True),
        ):
            column, values, texts = f"{evaluation}{end}", {}, {}
            for index, recipe in enumerate(model.recipes):
                found = of(recipe.evaluations.get(evaluation, {})) or {}
                cells[recipe.name][column] = text(found.get("value"), found.get("standard_error"))
                if found and not recipe.dense:
                    values[index], texts[index] = found["value"], text(found["value"], None)
            best |= {(index, column) for index in _best(values, texts, highest)}
    return cells, best


def _frames(
    rows: list[dict], better: dict[str, bool], models: Sequence[ModelResults]
) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """Of each table what stands above it, the texts by recipe and heading, and which of them are the best.

    Each model of the rows has its summary; those of `models` that were evaluated on several texts, a table of these.
    """

    def frame(cells: dict[str, dict]) -> pd.DataFrame:
        return pd.DataFrame.from_dict(cells, orient="index").rename_axis(columns="recipe")

    best = best_cells(rows, better)
    columns = [*_described(rows), *COMPARED, *_tasks(rows)]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {row["recipe"]: (i, row) for i, row in enumerate(rows) if row["model"] == model}
        texts = {name: {HEADINGS.get(c, c): _with_error(row, c) for c in columns} for name, (_, row) in own.items()}
        bold = {name: {HEADINGS.get(c, c): (i, c) in best for c in columns} for name, (i, _) in own.items()}
        yield ", ".join([model, *_pattern(rows)]), frame(texts), frame(bold)
        for results in models:
            if results.name == model and len(results.evaluation_names()) > 1:
                cells, places = evaluation_cells(results)
                chosen = {name: {c: (i, c) in places for c in cells[name]} for i, name in enumerate(cells)}
                yield f"{model}, by text", frame(cells), frame(chosen)


def markdown_text(rows: list[dict], better: dict[str, bool], models: Sequence[ModelResults] = ()) -> str:
    """The summary as Markdown, a table for each model, with standard errors, the best compressed values in bold.

    `better` is what `higher_is_better` found. Of `models` evaluated on several texts a table with all of them follows.
    """

    def escaped(text: str) -> str:
        return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)

    parts = []
    for title, texts, bold in _frames(rows, better, models):
        texts = texts.map(escaped)
        texts = texts.where(~bold, "**" + texts + "**").rename(index=escaped, columns=escaped)
        alignment = ["left", *["right"] * len(texts.columns)]
        table = texts.to_markdown(disable_numparse=True, colalign=alignment, headers=["recipe", *texts.columns])
        parts.append(f"## {escaped(title)}\n\n{table}\n")
    return "\n".join(parts)


def latex_text(rows: list[dict], better: dict[str, bool], models: Sequence[ModelResults] = ()) -> str:
    """The summary as LaTeX, a table for each model, as `markdown_text`."""

    def symbols(text: str) -> str:  # that every engine and font has
        return text.replace("±", r"$\pm$").replace(GAP, "--")

    parts = ["% \\usepackage{booktabs}\n"]
    for title, texts, bold in _frames(rows, better, models):
        styler = texts.style.format(symbols, escape="latex").format_index(escape="latex")
        styler.format_index(escape="latex", axis="columns")
        styles = bold.map(lambda best: "textbf:--rwrap;" if best else "")
        styler.apply(lambda _, styles=styles: styles, axis=None)
        form = {"hrules": True, "position": "htbp", "position_float": "centering"}
        caption = title.replace("_", r"\_")
        parts.append(styler.to_latex(column_format="l" + "r" * len(texts.columns), caption=caption, **form))
    return "\n".join(parts)


def cells_table(
    cells: dict[str, dict[str, str]],
    name: str,
    bold: set[tuple[int, str]] = frozenset(),
    classes: str = "data",
    corner: str = "Recipe",
) -> str:
    """Texts by row and column as an HTML table with the id T_`name`; `bold` has (row, column) of the best."""
    frame = pd.DataFrame.from_dict(cells, orient="index", dtype=object).fillna("")  # object: Markup stays Markup
    frame.index = pd.Index(list(cells), dtype=object)
    frame.columns.name = corner
    styler = frame.style.set_uuid(name).set_table_attributes(f'class="{classes}"')
    styler.format(escape).format_index(escape="html").format_index(escape="html", axis="columns")
    styler.cell_ids = False
    best = [["best" if (i, column) in bold else "" for column in frame.columns] for i in range(len(frame))]
    html = styler.set_td_classes(pd.DataFrame(best, frame.index, frame.columns)).to_html()
    return html[html.index("<table") :]  # before it stands an empty style sheet


def _sorted_by(row: dict, column: str) -> str:
    """The cell with what it sorts by, in HTML; a gap has nothing to sort by."""
    text = _with_error(row, column)
    return text if row[column] is None else Markup('<data value="{}">{}</data>').format(row[column], text)


def html_table(rows: list[dict], name: str, places: Mapping[str, str]) -> str:
    """The rows of one model as an HTML table for the page's script to sort, the best compressed values in bold.

    What was measured stands first, for a phone shows no more than the first columns at once. A recipe links to the id
    in the page that `places` has for it.
    """
    columns = [*COMPARED, *dict.fromkeys([*_described(rows)[:-1], "pattern", "block_size"])]
    headings = {c: HEADINGS[c][0].upper() + HEADINGS[c][1:] for c in columns}
    link = Markup('<a href="#{}">{}</a>')
    names = [link.format(places[r["recipe"]], r["recipe"]) if r["recipe"] in places else r["recipe"] for r in rows]
    cells = {n: {headings[c]: _sorted_by(r, c) for c in columns} for n, r in zip(names, rows, strict=True)}
    best = {(i, headings[c]) for i, c in best_cells(rows) if c in headings}
    return cells_table(cells, name, best, "data sortable")
