"""The knapsack with classes: one of several choices in each, so that costs add up to the least within a limit.

It is solved exactly. At some price of size, a Lagrange multiplier, the cheapest choices of all classes just meet the
limit. That gives a lower bound of the cost. The excess of a choice is what it costs, price included, above the cheapest
of its class. The excesses of the best way add up to no more than the gap between its cost and the bound (Dyer, Riha and
Walker 1995). The gap is not known: a small one is tried, and then larger ones, until the best way within it has no
larger one itself. To find that way, of all ways to choose in the first k classes only those are kept that no other one
beats in both size and cost (Nemhauser and Ullmann 1969).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["cheapest"]


def cheapest(options: Sequence[Sequence[tuple[int, float]]], limit: int) -> list[int]:
    """Which (size, cost) to take of each class of `options`: the least sum of costs within `limit`, exactly.

    Of several the one with the least size. The limit must be possible.
    """
    most = max(map(len, options))
    padded = [[*own, *[own[-1]] * (most - len(own))] for own in options]  # of the same choice the first is taken
    sizes = np.array([[size for size, _ in own] for own in padded])  # (classes, choices)
    costs = np.array([[cost for _, cost in own] for own in padded], np.float64)
    price = _price(sizes, costs, limit)
    excess = costs + price * sizes
    least = excess.min(1, keepdims=True)
    bound, excess = least.sum() - price * limit, excess - least
    rounding = 1e-9 * np.abs(least).sum()
    known = price * (limit - _taken(sizes, excess.argmin(1)).sum())  # the gap of what is cheapest everywhere
    gap = known / 1024
    picks = _within(gap + rounding, sizes, costs, excess, limit)
    while gap < known and _taken(costs, picks).sum() - bound > gap:
        gap = 4 * gap or known
        picks = _within(gap + rounding, sizes, costs, excess, limit)
    return picks.tolist()


def _price(sizes: np.ndarray, costs: np.ndarray, limit: int) -> float:
    """The least price of size at which what is cheapest in each class is within the limit."""

    def over(price: float) -> bool:
        return _taken(sizes, (costs + price * sizes).argmin(1)).sum() > limit

    low, high = 0.0, 1 + np.ptp(costs)  # here the smallest are the cheapest
    if not over(low):
        return low
    while low < (price := (low + high) / 2) < high:
        low, high = (price, high) if over(price) else (low, price)
    return high


def _taken(of: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """What is picked in each class, of (classes, choices)."""
    return np.take_along_axis(of, picks[:, None], 1)[:, 0]


def _within(gap: float, sizes: np.ndarray, costs: np.ndarray, excess: np.ndarray, limit: int) -> np.ndarray:
    """The best way of those whose excess adds up to no more than `gap`: its pick in each class."""
    picks = excess.argmin(1)
    free = np.flatnonzero((excess <= gap).sum(1) > 1)
    size = np.array([np.delete(_taken(sizes, picks), free).sum()])
    room = limit - np.append(sizes[free].min(1)[::-1].cumsum()[::-1], 0)[1:]  # what later classes leave
    cost, above, steps = np.zeros(1), np.zeros(1), []
    for k, room_left in zip(free, room, strict=True):
        size, cost, above = (  # (ways, choices)
            (before[:, None] + own[k]).ravel() for before, own in ((size, sizes), (cost, costs), (above, excess))
        )
        kept = np.flatnonzero((above <= gap) & (size <= room_left))
        kept = kept[np.lexsort((cost[kept], size[kept]))]
        best = np.minimum.accumulate(cost[kept])
        kept = kept[np.append(True, cost[kept][1:] < best[:-1])]
        size, cost, above = size[kept], cost[kept], above[kept]
        steps.append(kept)
    way = len(size) - 1
    for k, kept in zip(free[::-1], reversed(steps), strict=True):
        way, picks[k] = divmod(kept[way], sizes.shape[1])
    return picks
