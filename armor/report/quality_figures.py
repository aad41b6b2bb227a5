"""The figures of what was lost: perplexity and tasks by recipe, perplexity by block size."""

from __future__ import annotations

from typing import Any

import altair as alt

from armor.report.charts import (
    ACCENT,
    INK,
    MUTED,
    ROW,
    WIDTH,
    Figure,
    Mark,
    data,
    linear_axis,
    listed,
    log_axis,
    names_axis,
    palette,
    svg_of,
)
from armor.report.columns import summary_rows, task_columns
from armor.report.numbers import number, score, span
from armor.report.results import ModelResults, RecipeResults

__all__ = ["accuracy", "block_sizes", "perplexity"]


def _by_recipe(rows: list[Mark], across: dict[str, Any]) -> alt.TopLevelMixin:
    """A row for each of `rows`: a dot within the pale bar of its standard error, its value as a column at the right.

    A row has recipe, kind, value, low and high (the bar's ends) and label; `across` is the horizontal axis and scale.
    Where the dense model is among them, its dashed line crosses all rows and stems lead from it to the dots.
    """
    across["scale"].range = [0, WIDTH - 12 - 7 * max(len(row.label) for row in rows)]
    down = names_axis("recipe:N", [row.recipe for row in rows])
    color = alt.Color("kind:N", **palette({"dense": INK, "blocks": ACCENT, "pruned": MUTED}, legend=None))
    base = alt.Chart(data(rows)).encode(y=down)
    layers = []
    if dense := next((row for row in rows if row.kind == "dense"), None):
        line = alt.Chart(data([dense])).mark_rule(color=INK, strokeDash=[3, 3])
        layers.append(line.encode(x=alt.X("value:Q", **across)))
        stems = alt.Chart(data([Mark(**vars(row), dense=dense.value) for row in rows if row is not dense]))
        stems = stems.mark_rule(strokeWidth=2, opacity=0.45).encode(y=down, color=color)
        layers.append(stems.encode(x=alt.X("dense:Q", **across), x2="value:Q"))
    layers += [
        base.mark_bar(height=18, opacity=0.25).encode(x=alt.X("low:Q", **across), x2="high:Q", color=color),
        base.mark_point(filled=True, size=60, opacity=1).encode(x=alt.X("value:Q", **across), color=color),
        base.mark_text(align="right", fontSize=12, color=INK).encode(x=alt.value(WIDTH), text="label:N"),
    ]
    return alt.layer(*layers).properties(width=WIDTH, height=alt.Step(ROW + 6))


def _result(recipe: RecipeResults, value: float, low: float, high: float, **texts: str) -> Mark:
    """A result, the ends of the bar of its standard error, and what is written of it."""
    return Mark(recipe=recipe.name, kind=recipe.kind, value=value, low=low, high=high, **texts)


def perplexity(model: ModelResults, evaluation: str, name: str) -> Figure | None:
    """The perplexity of every recipe on one text, best on top; None where no recipe has it."""
    rows = []
    for recipe in model.recipes:
        if result := recipe.evaluations.get(evaluation):
            value, error = result.value, result.standard_error or 0.0
            ends = (max(value - error, value / 2), value + error)
            rows.append(_result(recipe, value, *ends, label=number(value)))
    if not rows:
        return None
    rows.sort(key=lambda row: row.value)
    low, high = min(row.low for row in rows) * 0.85, max(row.high for row in rows) * 1.15
    chart = _by_recipe(rows, log_axis(low, high, "perplexity, log scale (lower is better)"))
    caption = (
        "A dot is a recipe's perplexity, best on top, on a log scale; the pale bar around it is one standard error."
    )
    if any(row.kind == "dense" for row in rows):
        caption += " The dashed line is the dense model: the longer the stem, the more was lost."
    values = listed([(row.recipe, row.label) for row in rows])
    alternative = f"Perplexity by recipe on {evaluation}, log scale: {values}."
    return Figure(name, f"Perplexity on {evaluation}", svg_of(chart, name, alternative), caption)


def accuracy(model: ModelResults, task: str, name: str) -> Figure | None:
    """The result of every recipe on one task, best on top, a share in percent; None where no recipe has it."""
    known = [(recipe, result) for recipe in model.recipes if (result := recipe.task_results.get(task))]
    if not known:
        return None
    rows = []
    for recipe, result in known:
        value, error = result.value, result.standard_error
        ends = (value - (error or 0.0), value + (error or 0.0))
        rows.append(_result(recipe, value, *ends, label=score(value), told=score(value, error)))
    higher = next(c.higher_is_better for c in task_columns(summary_rows([model])) if c.name == task)
    if higher is not None:
        rows.sort(key=lambda row: row.value, reverse=higher)
    metric = known[0][1].metric
    what = "accuracy" if metric in ("acc", "acc_norm") else metric.replace("_", " ")
    title = what + {True: " (higher is better)", False: " (lower is better)", None: ""}[higher]
    shares = all(0 <= row.value <= 1 for row in rows)
    low, high = min(row.low for row in rows), max(row.high for row in rows)
    chart = _by_recipe(rows, linear_axis(low, high, title, format="%" if shares else "~g"))
    best = "" if higher is None else ", best on top"
    caption = f"A dot is a recipe's {what} on {task}{best}; the pale bar around it is one standard error."
    if any(row.kind == "dense" for row in rows):
        caption += " The dashed line is the dense model, the stem the distance to it."
    values = listed([(row.recipe, row.told) for row in rows])
    alternative = f"{what.capitalize()} by recipe on {task}: {values}."
    return Figure(name, f"{what.capitalize()} on {task}", svg_of(chart, name, alternative), caption)


def _dense_line(value: float, y: alt.Y, width: float) -> list[alt.Chart]:
    """A dashed line across a figure of that width, and the word for it at its right end."""
    line = alt.Chart(data([Mark(value=value, label="dense")])).encode(y=y)
    text = {"align": "right", "baseline": "top", "dx": -2, "dy": 3, "fontSize": 12, "color": MUTED}
    return [
        line.mark_rule(color=INK, strokeDash=[3, 3]),
        line.mark_text(**text).encode(x=alt.value(width), text="label:N"),
    ]


def block_sizes(model: ModelResults, name: str) -> Figure | None:
    """Perplexity by block size of recipes that differ in nothing else; None where there are not three sizes."""
    alike: dict[str, dict[int, Mark]] = {}
    for recipe in model.compressed:
        measured, asked = recipe.evaluation, recipe.pair.block_size
        if recipe.has_blocks and asked and measured and recipe.checkpoint:
            settings = [made.settings | {"block_size": None} for made in recipe.checkpoint.factors]
            later = [(stage, records[0].made_by.settings) for stage, records in recipe.stages[1:] if records]
            same = [recipe.pair.title, recipe.pair.pattern, recipe.pair.calibration, settings, later]
            sizes = alike.setdefault(str([*same, measured.evaluation, measured.made_by.settings]), {})
            text = {
                "size": span(recipe.block_sizes or (asked,)),
                "label": number(measured.value),
                "method": recipe.pair.title,
            }
            sizes.setdefault(asked, Mark(value=measured.value, **text))
    rows = [mark for _, mark in sorted(max(alike.values(), key=len, default={}).items())]
    if len(rows) < 3:
        return None
    dense = model.dense and model.dense.evaluation
    values = [row.value for row in rows] + ([dense.value] if dense else [])
    low, high = min(values) * 0.98, max(values) * 1.02
    low, high = low * (low / high) ** 0.12, high * (high / low) ** 0.08  # room for the words
    down = alt.Y("value:Q", **log_axis(low, high, "perplexity, log scale (lower is better)"))
    axis = alt.Axis(labelAngle=0, ticks=False)
    order = [row.size for row in rows]
    across = alt.X("size:O", sort=order, title="block size", scale=alt.Scale(type="point"), axis=axis)
    width, height = WIDTH + 40, 220
    base = alt.Chart(data(rows)).encode(x=across, y=down)
    layers = [
        base.mark_line(color=ACCENT, strokeWidth=2),
        base.mark_point(filled=True, size=60, opacity=1, color=ACCENT),
        base.mark_text(align="left", dx=5, dy=-8, fontSize=12, color=INK).encode(text="label:N"),
    ]
    if dense:
        layers = [*_dense_line(dense.value, down, width), *layers]
    chart = alt.layer(*layers).properties(width=width, height=height)
    caption = f"{rows[0].method} recipes that differ in nothing but the block size; larger blocks take more bits."
    if dense:
        caption += " The dashed line is the dense model."
    alternative = f"Perplexity by block size, log scale: {listed([(row.size, row.label) for row in rows])}."
    return Figure(name, "Perplexity by block size", svg_of(chart, name, alternative), caption)
