"""What one could take instead: what each recipe costs and loses, which ones no other beats, and that in words.

A recipe costs bits, and time. It loses perplexity, and agreement with the dense model. One that another equals in both
and beats in one is dominated: nobody need take it. The rest are the front. The words name the best recipe at some
numbers of bits, whoever's it is. A recipe whose integers became floats before each product has no place on the front of
speed, for its time says nothing of what a kernel for them would reach.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from armor.report.numbers import GAP, number
from armor.report.results import ModelResults, RecipeResults
from armor.report.table import Table

__all__ = [
    "BITS",
    "KL",
    "PERPLEXITY",
    "SPEED",
    "Axis",
    "Offer",
    "offers",
    "front",
    "in_words",
    "source_file",
    "table",
]

LIMITS = (5, 7, 9, 12)
"""Bits per weight at which the words name the best recipe."""


@dataclass(frozen=True)
class Offer:
    """A recipe that one could take.

    `speed` is how many times as fast as the dense model it decodes one sequence, None where that was not measured.
    `kind` is as in RecipeResults. `expanded` says that its integers became floats before each product.
    """

    name: str
    method: str
    kind: str
    bits: float
    perplexity: float
    kl: float | None = None
    speed: float | None = None
    expanded: bool = False


@dataclass(frozen=True)
class Axis:
    """A cost or a loss: what it is called, where an offer has it, and whether more of it is better."""

    title: str
    of: Callable[[Offer], float | None]
    higher_is_better: bool = False


BITS = Axis("bits per weight", lambda offer: offer.bits)
SPEED = Axis("times as fast as dense", lambda offer: None if offer.expanded else offer.speed, higher_is_better=True)
PERPLEXITY = Axis("perplexity", lambda offer: offer.perplexity)
KL = Axis("KL in nats", lambda offer: offer.kl)


def offers(model: ModelResults) -> list[Offer]:
    """The recipes of which bits and perplexity are known, by rising bits."""
    timed = any(_speed(recipe) for recipe in model.compressed)
    found = [
        Offer(
            name=recipe.name,
            method=recipe.pair.title,
            kind=recipe.kind,
            bits=recipe.bits_per_weight,
            perplexity=recipe.evaluation.value,
            kl=recipe.kl.value if recipe.kl else None,
            speed=1.0 if recipe.dense and timed else _speed(recipe),
            expanded=recipe.benchmark is not None and recipe.benchmark.expanded,
        )
        for recipe in model.recipes
        if recipe.evaluation and recipe.bits_per_weight is not None
    ]
    return sorted(found, key=lambda offer: (offer.bits, offer.perplexity, offer.name))


def source_file(model: ModelResults) -> str:
    """The name of the file that the dense model was converted from, the first of several; empty where it was none."""
    settings = next((recipe.source.settings for recipe in model.recipes if recipe.source), {})
    found = settings.get("file") or settings.get("gguf") or ""
    return (found if isinstance(found, str) else found[0]).rpartition("/")[2]


def _speed(recipe: RecipeResults) -> float | None:
    """The median over the rounds of the first benchmark."""
    speedup = recipe.benchmark.speedup if recipe.benchmark else None
    return speedup["1"].decode.median if speedup and "1" in speedup else None


def front(offered: Sequence[Offer], cost: Axis, loss: Axis) -> list[Offer]:
    """Those that no other offer equals in cost and loss and beats in one of them, from the best cost to the worst.

    Offers alike in both are all there. One that lacks cost or loss is not.
    """
    points = [(_signed(cost, c), _signed(loss, c), c) for c in offered]
    known = sorted(((x, y, c) for x, y, c in points if x is not None and y is not None), key=lambda p: p[:2])
    places = [(x, y) for x, y, _ in known]
    return [c for x, y, c in known if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in places)]


def _signed(axis: Axis, offer: Offer) -> float | None:
    """What an offer has of an axis, so that less is better."""
    value = axis.of(offer)
    return -value if value is not None and axis.higher_is_better else value


def in_words(offered: Sequence[Offer], source: str = "") -> list[str]:
    """Sentences: the best offer at each of LIMITS and its speed, the front of speed, what favours whom.

    Ours is named too where it is not the best. `source` is the name of the file that the dense model comes from.
    """
    dense = next((offer for offer in offered if offer.kind == "dense"), None)
    told = [
        _at_most(_either(map(str, limits)), *found, offered, dense)
        for found, limits in groupby(LIMITS, lambda limit: _best_two(offered, limit))
    ]
    return [*told, *filter(None, (_of_speed(offered), _of_source(source)))]


def _best_two(offered: Sequence[Offer], limit: float) -> tuple[Offer | None, Offer | None]:
    """The lowest perplexity within so many bits, and the lowest of ours; of equals the smaller, then the faster."""

    def best(among: list[Offer]) -> Offer | None:
        return min(among, key=lambda c: (c.perplexity, c.bits, -(SPEED.of(c) or 0)), default=None)

    within = [offer for offer in offered if offer.bits <= limit]
    return best(within), best([offer for offer in within if offer.kind == "blocks"])


def _at_most(limits: str, best: Offer | None, own: Offer | None, offered: Sequence[Offer], dense: Offer | None) -> str:
    if best is None:
        return f"No recipe takes at most {limits} bits a weight."
    text = f"At most {limits} bits a weight: {best.name} is the best, {_measured(best, dense)}."
    ours = list(dict.fromkeys(offer.method for offer in offered if offer.kind == "blocks"))
    if ours and own is None:
        text += f" No recipe of {_either(ours)} is that small."
    elif own is not None and own is not best:
        text += f" The best of {own.method} is {own.name}, {_measured(own, dense)}."
    return text


def _either(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _measured(offer: Offer, dense: Offer | None) -> str:
    text = f"with a perplexity of {number(offer.perplexity)}"
    if dense and offer is not dense:
        text += f" ({number(offer.perplexity / dense.perplexity, 3)} times the dense model's)"
    text += f" at {offer.bits:.2f} bits"
    speed = SPEED.of(offer)
    return text if speed is None else f"{text}, {number(speed, 2)} times as fast as dense"


def _of_speed(offered: Sequence[Offer]) -> str:
    """The front of speed, from the best perplexity to the fastest, and what has no place there."""
    best = front(offered, SPEED, PERPLEXITY)[::-1]
    if not best:
        return "No speed was measured."
    text = f"By speed nothing beats {best[0].name}"
    if len(best) > 1:
        told = [f"{c.name} ({number(c.speed, 2)} times as fast as dense, {number(c.perplexity)})" for c in best]
        text = f"By speed, each of these is faster than the one before and loses more: {', '.join(told)}"
    if expanded := [offer.name for offer in offered if offer.expanded]:
        text += (
            f". Not compared: {', '.join(expanded)}. No kernel multiplied with their numbers as stored, so their "
            "speed here says nothing of what other programs reach"
        )
    return text + "."


def _of_source(file: str) -> str:
    """What is to be said of weights from a GGUF file of few bits, which its name tells."""
    found = re.search(r"[-._]I?Q([1-8])_", file, re.IGNORECASE)
    if found is None:
        return ""
    return (
        f"The dense weights come from a {found[1]}-bit file ({file}) and lie near its grid. So what keeps every weight "
        "in few bits looks better here than on weights that were never quantized."
    )


def table(offered: Sequence[Offer]) -> Table:
    """A row for each offer, by bits; what is on a front stands out."""
    dense = next((offer for offer in offered if offer.kind == "dense"), None)
    fronts = {"bits": front(offered, BITS, PERPLEXITY), "speed": front(offered, SPEED, PERPLEXITY)}
    cells, best = {}, set()
    for offer in offered:
        on = " and ".join(name for name, members in fronts.items() if offer in members)
        speed = GAP if offer.speed is None else f"{number(offer.speed, 3)} ×"
        cells[offer.name] = {
            "Method": offer.method,
            "Bits/weight": f"{offer.bits:.2f}",
            "Perplexity": number(offer.perplexity),
            "Beside dense": f"{number(offer.perplexity / dense.perplexity, 4)} ×" if dense else GAP,
            "KL": number(offer.kl, 3),
            "Speed": f"({speed})" if offer.expanded and offer.speed is not None else speed,
            "On the front of": on or GAP,
        }
        best |= {(offer.name, "On the front of")} if on else set()
    return Table(cells, best)
