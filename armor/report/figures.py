"""Which charts the report shows, in their order, and how those of size and time are made.

Charts get exactly the values that exist: a gap in the results is a gap in the figure. The numbers themselves are in the
tables. How a chart looks is said in charts.py.
"""

from __future__ import annotations

import altair as alt

from armor.report.charts import (
    ACCENT,
    INK,
    MUTED,
    PAPER,
    ROW,
    SERIES,
    STAGE_COLORS,
    WIDTH,
    Figure,
    Mark,
    data,
    listed,
    names_axis,
    palette,
    svg_of,
)
from armor.report.loss_figures import heat_map, loss_by_layer, output_error, trace
from armor.report.numbers import duration, size
from armor.report.quality_figures import accuracy, block_sizes, perplexity
from armor.report.results import STAGES, ModelResults
from armor.report.speed_figures import decoding, linears, throughput

__all__ = ["figures"]


def _size(model: ModelResults, name: str) -> Figure | None:
    rows = []
    dense = model.dense and model.dense.checkpoint_bytes
    for recipe in model.recipes:
        if (count := recipe.checkpoint_bytes) is not None:
            share = f" ({count / dense:.0%})" if dense and not recipe.dense else ""
            rows.append(Mark(recipe=recipe.name, kind=recipe.kind, bytes=count, label=size(count) + share))
    if not rows:
        return None
    largest = max(row.bytes for row in rows)
    base = alt.Chart(data(rows)).encode(
        y=names_axis("recipe:N", [row.recipe for row in rows]),
        x=alt.X("bytes:Q", scale=alt.Scale(domain=[0, largest * 1.02], nice=False), axis=None),
    )
    wide = alt.datum.bytes > largest * 0.55  # such a bar has its label inside
    inside = {"align": "right", "dx": -6, "color": PAPER, "fontWeight": "bold"}
    color = alt.Color("kind:N", **palette({"dense": MUTED, "blocks": ACCENT, "pruned": SERIES[-1]}, legend=None))
    chart = alt.layer(
        base.mark_bar(height=18, cornerRadiusEnd=2).encode(color=color),
        base.transform_filter(wide).mark_text(fontSize=12, **inside).encode(text="label:N"),
        base.transform_filter(~wide).mark_text(fontSize=12, align="left", dx=6, color=INK).encode(text="label:N"),
    ).properties(width=WIDTH, height=alt.Step(ROW))
    caption = (
        "All files of each checkpoint, and their share of the dense model's. Embeddings and norms are not compressed."
    )
    alternative = f"Size of the checkpoints: {listed([(row.recipe, row.label) for row in rows])}."
    return Figure(name, "Size on disk", svg_of(chart, name, alternative), caption)


def _time(model: ModelResults, name: str) -> Figure | None:
    rows, totals = [], []
    for who, stages in model.work().items():
        known = {stage: sum(record.seconds for record in records) for stage, records in stages.items() if records}
        rows += [Mark(recipe=who, stage=s, place=STAGES.index(s), seconds=seconds) for s, seconds in known.items()]
        if known:
            totals.append(Mark(recipe=who, seconds=sum(known.values()), label=duration(sum(known.values()))))
    if not rows:
        return None
    down = names_axis("recipe:N", [row.recipe for row in totals])
    scale = alt.Scale(domain=[0, max(row.seconds for row in totals) * 1.28], nice=False)
    present = [stage for stage in STAGES if any(row.stage == stage for row in rows)]
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
        "A calibration serves every recipe that uses it, a benchmark times all recipes in turn."
    )
    if model.task_names():
        caption += " Tasks are part of evaluate."
    alternative = f"Time by stage; in all: {listed([(row.recipe, row.label) for row in totals])}."
    return Figure(name, "Time by stage", svg_of(chart, name, alternative), caption)


def figures(model: ModelResults, prefix: str) -> list[Figure]:
    """The figures of one model that its results allow, with names that begin with `prefix`."""
    drawn = [perplexity(model, e, f"{prefix}-perplexity-{i}") for i, e in enumerate(model.evaluation_names())]
    drawn += [block_sizes(model, f"{prefix}-blocks")]
    drawn += [accuracy(model, task, f"{prefix}-task-{i}") for i, task in enumerate(model.task_names())]
    for index, benchmark in enumerate(model.benchmark_names()):
        drawn.append(decoding(model, benchmark, f"{prefix}-decoding-{index}"))
        drawn.append(linears(model, benchmark, f"{prefix}-linears-{index}"))
    drawn += [throughput(model, name, f"{prefix}-throughput-{i}") for i, name in enumerate(model.serving_names())]
    drawn += [loss_by_layer(model, f"{prefix}-layers"), output_error(model, f"{prefix}-refined")]
    with_blocks = [recipe for recipe in model.compressed if recipe.has_blocks]
    drawn += [heat_map(recipe, f"{prefix}-heat-{i}") for i, recipe in enumerate(with_blocks)]
    drawn += [trace(model, f"{prefix}-trace"), _size(model, f"{prefix}-size"), _time(model, f"{prefix}-time")]
    return [figure for figure in drawn if figure]
