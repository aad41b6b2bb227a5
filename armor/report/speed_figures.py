"""The figures of speed: how fast the whole model and each shape of linears are beside dense, and a server under load.

Beside dense, both sides took turns in one process. So what is drawn is the ratio of a round: its median, and the
quartiles, which say how far rounds agreed. A row holds a batch size or a shape and a dot for each recipe, one below the
other in the legend's order. So 4 recipes and 6 shapes fit a phone. A number at each would not. The tables have the
numbers.
"""

from __future__ import annotations

import altair as alt

from armor.format.records.benchmark import Runs
from armor.format.records.serving import Served
from armor.report.charts import (
    DASHES,
    INK,
    SERIES,
    WIDTH,
    Figure,
    Mark,
    columns_of,
    data,
    linear_axis,
    listed,
    names_axis,
    palette,
    series_places,
    svg_of,
)
from armor.report.numbers import number
from armor.report.results import DENSE, ModelResults

__all__ = ["decoding", "linears", "throughput"]

CAPTION = (
    " by recipe, in the legend's order: right of the dashed line it is faster. A dot is the median over rounds in "
    "which dense and packed took turns, the pale bar the middle half of them."
)


def _ratios(model: ModelResults, points: list[Mark]) -> alt.TopLevelMixin:
    """A row for each `what` of the points, in it a dot and a bar for each recipe, and a dashed line at 1."""
    present = {point.recipe for point in points}
    colors = {name: SERIES[place] for name, place in series_places(model.compressed).items() if name in present}
    across = linear_axis(
        min(1.0, *(point.low for point in points)),
        max(1.0, *(point.high for point in points)),
        "times as fast as dense",
    )
    legend = alt.Legend(title=None, columns=columns_of(colors), symbolType="circle", symbolOpacity=1, labelLimit=130)
    down = names_axis("what:N", list(dict.fromkeys(point.what for point in points)))
    base = alt.Chart(data(points)).encode(
        y=down,
        yOffset=alt.YOffset("recipe:N", sort=list(colors), scale=alt.Scale(domain=list(colors), paddingOuter=0.7)),
        color=alt.Color("recipe:N", **palette(colors, legend=legend)),
    )
    line = alt.Chart(data([Mark(value=1)])).mark_rule(color=INK, strokeDash=[3, 3])
    return alt.layer(
        line.encode(x=alt.X("value:Q", **across)),
        base.mark_rule(strokeWidth=7, opacity=0.3).encode(x=alt.X("low:Q", **across), x2="high:Q"),
        base.mark_point(filled=True, size=45, opacity=1).encode(x=alt.X("value:Q", **across)),
    ).properties(width=WIDTH, height=alt.Step(11))


def _point(recipe: str, what: str, speedup: Runs) -> Mark:
    low, high = speedup.quartiles
    return Mark(recipe=recipe, what=what, value=speedup.median, low=low, high=high)


def _told(points: list[Mark]) -> str:
    """The numbers, recipe by recipe."""
    recipes = dict.fromkeys(point.recipe for point in points)
    own = {name: [(p.what, f"{number(p.value, 3)}×") for p in points if p.recipe == name] for name in recipes}
    return "; ".join(f"{recipe}: {listed(pairs)}" for recipe, pairs in own.items())


def decoding(model: ModelResults, benchmark: str, name: str) -> Figure | None:
    """How many times as fast as dense each recipe decodes, by batch size; None where no recipe was measured."""
    points = [
        _point(recipe.name, f"batch {batch}", phases.decode)
        for recipe in model.compressed
        if (side := recipe.benchmarks.get(benchmark)) and side.speedup
        for batch, phases in side.speedup.items()
    ]
    if not points:
        return None
    points.sort(key=lambda point: int(point.what.removeprefix("batch ")))
    caption = "Greedy decoding of the whole model, by batch size and" + CAPTION
    alternative = f"How many times as fast as dense the model decodes, by batch size: {_told(points)}."
    svg = svg_of(_ratios(model, points), name, alternative)
    return Figure(name, f"Decoding beside dense: {benchmark}", svg, caption)


def linears(model: ModelResults, benchmark: str, name: str) -> Figure | None:
    """How many times as fast as dense the packed linears of each shape are; None where none was measured."""
    points = [
        _point(recipe.name, f"{shape.out_features} × {shape.in_features}", shape.speedup)
        for recipe in model.compressed
        if (side := recipe.benchmarks.get(benchmark))
        for shape in side.linears
    ]
    if not points:
        return None
    caption = "One row, as in decoding, times the linears of a shape (out × in), by shape and" + CAPTION
    alternative = f"How many times as fast as dense a packed linear is, by shape: {_told(points)}."
    svg = svg_of(_ratios(model, points), name, alternative)
    return Figure(name, f"Linears beside dense: {benchmark}", svg, caption)


def throughput(model: ModelResults, benchmark: str, name: str) -> Figure | None:
    """Tokens per second behind a server over the number of clients, a line for each model; None where none ran."""
    record = model.serving.get(benchmark)
    if record is None:
        return None
    dense = model.dense.name if model.dense else DENSE
    sides: dict[str, Served] = {dense: record.dense}
    sides |= {recipe.name: recipe.serving[benchmark] for recipe in model.compressed if benchmark in recipe.serving}
    points = []
    for recipe, side in sides.items():
        for count, load in sorted(side.clients.items(), key=lambda known: int(known[0])):
            low, high = load.tokens_per_second.quartiles
            value = load.tokens_per_second.median
            points.append(Mark(recipe=recipe, clients=int(count), value=value, low=low, high=high))
    places = series_places(model.compressed)
    colors = {recipe: SERIES[places[recipe]] if recipe in places else INK for recipe in sides}
    dashes = {recipe: DASHES[0] if recipe in places else [3, 3] for recipe in sides}
    counts = sorted({point.clients for point in points})
    legend = alt.Legend(
        title=None,
        columns=columns_of(colors),
        symbolType="circle",
        symbolOpacity=1,
        symbolStrokeWidth=0,
        labelLimit=130,
    )
    scale = alt.Scale(type="log", base=2, domain=[counts[0] / 1.2, counts[-1] * 1.2], nice=False)
    top = alt.Scale(domain=[0, 1.05 * max(point.high for point in points)], nice=False)
    axis = alt.Axis(values=counts, format="d", grid=False)
    base = alt.Chart(data(points)).encode(
        x=alt.X("clients:Q", title="clients, log scale", scale=scale, axis=axis),
        color=alt.Color("recipe:N", **palette(colors, legend=legend)),
    )
    up = alt.Y("value:Q", title="tokens per second", scale=top, axis=alt.Axis(tickCount=5))
    chart = alt.layer(
        base.mark_rule(strokeWidth=7, opacity=0.3).encode(y=alt.Y("low:Q", scale=top), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(
            y=up, strokeDash=alt.StrokeDash("recipe:N", **palette(dashes, legend=None))
        ),
        base.mark_point(filled=True, size=45, opacity=1).encode(y=up),
    ).properties(width=WIDTH + 40, height=200)
    caption = (
        "New tokens per second of all clients together, by their number, behind vLLM's server; the dashed line is the "
        "dense model. A dot is the median over rounds in which one server after the other ran, the pale bar the middle "
        "half of them."
    )
    by = {r: [(f"{p.clients}", number(p.value, 3)) for p in points if p.recipe == r] for r in sides}
    told = "; ".join(f"{recipe}: {listed(pairs)}" for recipe, pairs in by.items())
    alternative = f"Tokens per second behind a server, by the number of clients: {told}."
    return Figure(name, f"Throughput over clients: {benchmark}", svg_of(chart, name, alternative), caption)
