"""Layers over several devices: in order, the fullest as empty as can be, and the states handed on."""

from __future__ import annotations

from itertools import combinations_with_replacement

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from armor.training.spread import hand_on, leased, spread


def fullest(sizes, places, count, first):
    held = [first] + [0] * (count - 1)
    for place, size in zip(places, sizes, strict=True):
        held[place] += size
    return max(held)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3), st.integers(0, 60))
def test_no_other_way_leaves_the_fullest_emptier(sizes, count, first):
    places = spread(sizes, count, first)
    assert places == sorted(places)
    best = min(fullest(sizes, other, count, first) for other in combinations_with_replacement(range(count), len(sizes)))
    assert fullest(sizes, places, count, first) == best


def test_a_model_of_70b_fits_on_eight_cards():
    places = spread([7_000_000_000] * 80, 8, 8_000_000_000)
    assert places.count(0) == 9 and max(places.count(device) for device in range(8)) == 11


def test_the_host_is_one_device():
    assert leased("cpu") == ["cpu"]


class Adds(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, hidden, bias):
        self.seen.append((hidden.device.type, bias[0].device.type))
        return hidden + bias[0]


def test_each_layer_fetches_what_it_is_called_with_and_the_last_returns_its_output():
    """The meta device stands for another card: it has no numbers, but tensors must be there to be added."""
    layers = [Adds(), Adds(), Adds()]
    hand_on(layers, ["cpu", "meta", "meta"], "meta")
    hidden, bias = torch.ones(2), (torch.ones(2),)
    for layer in layers:
        hidden = layer(hidden, bias=bias)
    assert [layer.seen for layer in layers] == [[("cpu", "cpu")], [("meta", "meta")], [("meta", "meta")]]
    assert hidden.device.type == "meta"
