"""The figures: which charts the report shows, and what their captions say.

Charts get exactly the values that exist: a gap in the results is a gap in the figure. The numbers themselves are in the
tables. How a chart looks is said in charts.py.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from statistics import fmean, quantiles

import altair as alt

from armor.report.charts import (
    ACCENT,
    DASHES,
    HEAT,
    INK,
    MUTED,
    PAPER,
    ROW,
    SERIES,
    STAGE_COLORS,
    WIDTH,
    beside,
    columns_of,
    data,
    layer_ticks,
    log_axis,
    names_axis,
    palette,
    round_numbers,
    svg_of,
)
from armor.report.results import STAGES, ModelResults, RecipeResults
from armor.report.tables import duration, number, size

__all__ = ["Figure", "figures"]


@dataclass(frozen=True)
class Figure:
    """An SVG for the page, its heading, and a caption that says what one sees."""

    name: str
    title: str
    svg: str
    caption: str


def _kind(recipe: RecipeResults) -> str:
    return "dense" if recipe.dense else "armor" if recipe.pair.method == "armor" else "other"


def _colors(model: ModelResults) -> dict[str, int]:
    """Recipes to places in SERIES and DASHES, ARMOR first; beyond their length they come round again."""
    ordered = sorted(model.compressed, key=lambda recipe: recipe.pair.method != "armor")
    return {recipe.name: index % len(SERIES) for index, recipe in enumerate(ordered)}


def _list(pairs: list[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {value}" for name, value in pairs)


def _perplexity(model: ModelResults, evaluation: str, name: str) -> Figure | None:
    rows = []
    for recipe in model.recipes:
        if result := recipe.evaluations.get(evaluation):
            value, error = result["value"], result["standard_error"] or 0.0
            ends = {"low": max(value - error, value / 2), "high": value + error}
            label = {"label": number(value), "kind": _kind(recipe)}
            rows.append({"recipe": recipe.name, "value": value, **ends, **label})
    if not rows:
        return None
    rows.sort(key=lambda row: row["value"])
    order = [row["recipe"] for row in rows]
    low, high = min(row["low"] for row in rows) * 0.85, max(row["high"] for row in rows) * 1.15
    across = log_axis(low, high, "perplexity, log scale (lower is better)")
    across["scale"].domain = [low, high * (high / low) ** 0.2]  # room for the last label
    color = alt.Color("kind:N", **palette({"dense": INK, "armor": ACCENT, "other": MUTED}, legend=None))
    base = alt.Chart(data(rows)).encode(y=names_axis("recipe:N", order))
    layers = []
    dense = next((row for row in rows if row["kind"] == "dense"), None)
    if dense:
        line = alt.Chart(data([dense])).mark_rule(color=INK, strokeDash=[3, 3])
        layers.append(line.encode(x=alt.X("value:Q", **across)))
        stems = alt.Chart(data([row | {"dense": dense["value"]} for row in rows if row is not dense]))
        stems = stems.mark_rule(strokeWidth=2, opacity=0.45).encode(y=names_axis("recipe:N", order), color=color)
        layers.append(stems.encode(x=alt.X("dense:Q", **across), x2="value:Q"))
    layers += [
        base.mark_bar(height=18, opacity=0.25).encode(x=alt.X("low:Q", **across), x2="high:Q", color=color),
        base.mark_point(filled=True, size=60, opacity=1).encode(x=alt.X("value:Q", **across), color=color),
        base.mark_text(align="left", dx=8, fontSize=12, color=INK).encode(x=alt.X("high:Q", **across), text="label:N"),
    ]
    chart = alt.layer(*layers).properties(width=WIDTH, height=alt.Step(ROW + 6))
    caption = (
        "A dot is a recipe's perplexity, best on top, on a log scale; the pale bar around it is one standard error."
    )
    if dense:
        caption += " The dashed line is the dense model: the longer the stem, the more was lost."
    values = _list([(row["recipe"], row["label"]) for row in rows])
    alternative = f"Perplexity by recipe on {evaluation}, log scale: {values}."
    return Figure(name, f"Perplexity on {evaluation}", svg_of(chart, name, alternative), caption)


def _front(points: list[dict]) -> list[dict]:
    """The Pareto front: those that no other point equals or beats in both bits and value, by rising bits."""
    front: list[dict] = []
    for point in sorted(points, key=lambda point: (point["bits"], point["value"])):
        if not front or point["value"] < front[-1]["value"]:
            front.append(point)
    return front


def _dense_line(perplexity: float, y: alt.Y, width: float) -> list[alt.Chart]:
    """A dashed line across a figure of that width, and the word for it at its right end."""
    line = alt.Chart(data([{"value": perplexity, "label": "dense"}])).encode(y=y)
    text = {"align": "right", "baseline": "top", "dx": -2, "dy": 3, "fontSize": 12, "color": MUTED}
    return [
        line.mark_rule(color=INK, strokeDash=[3, 3]),
        line.mark_text(**text).encode(x=alt.value(width), text="label:N"),
    ]


def _pareto(model: ModelResults, name: str) -> Figure | None:
    points = []
    for recipe in model.compressed:
        row = recipe.row()
        if row["perplexity"] is not None and row["bits_per_weight"] is not None:
            points.append({"recipe": recipe.name, "bits": row["bits_per_weight"], "value": row["perplexity"]})
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
            p["recipe"],
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
            layers.append(text.encode(x=x, y=alt.Y("label:Q", **down), text="recipe:N"))
    chart = alt.layer(*layers).properties(width=width, height=height)
    caption = (
        "Perplexity against the bits that a weight takes: down and to the left is better. The line is the Pareto "
        "front: no other recipe is both as small and as good as one of its filled dots."
    )
    if dense:
        caption += " The dashed line is the dense model's perplexity."
    told = _list([(p["recipe"], f"{number(p['value'])} at {p['bits']:.2f} bits") for p in points])
    ends = ", ".join(point["recipe"] for point in front)
    alternative = f"Perplexity against bits per weight: {told}. On the Pareto front: {ends}."
    return Figure(name, "Quality against bits per weight", svg_of(chart, name, alternative), caption)


def _block_sizes(model: ModelResults, name: str) -> Figure | None:
    """Of the ARMOR recipes that differ in nothing but the block size, where there are three sizes."""
    alike: dict[str, dict[int, float]] = {}
    for recipe in model.compressed:
        if recipe.pair.method == "armor" and recipe.perplexity and recipe.checkpoint:
            settings = [made["settings"] | {"block_size": None} for made in recipe.checkpoint["factors"]]
            measured = recipe.evaluations[recipe.pair.evaluations[0]]
            same = [recipe.pair.pattern, recipe.pair.calibration, settings, measured["task"], measured["settings"]]
            sizes = alike.setdefault(str(same), {})
            sizes.setdefault(recipe.pair.block_size, recipe.perplexity[0])
    most = max(alike.values(), key=len, default={})
    if len(most) < 3:
        return None
    rows = [{"size": d, "value": value, "label": number(value)} for d, value in sorted(most.items())]
    dense = model.dense and model.dense.perplexity
    values = [row["value"] for row in rows] + ([dense[0]] if dense else [])
    low, high = min(values) * 0.98, max(values) * 1.02
    low, high = low * (low / high) ** 0.12, high * (high / low) ** 0.08  # room for the words
    down = alt.Y("value:Q", **log_axis(low, high, "perplexity, log scale (lower is better)"))
    axis = alt.Axis(labelAngle=0, ticks=False)
    across = alt.X("size:O", title="block size", scale=alt.Scale(type="point"), axis=axis)
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
    alternative = f"Perplexity by block size, log scale: {_list([(str(row['size']), row['label']) for row in rows])}."
    return Figure(name, "Perplexity by block size", svg_of(chart, name, alternative), caption)


def _loss_by_layer(model: ModelResults, name: str) -> Figure | None:
    rows, means = [], []
    for recipe in model.compressed:
        layers: dict[int, list[float]] = {}
        for module in recipe.modules:
            layers.setdefault(module.layer, []).append(module.loss)
        points = [(layer, mean) for layer, losses in layers.items() if (mean := fmean(losses)) > 0]
        rows += [{"recipe": recipe.name, "layer": layer, "loss": loss} for layer, loss in points]
        if points:
            means.append((recipe.name, number(fmean(loss for _, loss in points), 3)))
    if not rows:
        return None
    places = {recipe: place for recipe, place in _colors(model).items() if recipe in dict(means)}
    low, high = min(row["loss"] for row in rows) * 0.9, max(row["loss"] for row in rows) * 1.1
    last = max(row["layer"] for row in rows)
    legend = alt.Legend(title=None, columns=columns_of(places), symbolStrokeWidth=2.5, symbolSize=260, labelLimit=130)
    colors = {recipe: SERIES[place] for recipe, place in places.items()}
    dashes = {recipe: DASHES[place] for recipe, place in places.items()}
    axis = alt.Axis(grid=False, values=layer_ticks(last + 1), format="d")
    scale = alt.Scale(domain=[0, max(last, 1)], nice=False)
    chart = (
        alt.Chart(data(rows))
        .mark_line(strokeWidth=2)
        .encode(
            x=alt.X("layer:Q", title="decoder layer", scale=scale, axis=axis),
            y=alt.Y("loss:Q", **log_axis(low, high, "relative loss, log scale")),
            color=alt.Color("recipe:N", **palette(colors, legend=legend)),
            strokeDash=alt.StrokeDash("recipe:N", **palette(dashes, legend=legend)),
        )
        .properties(width=WIDTH + 40, height=180)
    )
    caption = (
        "The proxy loss of each decoder layer, the mean over its linears, relative to that of a zero matrix: 0 would "
        "be the dense weight, 1 no weight at all. A peak is a layer that this method finds hard."
    )
    alternative = f"Relative loss by decoder layer, log scale, a line per recipe; means: {_list(means)}."
    return Figure(name, "Loss by decoder layer", svg_of(chart, name, alternative), caption)


def _heat_map(model: ModelResults, recipe: RecipeResults, name: str) -> Figure | None:
    modules = [module for module in recipe.modules if module.loss > 0]
    if not modules:
        return None
    names = [n for n in model.module_order() if any(module.name == n for module in modules)]
    short = {n: n.rpartition(".")[2] for n in names}
    labels = short if len(set(short.values())) == len(names) else {n: n for n in names}
    # A few classes with round borders can be told apart, and their legend can be read.
    losses = [module.loss for module in modules]
    steps = round_numbers(min(losses), max(losses), len(HEAT) - 1)
    borders = [f"{step:g}" for step in steps]
    classes = [f"{a} to {b}" for a, b in zip(borders, borders[1:], strict=False)]
    classes = [f"under {borders[0]}", *classes, f"over {borders[-1]}"] if borders else ["all alike"]
    colors = [HEAT[round(place * (len(HEAT) - 1) / max(1, len(steps)))] for place in range(len(classes))]
    rows = [
        {"layer": m.layer, "module": labels[m.name], "loss": classes[bisect.bisect(steps, m.loss)]} for m in modules
    ]
    count = max(module.layer for module in modules) + 1
    axis = alt.Axis(values=layer_ticks(count), labelAngle=0, ticks=False, domain=False)
    symbols = {"symbolType": "square", "symbolStrokeWidth": 0, "symbolSize": 110}
    legend = alt.Legend(title="relative loss", columns=3, columnPadding=8, **symbols)
    width = WIDTH + 45
    chart = (
        alt.Chart(data(rows))
        .mark_rect(stroke=PAPER, strokeWidth=min(1.0, width / count / 10))
        .encode(
            x=alt.X("layer:O", title="decoder layer", scale=alt.Scale(domain=list(range(count))), axis=axis),
            y=names_axis("module:N", [labels[n] for n in names]),
            color=alt.Color("loss:N", **palette(dict(zip(classes, colors, strict=True)), legend=legend)),
        )
        .properties(width=width, height=alt.Step(22))
    )
    best, worst = min(modules, key=lambda m: m.loss), max(modules, key=lambda m: m.loss)
    ends = [f"{number(m.loss, 2)} (layer {m.layer}, {labels[m.name]})" for m in (best, worst)]
    extremes = f"from {ends[0]} to {ends[1]}"
    caption = (
        f"Every linear of every decoder layer, {extremes}: the darker, the more was lost (the lighter on a dark page)."
    )
    if len(modules) < count * len(names):
        caption += " An empty place is a linear that stayed dense or has no result."
    alternative = f"Heat map of the relative loss of {recipe.name} by decoder layer and module, {extremes}."
    return Figure(name, f"Loss by layer and module: {recipe.name}", svg_of(chart, name, alternative), caption)


def _trace(model: ModelResults, name: str) -> Figure | None:
    rows, ends = [], []
    for recipe in model.compressed:
        modules = [module for module in recipe.modules if len(module.trace) > 1 and module.start_loss]
        if len(modules) < 2:
            continue
        grid = sorted({point[0] for module in modules for point in module.trace})
        for iteration in dict.fromkeys(grid[:: max(1, len(grid) // 60)] + grid[-1:]):
            ratios = []
            for module in modules:
                # The best loss so far is a staircase: its value is that of the last point up to here.
                place = bisect.bisect(module.trace, iteration, key=lambda point: point[0]) - 1
                ratios.append(module.trace[max(0, place)][2] / module.start_loss)
            low, middle, high = quantiles(ratios, n=4, method="inclusive")
            rows.append({"recipe": recipe.name, "iteration": iteration, "low": low, "ratio": middle, "high": high})
        ends.append((recipe.name, number(rows[-1]["ratio"], 2)))
    if not rows:
        return None
    colors = {recipe: SERIES[place] for recipe, place in _colors(model).items() if recipe in dict(ends)}
    legend = alt.Legend(title=None, columns=columns_of(colors), symbolOpacity=1) if len(colors) > 1 else None
    color = alt.Color("recipe:N", **palette(colors, legend=legend))
    down = log_axis(
        min(r["low"] for r in rows) * 0.9, max(1.0, *(r["high"] for r in rows)), "share of the start's loss"
    )
    base = alt.Chart(data(rows)).encode(
        x=alt.X("iteration:Q", title="iteration", axis=alt.Axis(grid=False, tickCount=5)), color=color
    )
    chart = alt.layer(
        base.mark_area(opacity=0.22).encode(y=alt.Y("low:Q", **down), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=alt.Y("ratio:Q", **down)),
    ).properties(width=WIDTH + 40, height=180)
    caption = (
        "How far the solver has come: the best loss so far of each linear as a share of its NoWag-P start, which is 1, "
        "on a log scale. The line is the median over all linears, the band the middle half of them."
    )
    alternative = (
        f"Best loss as a share of the start's against iterations, median over linears; at the end: {_list(ends)}."
    )
    return Figure(name, "The solver at work", svg_of(chart, name, alternative), caption)


def _size(model: ModelResults, name: str) -> Figure | None:
    rows = []
    dense = model.dense and model.dense.row()["checkpoint_bytes"]
    for recipe in model.recipes:
        if (count := recipe.row()["checkpoint_bytes"]) is not None:
            share = f" ({count / dense:.0%})" if dense and not recipe.dense else ""
            rows.append({"recipe": recipe.name, "bytes": count, "kind": _kind(recipe), "label": size(count) + share})
    if not rows:
        return None
    largest = max(row["bytes"] for row in rows)
    base = alt.Chart(data(rows)).encode(
        y=names_axis("recipe:N", [row["recipe"] for row in rows]),
        x=alt.X("bytes:Q", scale=alt.Scale(domain=[0, largest * 1.02], nice=False), axis=None),
    )
    wide = alt.datum.bytes > largest * 0.55  # such a bar has its label inside
    inside = {"align": "right", "dx": -6, "color": PAPER, "fontWeight": "bold"}
    color = alt.Color("kind:N", **palette({"dense": MUTED, "armor": ACCENT, "other": SERIES[-1]}, legend=None))
    chart = alt.layer(
        base.mark_bar(height=18, cornerRadiusEnd=2).encode(color=color),
        base.transform_filter(wide).mark_text(fontSize=12, **inside).encode(text="label:N"),
        base.transform_filter(~wide).mark_text(fontSize=12, align="left", dx=6, color=INK).encode(text="label:N"),
    ).properties(width=WIDTH, height=alt.Step(ROW))
    caption = (
        "All files of each checkpoint, and their share of the dense model's. Embeddings and norms are not compressed."
    )
    alternative = f"Size of the checkpoints: {_list([(row['recipe'], row['label']) for row in rows])}."
    return Figure(name, "Size on disk", svg_of(chart, name, alternative), caption)


def _time(model: ModelResults, name: str) -> Figure | None:
    rows, totals = [], []
    spent = {row: {"calibrate": record["seconds"]} for row, record in model.calibration_rows().items()}
    spent |= {recipe.name: recipe.seconds() for recipe in model.recipes}
    for who, stages in spent.items():
        known = {stage: seconds for stage, seconds in stages.items() if seconds}
        rows += [{"recipe": who, "stage": s, "place": STAGES.index(s), "seconds": t} for s, t in known.items()]
        if known:
            totals.append({"recipe": who, "seconds": sum(known.values()), "label": duration(sum(known.values()))})
    if not rows:
        return None
    down = names_axis("recipe:N", [row["recipe"] for row in totals])
    scale = alt.Scale(domain=[0, max(row["seconds"] for row in totals) * 1.28], nice=False)
    present = [stage for stage in STAGES if any(row["stage"] == stage for row in rows)]
    colors = {stage: STAGE_COLORS[STAGES.index(stage)] for stage in present}
    legend = alt.Legend(title=None, columns=3, symbolType="square", symbolStrokeWidth=0, symbolSize=140)
    bars = alt.Chart(data(rows)).mark_bar(height=18)
    labels = alt.Chart(data(totals)).mark_text(align="left", dx=5, color=INK, fontSize=12)
    chart = alt.layer(
        bars.encode(
            y=down,
            x=alt.X("sum(seconds):Q", scale=scale, axis=None),
            color=alt.Color("stage:N", **palette(colors, legend=legend)),
            order="place:Q",
        ),
        labels.encode(y=down, x=alt.X("seconds:Q", scale=scale, axis=None), text="label:N"),
    ).properties(width=WIDTH, height=alt.Step(ROW))
    caption = (
        "Time spent in each stage, summed over its jobs, whether they ran side by side or not. "
        "A calibration serves every recipe that uses it."
    )
    alternative = f"Time by stage; in all: {_list([(row['recipe'], row['label']) for row in totals])}."
    return Figure(name, "Time by stage", svg_of(chart, name, alternative), caption)


def figures(model: ModelResults, prefix: str) -> list[Figure]:
    """The figures of one model that its results allow, with names that begin with `prefix`."""
    drawn = [_perplexity(model, e, f"{prefix}-perplexity-{i}") for i, e in enumerate(model.evaluation_names())]
    drawn += [_pareto(model, f"{prefix}-pareto"), _block_sizes(model, f"{prefix}-blocks")]
    drawn.append(_loss_by_layer(model, f"{prefix}-layers"))
    armor = [recipe for recipe in model.compressed if recipe.pair.method == "armor"]
    drawn += [_heat_map(model, recipe, f"{prefix}-heat-{i}") for i, recipe in enumerate(armor)]
    drawn += [_trace(model, f"{prefix}-trace"), _size(model, f"{prefix}-size"), _time(model, f"{prefix}-time")]
    return [figure for figure in drawn if figure]
