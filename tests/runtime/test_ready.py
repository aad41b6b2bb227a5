"""Linears made ready once: those that are handed the same input in one call, the bits of separate ones, none stale."""

import copy

import pytest
import torch

from armor.core.pattern import Pattern
from armor.format.checkpoint import PackedLinear
from armor.runtime import cpu
from armor.runtime.linear import ArmorLinear, know_each_other
from armor.runtime.load import load_model
from tests.packed import SETTINGS, packed

TOKENS = torch.arange(40).view(2, 20)
LAYOUT = PackedLinear(16, 64, Pattern(2, 4), 16, 16)

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernel was not built")


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.fixture
def beside():
    """Three linears of one module that have as many inputs, the last with a bias."""
    torch.manual_seed(0)
    linears = torch.nn.ModuleDict({name: ArmorLinear(LAYOUT, bias=name == "v") for name in "qkv"})
    state = {
        name: torch.full_like(tensor, 0b00110011) if name.endswith("mask") else torch.randn_like(tensor)
        for name, tensor in linears.state_dict().items()
    }
    linears.load_state_dict(state)
    know_each_other(linears)
    return [linears[name] for name in "qkv"]


def alone(linear, x):
    followers, linear.beside.followers = linear.beside.followers, ()
    y = linear(x)
    linear.beside.followers = followers
    return y


@pytest.mark.parametrize("share_right", [False, True])
def test_from_the_second_pass_on_the_bits_are_those_of_separate_calls(tmp_path, share_right):
    root = packed(tmp_path, settings=SETTINGS.model_copy(update={"share_right": share_right}))
    model = load_model(root / "checkpoint", "float32")
    first, second = logits(model), logits(model)
    linears = [module for module in model.modules() if isinstance(module, ArmorLinear)]
    assert any(linear.beside.followers for linear in linears)
    for linear in linears:
        linear.beside.followers = ()
    assert torch.equal(first, second) and torch.equal(logits(model), second)


@torch.no_grad()
def test_no_output_is_stale(beside):
    q, k, v = beside
    x = torch.randn(3, 64)
    expected = [alone(linear, x) for linear in beside]
    assert all(map(torch.equal, (q(x), k(x), v(x)), expected))
    q(x)
    x += 1  # k and v must see it
    assert torch.equal(k(x), alone(k, x)) and torch.equal(v(x), alone(v, x))


def drawn(linear):
    return {
        name: tensor if name == "core_mask" else torch.randn_like(tensor)
        for name, tensor in linear.state_dict().items()
    }


def change_in_place(linear):
    for name, tensor in drawn(linear).items():
        getattr(linear, name).data.copy_(tensor)


CHANGES = {
    "changed in place": change_in_place,
    "loaded": lambda linear: linear.load_state_dict(drawn(linear)),
    "unpacked and packed": lambda linear: linear.unpack().pack(),
    "in bfloat16 and back": lambda linear: linear.to(torch.bfloat16).to(torch.float32),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("leads", [True, False])
def test_what_a_linear_holds_now_is_what_it_multiplies_with(beside, change, leads):
    q, k, v = beside
    x = torch.randn(3, 64)
    q(x), k(x), v(x)
    before = [linear(x) for linear in beside]
    copied = copy.deepcopy(torch.nn.ModuleList(beside))
    CHANGES[change](copied[0])
    assert all(map(torch.equal, [linear(x) for linear in beside], before))
    changed = q if leads else k
    CHANGES[change](changed)
    expected = ArmorLinear(LAYOUT, changed.bias is not None)
    expected.load_state_dict(changed.state_dict())
    for linear in beside:
        y = linear(x)
        if linear is changed:
            assert (y - expected(x)).abs().max() <= 1e-5 * y.abs().max()
