"""How a chart of the report is drawn: its colours, axes and legends, and the way to an SVG that stands in the page.

Vega-Lite by altair, drawn by vl-convert. A chart is as wide as a phone, so that its text stays readable there, and
grows on a larger screen. Colours are CSS variables of the page with a light theme's value to fall back on: the same SVG
serves light, dark and print. As a file of its own (`alone`) it has the light colours, on white, whatever page shows it.
To a screen reader it is one image with a sentence in place of its marks. Which charts there are is the business of
figures.py; what is in them, of that, quality_figures.py, loss_figures.py and speed_figures.py.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import altair as alt
import vl_convert

from armor.report.results import RecipeResults

__all__ = [
    "ACCENT",
    "DASHES",
    "HEAT",
    "INK",
    "MUTED",
    "PAPER",
    "ROW",
    "SERIES",
    "STAGE_COLORS",
    "WIDTH",
    "Figure",
    "Mark",
    "alone",
    "beside",
    "columns_of",
    "data",
    "layer_ticks",
    "linear_axis",
    "listed",
    "log_axis",
    "names_axis",
    "palette",
    "round_numbers",
    "series_places",
    "svg_of",
]

WIDTH = 250  # of the plot itself, in CSS pixels; with axis and labels at most 360
ROW = 26
INK, MUTED, LINE, PAPER, ACCENT = (
    "var(--ink, #1c2128)",
    "var(--muted, #59636e)",
    "var(--line, #d8dee4)",
    "var(--paper, #ffffff)",
    "var(--accent, #0a66c2)",
)
# For recipes with blocks first, then the others: distinct in hue and in lightness, also to the colour-blind.
OTHERS = ("#b35900", "#1a7f5a", "#8250df", "#b3246b", "#6e7781")
SERIES = (ACCENT, *(f"var(--series-{i}, {color})" for i, color in enumerate(OTHERS, 1)))
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 1], [1, 3])
STAGE_HUES = ("#6e7781", "#0a66c2", "#b35900", "#b3246b", "#8250df", "#1a7f5a", "#d4a72c", "#0f7b8a")
STAGE_COLORS = tuple(f"var(--stage-{i}, {color})" for i, color in enumerate(STAGE_HUES))
HEAT_HUES = ("#d9e7f7", "#b7d2ef", "#8fb9e6", "#669cd8", "#3f7dc2", "#235b9e", "#123c70")
HEAT = tuple(f"var(--heat-{i}, {color})" for i, color in enumerate(HEAT_HUES))


def _configured(chart: alt.TopLevelMixin) -> alt.TopLevelMixin:
    font = "system-ui, sans-serif"
    return (
        chart.configure(background=PAPER, font=font, padding=6, aria=False)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=INK,
            titleColor=MUTED,
            gridColor=LINE,
            domainColor=LINE,
            tickColor=LINE,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            titlePadding=8,
        )
        .configure_legend(
            labelColor=INK,
            titleColor=MUTED,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            orient="top",
            rowPadding=5,
            columnPadding=16,
        )
    )


def svg_of(chart: alt.TopLevelMixin, name: str, alternative: str) -> str:
    """The chart as an SVG element that fills its container, its ids its own, with a text alternative."""
    svg = vl_convert.vegalite_to_svg(_configured(chart).to_json(), vl_version=alt.SCHEMA_VERSION.rpartition(".")[0])
    # vl-convert numbers its ids through the life of the process.
    for place, found in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]+)"', svg))):
        svg = svg.replace(f'id="{found}"', f'id="{name}-{place}"').replace(f"url(#{found})", f"url(#{name}-{place})")
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"\d*\.\d{3,}(?![\de])", _hundredths, tag[0]), svg)
    svg = re.sub(r' (?:role|aria-[a-z]+)="[^"]*"', "", svg)  # of single marks, unnamed: the whole is one image
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    label = html.escape(alternative, quote=True)
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    opening += f' viewBox="0 0 {width} {height}" role="img" aria-label="{label}"'
    return re.sub(r"<svg[^>]*>", f'{opening} style="max-width:{1.35 * float(width):.0f}px">', svg, count=1)


def alone(svg: str) -> str:
    """What `svg_of` made, as a file for any program: not all know CSS variables."""
    return re.sub(r"var\(--[\w-]+, (#\w+)\)", r"\1", svg)


def _hundredths(match: re.Match[str]) -> str:
    """Hundredths of a pixel will do."""
    return f"{float(match[0]):.2f}"


def data(marks: Iterable[Mark]) -> alt.Data:
    return alt.Data(values=[vars(mark) for mark in marks])


def names_axis(field: str, order: list[str]) -> alt.Y:
    """The vertical axis of a figure with a row per name; room for the names is reserved, whatever font draws them."""
    room = min(7.4 * max(map(len, order)), 110) + 6
    axis = alt.Axis(title=None, ticks=False, domain=False, grid=False, labelLimit=110, labelPadding=6, minExtent=room)
    return alt.Y(field, sort=order, axis=axis, scale=alt.Scale(domain=order))


def log_axis(low: float, high: float, title: str | None = None) -> dict[str, Any]:
    """Scale and axis from `low` to `high` on a log scale, labelled at a few round numbers."""
    apart = {"labelOverlap": "greedy", "labelSeparation": 5}
    axis = alt.Axis(values=round_numbers(low, high, 6), format=",.0f" if low >= 1 else "~g", **apart)
    return {"scale": alt.Scale(type="log", domain=[low, high], nice=False), "axis": axis, "title": title}


def linear_axis(low: float, high: float, title: str, **kwargs: Any) -> dict[str, Any]:
    """Scale and axis from `low` to `high`, and a little more, on a linear scale; kwargs are the axis's."""
    margin = 0.04 * (high - low) or 0.04 * abs(high) or 0.04
    scale = alt.Scale(domain=[low - margin, high + margin], nice=False, zero=False)
    axis = alt.Axis(tickCount=4, labelOverlap="greedy", labelSeparation=5, **kwargs)
    return {"scale": scale, "axis": axis, "title": title}


def palette(values: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
    """Colours by name, with a legend unless legend=None is given."""
    return {"scale": alt.Scale(domain=list(values), range=list(values.values())), **kwargs}


def series_places(recipes: Iterable[RecipeResults]) -> dict[str, int]:
    """Recipes to places in SERIES and DASHES, those with blocks first; beyond their length they come round again."""
    ordered = sorted(recipes, key=lambda recipe: not recipe.has_blocks)
    return {recipe.name: index % len(SERIES) for index, recipe in enumerate(ordered)}


def columns_of(entries: Collection) -> int:
    """Columns of a legend: four entries look better in two rows of two than as three and one."""
    return 2 if len(entries) in (2, 4) else 3


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """At most so many round numbers from `low` to `high`, about evenly spread on a log scale."""
    halves = tuple(half / 2 for half in range(2, 20))
    for steps in (halves, (1, 1.5, 2, 3, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [float(f"{step}e{power}") for power in range(-12, 16) for step in steps]
        found = [value for value in found if low <= value <= high]
        if len(found) <= most:
            return found
    return found[-most:]


def layer_ticks(layers: int) -> list[int]:
    """At most eight numbers of decoder layers."""
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if layers / step <= 8)
    return list(range(0, layers, every))


def beside(places: list[tuple[float, float, str]], width: float) -> list[tuple[bool, float]]:
    """For points (x, y, text) in pixels: whether the text stands to the left, and the height to write it at.

    That is a little above the point, for the front's line may go to its right. A text that would cover another one or a
    point moves up until it does not, the lowest point's first. The best recipes are low and close together, and above
    the worst there is room. A line will lead to one that moved.
    """
    taken = [(x - 5, x + 5, y) for x, y, _ in places]
    found = {}
    for place in sorted(set(places), key=lambda place: (-place[1], place[0], place[2])):
        x, y, text = place
        length, left, y = 7 * len(text), x > width / 2, y - 8
        start = x - 8 - length if left else x + 8
        while blocked := [t for t in taken if t[0] < start + length and start < t[1] and abs(t[2] - y) < 12]:
            y = min(t[2] for t in blocked) - 13
        taken.append((start, start + length, y))
        found[place] = (left, y)
    return [found[place] for place in places]


class Mark(SimpleNamespace):
    """One row of a chart's data: what the chart's axes, colours and texts read by name."""


@dataclass(frozen=True)
class Figure:
    """An SVG for the page, its heading, and a caption that says what one sees."""

    name: str
    title: str
    svg: str
    caption: str


def listed(pairs: list[tuple[str, str]]) -> str:
    """Names and their values in a row, for a text alternative."""
    return ", ".join(f"{name} {value}" for name, value in pairs)
