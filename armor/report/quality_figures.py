"""The figures of what was lost: perplexity and tasks by recipe, quality against bits per weight and by block size."""

from __future__ import annotations

import math

import altair as alt

from armor.report.charts import (
    ACCENT,
    INK,
    MUTED,
    PAPER,
    ROW,
    WIDTH,
    Figure,
    beside,
    data,
    linear_axis,
    listed,
    log_axis,
    names_axis,
    palette,
    svg_of,
)
from armor.report.results import ModelResults
from armor.report.tables import higher_is_better, number, score

__all__ = ["accuracy", "block_sizes", "pareto", "perplexity"]


def _by_recipe(rows: list[dict], across: dict) -> alt.LayerChart:
    """A row for each of `rows`: a dot within the pale bar of its standard error, its value as a column at the right.

    A row has recipe, kind, value, low and high (the bar's ends) and label; `across` is the horizontal axis and scale.
    Where the dense model is among them, its dashed line crosses all rows and stems lead from it to the dots.
    """
    across["scale"].range = [0, WIDTH - 12 - 7 * max(len(row["label"]) for row in rows)]
    down = names_axis("recipe:N", [row["recipe"] for row in rows])
    color = alt.Color("kind:N", **palette({"dense": INK, "armor": ACCENT, "other": MUTED}, legend=None))
    base = alt.Chart(data(rows)).encode(y=down)
    layers = []
    if dense := next((row for row in rows if row["kind"] == "dense"), None):
        line = alt.Chart(data([dense])).mark_rule(color=INK, strokeDash=[3, 3])
        layers.append(line.encode(x=alt.X("value:Q", **across)))
        stems = alt.Chart(data([row | {"dense": dense["value"]} for row in rows if row is not dense]))
        stems = stems.mark_rule(strokeWidth=2, opacity=0.45).encode(y=down, color=color)
        layers.append(stems.encode(x=alt.X("dense:Q", **across), x2="value:Q"))
    layers += [
        base.mark_bar(height=18, opacity=0.25).encode(x=alt.X("low:Q", **across), x2="high:Q", color=color),
        base.mark_point(filled=True, size=60, opacity=1).encode(x=alt.X("value:Q", **across), color=color),
        base.mark_text(align="right", fontSize=12, color=INK).encode(x=alt.value(WIDTH), text="label:N"),
    ]
    return alt.layer(*layers).properties(width=WIDTH, height=alt.Step(ROW + 6))


def perplexity(model: ModelResults, evaluation: str, name: str) -> Figure | None:
    """The perplexity of every recipe on one text, best on top; None where no recipe has it."""
    rows = []
    for recipe in model.recipes:
        if result := recipe.evaluations.get(evaluation):
            value, error = result["value"], result["standard_error"] or 0.0
            ends = {"low": max(value - error, value / 2), "high": value + error}
            label = {"label": number(value), "kind": recipe.kind}
            rows.append({"recipe": recipe.name, "value": value, **ends, **label})
    if not rows:
        return None
    rows.sort(key=lambda row: row["value"])
    low, high = min(row["low"] for row in rows) * 0.85, max(row["high"] for row in rows) * 1.15
    chart = _by_recipe(rows, log_axis(low, high, "perplexity, log scale (lower is better)"))
    caption = (
        "A dot is a recipe's perplexity, best on top, on a log scale; the pale bar around it is one standard error."
    )
    if any(row["kind"] == "dense" for row in rows):
        caption += " The dashed line is the dense model: the longer the stem, the more was lost."
    values = listed([(row["recipe"], row["label"]) for row in rows])
    alternative = f"Perplexity by recipe on {evaluation}, log scale: {values}."
    return Figure(name, f"Perplexity on {evaluation}", svg_of(chart, name, alternative), caption)


def accuracy(model: ModelResults, task: str, name: str) -> Figure | None:
    """The result of every recipe on one task, best on top, a share in percent; None where no recipe has it."""
    known = [(recipe, result) for recipe in model.recipes if (result := recipe.task_results.get(task))]
    if not known:
        return None
    rows = []
    for recipe, result in known:
        value, error = result["value"], result["standard_error"]
        ends = {"low": value - (error or 0.0), "high": value + (error or 0.0)}
        label = {"label": score(value, None), "told": score(value, error), "kind": recipe.kind}
        rows.append({"recipe": recipe.name, "value": value, **ends, **label})
    higher = higher_is_better([model]).get(task)
    if higher is not None:
        rows.sort(key=lambda row: row["value"], reverse=higher)
    metric = known[0][1]["metric"]
    what = "accuracy" if metric in ("acc", "acc_norm") else metric.replace("_", " ")
    title = what + {True: " (higher is better)", False: " (lower is better)", None: ""}[higher]
    shares = all(0 <= row["value"] <= 1 for row in rows)
    low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
    chart = _by_recipe(rows, linear_axis(low, high, title, format="%" if shares else "~g"))
    best = "" if higher is None else ", best on top"
    caption = f"A dot is a recipe's {what} on {task}{best}; the pale bar around it is one standard error."
    if any(row["kind"] == "dense" for row in rows):
        caption += " The dashed line is the dense model, the stem the distance to it."
    values = listed([(row["recipe"], row["told"]) for row in rows])
    alternative = f"{what.capitalize()} by recipe on {task}: {values}."
    return Figure(name, f"{what.capitalize()} on {task}", svg_of(chart, name, alternative), caption)


def _front(points: list[dict]) -> list[dict]:
    """The Pareto front: those that no other point equals or beats in both bits and value, by rising bits."""
    front: list[dict] = []
    for point in sorted(points, key=lambda point: (point["bits"], point["value"])):
        if not front or point["value"] < front[-1]["value"]:
            front.append(point)
    return front


def _dense_line(value: float, y: alt.Y, width: float) -> list[alt.Chart]:
    """A dashed line across a figure of that width, and the word for it at its right end."""
    line = alt.Chart(data([{"value": value, "label": "dense"}])).encode(y=y)
    text = {"align": "right", "baseline": "top", "dx": -2, "dy": 3, "fontSize": 12, "color": MUTED}
    return [
        line.mark_rule(color=INK, strokeDash=[3, 3]),
        line.mark_text(**text).encode(x=alt.value(width), text="label:N"),
    ]


def pareto(model: ModelResults, name: str) -> Figure | None:  # noqa: C901, PLR0912, PLR0915  one chart, layer by layer
    """Perplexity against bits per weight, with speed; None where not two compressed recipes have both."""
    points = []
    for recipe in model.compressed:
        row = recipe.row()
        if row["perplexity"] is not None and row["bits_per_weight"] is not None:
            speed = "" if recipe.decode_speedup is None else f"{number(recipe.decode_speedup, 2)}×"
            point = {"recipe": recipe.name, "bits": row["bits_per_weight"], "value": row["perplexity"]}
            points.append(point | {"speed": speed, "text": f"{recipe.name} {speed}".strip()})
    if len(points) < 2:
        return None
    front = _front(points)
    dense = model.dense and model.dense.perplexity
    values = [point["value"] for point in points] + ([dense[0]] if dense else [])
    logarithmic = max(values) > 3 * min(values)
    forward, backward = (math.log, math.exp) if logarithmic else (float, float)
    start, end = forward(min(values)), forward(max(values))
    start, end = start - 0.1 * (end - start or 1), end + 0.06 * (end - start or 1)
    if logarithmic:
        down = log_axis(backward(start), backward(end), "perplexity, log scale (lower is better)")
    else:
        scale = alt.Scale(domain=[start, end], nice=False, zero=False)
        down = {"scale": scale, "axis": alt.Axis(tickCount=5), "title": "perplexity (lower is better)"}
    bits = [point["bits"] for point in points]
    margin = max(0.25, 0.08 * (max(bits) - min(bits)))
    least, most = min(bits) - margin, max(bits) + margin
    scale = alt.Scale(domain=[least, most], nice=False, zero=False)
    across = {"scale": scale, "axis": alt.Axis(grid=False, tickCount=5), "title": "bits per weight"}
    width, height = WIDTH + 40, 220
    places = [
        (
            (p["bits"] - least) / (most - least) * width,
            (end - forward(p["value"])) / (end - start) * height,
            p["text"],
        )
        for p in points
    ]
    labels, moved = [], []
    for point, (_, place, _), (left, y) in zip(points, places, beside(places, width), strict=True):
        near = point["bits"] + (-7 if left else 7) / width * (most - least)
        labels.append(point | {"left": left, "label": backward(end - y / height * (end - start)), "near": near})
        moved += labels[-1:] if place - y > 14 else []
    x, y = alt.X("bits:Q", **across), alt.Y("value:Q", **down)
    layers = []
    if dense:
        layers += _dense_line(dense[0], y, width)
    if moved:
        line = alt.Chart(data(moved)).mark_rule(color=MUTED, strokeWidth=0.8)
        layers.append(line.encode(x=x, y=y, x2="near:Q", y2="label:Q"))
    layers.append(alt.Chart(data(front)).mark_line(color=ACCENT, interpolate="step-after").encode(x=x, y=y))
    others = [point for point in points if point not in front]
    hollow = {"filled": True, "fill": PAPER, "stroke": MUTED, "strokeWidth": 1.5}
    if others:
        layers.append(alt.Chart(data(others)).mark_point(size=60, opacity=1, **hollow).encode(x=x, y=y))
    layers.append(alt.Chart(data(front)).mark_point(size=70, opacity=1, filled=True, color=ACCENT).encode(x=x, y=y))
    for side, align, dx in ((False, "left", 8), (True, "right", -8)):
        if own := [label for label in labels if label["left"] is side]:
            text = alt.Chart(data(own)).mark_text(align=align, dx=dx, fontSize=12, color=INK)
            layers.append(text.encode(x=x, y=alt.Y("label:Q", **down), text="text:N"))
    chart = alt.layer(*layers).properties(width=width, height=height)
    caption = (
        "Perplexity against the bits that a weight takes: down and to the left is better. The line is the Pareto "
        "front: no other recipe is both as small and as good as one of its filled dots."
    )
    if dense:
        caption += " The dashed line is the dense model's perplexity."
    values = {p["recipe"]: f"{number(p['value'])} at {p['bits']:.2f} bits" for p in points}
    told = listed([(p["recipe"], values[p["recipe"]] + (f" ({p['speed']})" if p["speed"] else "")) for p in points])
    ends = ", ".join(point["recipe"] for point in front)
    alternative = f"Perplexity against bits per weight: {told}. On the Pareto front: {ends}."
    if any(point["speed"] for point in points):
        speed = "how many times as fast as the dense model it decodes, one sequence at a time."
        caption += f" Beside a recipe's name: {speed}"
        alternative += f" In brackets: {speed}"
    return Figure(name, "Quality against bits per weight", svg_of(chart, name, alternative), caption)


def block_sizes(model: ModelResults, name: str) -> Figure | None:
    """Perplexity by block size of ARMOR recipes that differ in nothing else; None where there are not three sizes."""
    alike: dict[str, dict[int, tuple[str, float]]] = {}
    for recipe in model.compressed:
        if recipe.pair.method == "armor" and recipe.perplexity and recipe.checkpoint:
            settings = [made["settings"] | {"block_size": None} for made in recipe.checkpoint["factors"]]
            measured = recipe.evaluations[recipe.pair.evaluations[0]]
            same = [recipe.pair.pattern, recipe.pair.calibration, settings, measured["task"], measured["settings"]]
            sizes = alike.setdefault(str(same), {})
            sizes.setdefault(recipe.pair.block_size, (str(recipe.block_size), recipe.perplexity[0]))
    most = max(alike.values(), key=len, default={})
    if len(most) < 3:
        return None
    rows = [{"size": size, "value": value, "label": number(value)} for _, (size, value) in sorted(most.items())]
    dense = model.dense and model.dense.perplexity
    values = [row["value"] for row in rows] + ([dense[0]] if dense else [])
    low, high = min(values) * 0.98, max(values) * 1.02
    low, high = low * (low / high) ** 0.12, high * (high / low) ** 0.08  # room for the words
    down = alt.Y("value:Q", **log_axis(low, high, "perplexity, log scale (lower is better)"))
    axis = alt.Axis(labelAngle=0, ticks=False)
    order = [row["size"] for row in rows]
    across = alt.X("size:O", sort=order, title="block size", scale=alt.Scale(type="point"), axis=axis)
    width, height = WIDTH + 40, 220
    base = alt.Chart(data(rows)).encode(x=across, y=down)
    layers = [
        base.mark_line(color=ACCENT, strokeWidth=2),
        base.mark_point(filled=True, size=60, opacity=1, color=ACCENT),
        base.mark_text(align="left", dx=5, dy=-8, fontSize=12, color=INK).encode(text="label:N"),
    ]
    if dense:
        layers = [*_dense_line(dense[0], down, width), *layers]
    chart = alt.layer(*layers).properties(width=width, height=height)
    caption = "ARMOR recipes that differ in nothing but the block size; larger blocks take more bits."
    if dense:
        caption += " The dashed line is the dense model."
    alternative = f"Perplexity by block size, log scale: {listed([(row['size'], row['label']) for row in rows])}."
    return Figure(name, "Perplexity by block size", svg_of(chart, name, alternative), caption)
