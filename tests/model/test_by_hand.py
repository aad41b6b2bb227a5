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
from armor.model.by_hand import BY_HAND, by_hand, left_dense
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


@pytest.mark.parametrize("times", ["@", "F.linear", "dim"])
def test_what_the_source_hides_is_found_by_running(times):
    ways = {
        "@": lambda self, x: self.called(x) @ getattr(self, "taken").weight,  # noqa: B009
        "F.linear": Mixer.forward,
        "dim": lambda self, x: self.called(x) * getattr(self, "taken").weight.dim(),  # noqa: B009
    }
    layer = type("Made", (Mixer,), {"forward": ways[times]})().to("meta")
    assert by_hand(layer, lambda layer: layer(torch.empty(2, 4, device="meta"))) == (["taken"], ["asked"])
    assert isinstance(layer.taken, nn.Linear) and isinstance(layer.taken.weight, nn.Parameter)


class Own(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Wanting(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(self.low)


def test_a_class_of_its_own_is_a_linear_where_it_computes_what_a_linear_does():
    layer = nn.ModuleDict({kind.__name__: kind(4, 4) for kind in (nn.Linear, Own, Scaled, Wanting)})
    found = left_dense(Scaling(), layer, lambda layer: [layer[name](torch.empty(2, 4)) for name in ("Linear", "Own")])
    assert found == dict.fromkeys(("Scaled", "Wanting"), "its class has a forward of its own")


class Scaling(nn.Module):
    """A model that scales a weight of its layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Mixer().to("meta")])

    @property
    def base_model(self):
        return self

    def get_decoder(self):
        return self

    def scale(self):
        for layer in self.layers:
            layer.called.weight.mul_(0.5)


def test_what_the_model_above_does_with_a_weight_is_found():
    model = Scaling()
    found = left_dense(model, model.layers[0], lambda layer: layer(torch.empty(2, 4, device="meta")))
    assert found == {"called": BY_HAND, "taken": BY_HAND, "asked": "no text passes it"}


class Picky(nn.Module):
    """It runs, but asks more of its linear than that it can be called."""

    def __init__(self, wrong: int = 0):
        super().__init__()
        self.inner, self.wrong = nn.Linear(4, 4 + wrong), wrong

    def forward(self, x):
        if type(self.inner) is not nn.Linear:
            raise TypeError("a linear is expected")
        return self.inner(x) + x


def test_a_layer_that_fails_on_linears_without_a_weight_is_refused():
    empty = torch.empty(2, 4, device="meta")
    with pytest.raises(ArmorError, match="Picky: runs, but not .* .TypeError: a linear is expected., so a compressed"):
        by_hand(Picky().to("meta"), lambda layer: layer(empty))
    with pytest.raises(RuntimeError, match="broadcast"):  # of the layer as it is
        by_hand(Picky(wrong=1).to("meta"), lambda layer: layer(empty))
