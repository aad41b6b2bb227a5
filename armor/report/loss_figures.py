"""The figures of the layer-wise loss: by decoder layer, by layer and module, and over the solver's iterations."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from statistics import fmean, quantiles

import altair as alt

from armor.report.charts import (
    DASHES,
    HEAT,
    PAPER,
    SERIES,
    WIDTH,
    Figure,
    Mark,
    columns_of,
    data,
    layer_ticks,
    listed,
    log_axis,
    names_axis,
    palette,
    round_numbers,
    series_places,
    svg_of,
)
from armor.report.numbers import number
from armor.report.results import ModelResults, Module, RecipeResults

__all__ = ["heat_map", "loss_by_layer", "output_error", "trace"]


def _by_layer(
    rows: Sequence[Mark], title: str, colors: dict[str, str], dashed: str, dashes: dict[str, list[int]]
) -> alt.Chart:
    """Lines of `rows` (recipe, layer, loss) over the layers, on a log scale; `dashed` is the field that dashes tell."""
    low, high = min(row.loss for row in rows) * 0.9, max(row.loss for row in rows) * 1.1
    last = max(row.layer for row in rows)
    legend = alt.Legend(title=None, columns=columns_of(colors), symbolStrokeWidth=2.5, symbolSize=260, labelLimit=130)
    axis = alt.Axis(grid=False, values=layer_ticks(last + 1), format="d")
    scale = alt.Scale(domain=[0, max(last, 1)], nice=False)
    return (
        alt.Chart(data(rows))
        .mark_line(strokeWidth=2)
        .encode(
            x=alt.X("layer:Q", title="decoder layer", scale=scale, axis=axis),
            y=alt.Y("loss:Q", **log_axis(low, high, title)),
            color=alt.Color("recipe:N", **palette(colors, legend=legend)),
            strokeDash=alt.StrokeDash(f"{dashed}:N", **palette(dashes, legend=legend)),
        )
        .properties(width=WIDTH + 40, height=180)
    )


def loss_by_layer(model: ModelResults, name: str) -> Figure | None:
    """The mean loss of each decoder layer, a line per recipe; None where no layer has a loss."""
    rows, means = [], []
    for recipe in model.compressed:
        layers: dict[int, list[float]] = {}
        for module in recipe.modules:
            layers.setdefault(module.layer, []).append(module.result.loss)
        points = [(layer, mean) for layer, losses in layers.items() if (mean := fmean(losses)) > 0]
        rows += [Mark(recipe=recipe.name, layer=layer, loss=loss) for layer, loss in points]
        if points:
            means.append((recipe.name, number(fmean(loss for _, loss in points), 3)))
    if not rows:
        return None
    places = {recipe: place for recipe, place in series_places(model.compressed).items() if recipe in dict(means)}
    colors = {recipe: SERIES[place] for recipe, place in places.items()}
    dashes = {recipe: DASHES[place] for recipe, place in places.items()}
    chart = _by_layer(rows, "relative loss, log scale", colors, "recipe", dashes)
    caption = (
        "The proxy loss of each decoder layer, the mean over its linears, relative to that of a zero matrix: 0 would "
        "be the dense weight, 1 no weight at all. A peak is a layer that this method finds hard."
    )
    alternative = f"Relative loss by decoder layer, log scale, a line per recipe; means: {listed(means)}."
    return Figure(name, "Loss by decoder layer", svg_of(chart, name, alternative), caption)


def output_error(model: ModelResults, name: str) -> Figure | None:
    """The held-out output error of each decoder layer before and after refine, two lines per recipe; None without."""
    rows, falls = [], []
    for recipe in model.compressed:
        stages = zip(recipe.pair.chain, recipe.stages, strict=False)  # of a base's refinement the base has the lines
        refined = [r for asked, (_, records) in stages if asked == ("refine", recipe.name) for r in records]
        own = [(record.layer, record.training[-1]) for record in refined if record.training]
        for layer, done in own:
            rows.append(Mark(recipe=recipe.name, when="before", layer=layer, loss=done.start_loss))
            rows.append(Mark(recipe=recipe.name, when="after", layer=layer, loss=done.loss))
        if shares := [done.loss / done.start_loss for _, done in own if done.start_loss]:
            falls.append((recipe.name, number(fmean(shares), 2)))
    rows = [row for row in rows if row.loss > 0]
    if not rows:
        return None
    colors = {r: SERIES[place] for r, place in series_places(model.compressed).items() if r in dict(falls)}
    chart = _by_layer(rows, "relative error, log scale", colors, "when", {"before": DASHES[1], "after": DASHES[0]})
    caption = (
        "What the output of each decoder layer misses on held-out sequences: of each token the square of the error by "
        "the square of the dense state, the mean over tokens. Dashed before the layer was refined, whole after."
    )
    alternative = f"Output error by decoder layer before and after refine; what is left in the mean: {listed(falls)}."
    return Figure(name, "Output error by decoder layer", svg_of(chart, name, alternative), caption)


def heat_map(recipe: RecipeResults, name: str) -> Figure | None:
    """The loss of every linear of one recipe by layer and module; None where no linear has one."""
    modules = [module for module in recipe.modules if module.result.loss > 0]
    if not modules:
        return None
    names = list(dict.fromkeys(module.kind for module in modules))
    short = {n: n.rpartition(".")[2] for n in names}
    labels = short if len(set(short.values())) == len(names) else {n: n for n in names}
    of_place: dict[tuple[int, str], list[float]] = {}
    for module in modules:
        of_place.setdefault((module.layer, module.kind), []).append(module.result.loss)
    places = {place: fmean(losses) for place, losses in of_place.items()}  # of experts the mean
    # A few classes with round borders can be told apart, and their legend can be read.
    losses = [*places.values()]
    steps = round_numbers(min(losses), max(losses), len(HEAT) - 1)
    borders = [f"{step:g}" for step in steps]
    classes = [f"{a} to {b}" for a, b in zip(borders, borders[1:], strict=False)]
    classes = [f"under {borders[0]}", *classes, f"over {borders[-1]}"] if borders else ["all alike"]
    colors = [HEAT[round(place * (len(HEAT) - 1) / max(1, len(steps)))] for place in range(len(classes))]
    rows = [
        Mark(layer=layer, module=labels[kind], loss=classes[bisect.bisect(steps, loss)])
        for (layer, kind), loss in places.items()
    ]
    count = max(layer for layer, _ in places) + 1
    axis = alt.Axis(values=layer_ticks(count), labelAngle=0, ticks=False, domain=False)
    symbols = {"symbolType": "square", "symbolStrokeWidth": 0, "symbolSize": 110}
    legend = alt.Legend(title="relative loss", columns=2, **symbols)
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
    best, worst = min(places, key=places.__getitem__), max(places, key=places.__getitem__)
    ends = [f"{number(places[place], 2)} (layer {place[0]}, {labels[place[1]]})" for place in (best, worst)]
    extremes = f"from {ends[0]} to {ends[1]}"
    caption = (
        f"Every linear of every decoder layer, {extremes}: the darker, the more was lost (the lighter on a dark page)."
    )
    if len(places) < len(modules):
        caption += " Of experts it is the mean."
    if len(places) < count * len(names):
        caption += " An empty place is a linear that stayed dense or has no result."
    alternative = f"Heat map of the relative loss of {recipe.name} by decoder layer and module, {extremes}."
    return Figure(name, f"Loss by layer and module: {recipe.name}", svg_of(chart, name, alternative), caption)


def _steps(recipe: str, modules: Sequence[Module]) -> list[Mark]:
    """About sixty iterations of a recipe's solver, the first and the last among them."""
    grid = sorted({point[0] for module in modules for point in module.result.trace})
    steps = []
    for iteration in dict.fromkeys(grid[:: max(1, len(grid) // 60)] + grid[-1:]):
        ratios = []
        for result in (module.result for module in modules):
            # The best loss so far is a staircase: its value is that of the last point up to here.
            place = bisect.bisect(result.trace, iteration, key=lambda point: point[0]) - 1
            ratios.append(result.trace[max(0, place)][2] / result.start_loss)
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        steps.append(Mark(recipe=recipe, iteration=iteration, low=low, ratio=middle, high=high))
    return steps


def trace(model: ModelResults, name: str) -> Figure | None:
    """The best loss so far over the iterations, a line per recipe; None where no solver left a trace of two linears."""
    rows, ends = [], []
    for recipe in model.compressed:
        modules = [m for m in recipe.modules if len(m.result.trace) > 1 and m.result.start_loss]
        if len(modules) > 1:
            rows += _steps(recipe.name, modules)
            ends.append((recipe.name, number(rows[-1].ratio, 2)))
    if not rows:
        return None
    places = series_places(model.compressed)
    colors = {recipe: SERIES[place] for recipe, place in places.items() if recipe in dict(ends)}
    legend = alt.Legend(title=None, columns=columns_of(colors), symbolOpacity=1) if len(colors) > 1 else None
    color = alt.Color("recipe:N", **palette(colors, legend=legend))
    down = log_axis(
        min(row.low for row in rows) * 0.9, max(1.0, *(row.high for row in rows)), "share of the start's loss"
    )
    base = alt.Chart(data(rows)).encode(
        x=alt.X("iteration:Q", title="iteration", axis=alt.Axis(grid=False, tickCount=5)), color=color
    )
    chart = alt.layer(
        base.mark_area(opacity=0.22).encode(y=alt.Y("low:Q", **down), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=alt.Y("ratio:Q", **down)),
    ).properties(width=WIDTH + 40, height=180)
    caption = (
        "How far the solver has come: the best loss so far of each linear as a share of that at its start, on a log "
        "scale. The line is the median over all linears, the band the middle half of them."
    )
    alternative = (
        f"Best loss as a share of the start's against iterations, median over linears; at the end: {listed(ends)}."
    )
    return Figure(name, "The solver at work", svg_of(chart, name, alternative), caption)
