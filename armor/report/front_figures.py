"""The figures of what one could take instead: a loss over a cost, all recipes, the front drawn.

Ours are diamonds in the accent's colour, the others are circles. What is dominated is pale and hollow. A recipe far
worse than all of the front would press the others into a line. It is named in the caption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from armor.report.charts import (
    ACCENT,
    INK,
    MUTED,
    PAPER,
    WIDTH,
    Figure,
    Mark,
    beside,
    data,
    listed,
    log_axis,
    svg_of,
)
from armor.report.front import BITS, KL, PERPLEXITY, SPEED, Axis, Offer, front
from armor.report.numbers import number

__all__ = ["panels"]

SIZE = (WIDTH + 40, 220)
FAR = 4
"""A recipe is left out that has more than so many times the perplexity of the worst on the front."""


def panels(offered: Sequence[Offer], prefix: str) -> list[Figure]:
    """Perplexity and KL over bits and over speed, as far as two offers have both; names begin with `prefix`."""
    axes = {"bits": (BITS, PERPLEXITY), "speed": (SPEED, PERPLEXITY), "kl-bits": (BITS, KL), "kl-speed": (SPEED, KL)}
    drawn = [_panel(offered, cost, loss, f"{prefix}-{name}") for name, (cost, loss) in axes.items()]
    return [figure for figure in drawn if figure]


@dataclass(frozen=True)
class _Losses:
    """A vertical axis from `start` at the bottom to `end`: of losses, or of their logarithms if far apart."""

    title: str
    start: float
    end: float
    logarithmic: bool

    @classmethod
    def of(cls, title: str, values: Sequence[float]) -> _Losses:
        logarithmic = 0 < 3 * min(values) < max(values)
        start, end = (math.log(value) if logarithmic else value for value in (min(values), max(values)))
        length = end - start or 1
        return cls(title, start - 0.1 * length, end + 0.06 * length, logarithmic)

    @property
    def axis(self) -> dict[str, Any]:
        if self.logarithmic:
            return log_axis(math.exp(self.start), math.exp(self.end), f"{self.title}, log scale (lower is better)")
        scale = alt.Scale(domain=[self.start, self.end], nice=False, zero=False)
        return {"scale": scale, "axis": alt.Axis(tickCount=5), "title": f"{self.title} (lower is better)"}

    def depth(self, value: float) -> float:
        """How far below the top a value is, as a share of the height."""
        return (self.end - (math.log(value) if self.logarithmic else value)) / (self.end - self.start)

    def at(self, depth: float) -> float:
        """The value there."""
        place = self.end - depth * (self.end - self.start)
        return math.exp(place) if self.logarithmic else place


def _panel(offered: Sequence[Offer], cost: Axis, loss: Axis, name: str) -> Figure | None:
    best = front(offered, cost, loss)
    known = [
        Mark(recipe=offer.name, cost=x, loss=y, ours=offer.kind == "blocks", front=offer in best)
        for offer in offered
        if (x := cost.of(offer)) is not None and (y := loss.of(offer)) is not None
    ]
    if len(known) < 2:
        return None
    worst = FAR * max(point.loss for point in known if point.front) if loss is PERPLEXITY else math.inf
    points, far = ([p for p in known if (p.loss > worst) is beyond] for beyond in (False, True))
    down = _Losses.of(loss.title, [point.loss for point in points])
    costs = [point.cost for point in points]
    margin = 0.08 * (max(costs) - min(costs)) or 0.25
    ends = (min(costs) - margin, max(costs) + margin)
    title = f"{cost.title} ({'higher' if cost.higher_is_better else 'lower'} is better)"
    scale = alt.Scale(domain=list(ends), nice=False, zero=False)
    x = alt.X("cost:Q", scale=scale, axis=alt.Axis(grid=False, tickCount=5), title=title)
    y = alt.Y("loss:Q", **down.axis)
    line = alt.Chart(data([p for p in points if p.front])).encode(x=x, y=y)
    step = "step-before" if cost.higher_is_better else "step-after"  # a corner is as bad as its two ends, never better
    layers: list[alt.Chart] = [line.mark_line(color=MUTED, strokeWidth=1.5, interpolate=step)]
    layers += _texts(points, ends, down, x)
    layers += _dots(points, x, y)
    chart = alt.layer(*layers).properties(width=SIZE[0], height=SIZE[1])
    title = f"{loss.title[0].upper()}{loss.title[1:]} over {'speed' if cost is SPEED else 'bits'}"
    return Figure(name, title, svg_of(chart, name, _alternative(known, title)), _caption(best, far))


def _dots(points: list[Mark], x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """A mark for each point, by whose it is and whether it is on the front."""
    layers = []
    for ours in (False, True):
        color, shape = (ACCENT, "diamond") if ours else (INK, "circle")
        for on_front in (False, True):
            own = [point for point in points if point.ours is ours and point.front is on_front]
            look: dict[str, Any] = {"filled": True, "shape": shape, "size": 110 if ours else 70}
            paper = {"fill": PAPER, "stroke": color, "strokeWidth": 1.5, "opacity": 0.5}
            look |= {"fill": color, "opacity": 1} if on_front else paper
            layers += [alt.Chart(data(own)).encode(x=x, y=y).mark_point(**look)] if own else []
    return layers


def _texts(points: list[Mark], ends: tuple[float, float], down: _Losses, x: alt.X) -> list[alt.Chart]:
    """The names beside the points, with a line to those that had to move; `ends` are those of the horizontal axis."""
    (least, most), (width, height) = ends, SIZE
    places = [((p.cost - least) / (most - least) * width, down.depth(p.loss) * height, p.recipe) for p in points]
    layers: list[alt.Chart] = []
    groups: dict[tuple[bool, bool], list[Mark]] = {}
    moved = []
    for point, (_, place, _), (left, at) in zip(points, places, beside(places, width), strict=True):
        near = point.cost + (-7 if left else 7) / width * (most - least)
        text = Mark(**vars(point), at=down.at(at / height), near=near)
        groups.setdefault((left, point.front), []).append(text)
        moved += [text] if place - at > 14 else []
    if moved:
        rule = alt.Chart(data(moved)).mark_rule(color=MUTED, strokeWidth=0.8)
        layers.append(rule.encode(x=x, y=alt.Y("loss:Q", **down.axis), x2="near:Q", y2="at:Q"))
    for (left, on_front), own in groups.items():
        written = alt.Chart(data(own)).encode(x=x, y=alt.Y("at:Q", **down.axis), text="recipe:N")
        look: dict[str, Any] = {"fontSize": 12, "align": "right" if left else "left", "dx": -8 if left else 8}
        layers.append(written.mark_text(stroke=PAPER, strokeWidth=3, color=PAPER, **look))  # no line crosses a name
        layers.append(written.mark_text(color=INK if on_front else MUTED, **look))
    return layers


def _caption(best: list[Offer], far: list[Mark]) -> str:
    """What is on the front, and what is not drawn."""
    text = f"On the front: {', '.join(offer.name for offer in best)}."
    if far:
        text += f" Far above, and not drawn: {listed([(point.recipe, number(point.loss)) for point in far])}."
    return text


def _alternative(points: list[Mark], title: str) -> str:
    told = listed([(p.recipe, f"{number(p.loss)} at {number(p.cost)}") for p in points])
    return f"{title}: {told}."
