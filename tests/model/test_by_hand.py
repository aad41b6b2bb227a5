"""Linears whose weight another module takes stay dense, so that what is assembled runs."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import armor.hf  # noqa: F401
from armor.core.errors import ArmorError
from armor.model.by_hand import by_hand
from tests.packed import opened, packed
from tests.tiny import MAMBA2


def test_a_mamba_2_model_goes_through_and_runs_with_one_line_on_what_stays_dense(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "armor"):
        root = packed(tmp_path, "mamba2", **MAMBA2)
    told = [line for line in caplog.messages if "stay dense, for another module" in line]
    assert len(told) == 1 and "2 linears" in told[0] and told[0].endswith(": backbone.layers.*.mixer.out_proj")
    names = [linear.name for linear in opened(root)[1].linears()]
    assert names == ["backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.in_proj"]
    model = AutoModelForCausalLM.from_pretrained(root / "checkpoint")
    dense = AutoModelForCausalLM.from_pretrained(root / "checkpoint").dequantize()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits)


class Mixer(nn.Module):
    """One linear is called, one is multiplied with by hand, one only tells where it is."""

    def __init__(self):
        super().__init__()
        self.called, self.taken, self.asked = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return F.linear(self.called(x).to(self.asked.weight.dtype), getattr(self, "taken").weight)  # noqa: B009


def test_what_the_source_hides_is_found_by_running():
    layer = Mixer().to("meta")
    assert by_hand(layer, lambda layer: layer(torch.empty(2, 4, device="meta"))) == (["taken"], ["asked"])
    assert isinstance(layer.taken, nn.Linear) and isinstance(layer.taken.weight, nn.Parameter)


class Picky(nn.Module):
    """It runs, but asks more of its linear than that it can be called."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        if type(self.inner) is not nn.Linear:
            raise TypeError("a linear is expected")
        return self.inner(x) + x


def test_a_layer_that_fails_on_linears_without_a_weight_is_refused():
    empty = torch.empty(2, 4, device="meta")
    with pytest.raises(ArmorError, match="Picky: runs, but not .* .TypeError: a linear is expected., so a compressed"):
        by_hand(Picky().to("meta"), lambda layer: layer(empty))
