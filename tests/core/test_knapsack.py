"""The choice is the best that there is, and that of a thousand classes takes little memory."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from armor.core.knapsack import cheapest

costs = st.integers(0, 30) | st.sampled_from([0.0, 2.0**-30])
classes = st.lists(st.tuples(st.integers(0, 30), costs), min_size=1, max_size=4)


def sums(options, picks):
    chosen = [own[pick] for own, pick in zip(options, picks, strict=True)]
    return sum(cost for _, cost in chosen), sum(size for size, _ in chosen)


@given(st.lists(classes, min_size=1, max_size=5), st.integers(0, 100))
@example([[(27, 0), (2, 0)]], 3)
@example([[(16 * 768, 0.0), (9 * 768, 0.0)]] * 3, 100)
@settings(deadline=None, max_examples=100)
def test_the_choice_is_the_best_of_all_that_there_are(options, more):
    limit = sum(min(size for size, _ in own) for own in options) + more
    every = (sums(options, picks) for picks in itertools.product(*(range(len(own)) for own in options)))
    assert sums(options, cheapest(options, limit)) == min(found for found in every if found[1] <= limit)


def linears(number):
    """(Bits, cost) of linears of a mixture: pruned, with blocks of four sizes, dense."""
    draw = np.random.default_rng(0)
    shapes = [(768, 2048), (512, 2048), (4096, 2048)]
    for index in range(number):
        rows, columns = shapes[index % len(shapes)]
        cost = draw.lognormal()
        left = sorted(draw.uniform(0, 0.5, 4), reverse=True)
        blocks = [
            (rows * columns * 9 + 16 * d * (rows + columns), cost * part)
            for d, part in zip((16, 32, 64, 128), left, strict=True)
        ]
        yield [(9 * rows * columns, cost), *blocks, (16 * rows * columns, 0.0)]


def test_a_thousand_linears_take_little_memory():
    options = list(linears(1000))  # 0.7 GB where nothing bounds what a way may cost
    limit = int(11.94 * sum(dense // 16 for *_, (dense, _) in options))
    tracemalloc.start()
    cost, size = sums(options, cheapest(options, limit))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 <= limit - size < 1e-4 * limit and peak < 10e6
