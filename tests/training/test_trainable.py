"""A trainable linear is the packed one, its gradient that of the product, and what it stores what it was."""

from __future__ import annotations

import pytest
import torch

from armor.core import blockdiag
from armor.core.factorization import Factorization
from armor.core.integers import expand_scales
from armor.core.pattern import Pattern, top_n_mask
from armor.core.quantization import LIMITS
from armor.methods.solver.rounding import quantize
from armor.training.trainable import TrainableLinear, multiplied_once


def factorization(left=3, right=4, pattern="2:4", rank=0, out=6, inner=8, dtype=torch.float32):
    pattern = Pattern.parse(pattern)
    mask = top_n_mask(torch.rand(out, inner), pattern)
    blocks = [torch.randn(n // d, d, d).to(dtype) if d else None for n, d in ((out, left), (inner, right))]
    pair = {"up": torch.randn(out, rank).to(dtype), "down": torch.randn(rank, inner).to(dtype)} if rank else {}
    return Factorization((torch.randn(out, inner) * mask).to(dtype), mask, pattern, *blocks, **pair)


CASES = [
    (3, 4, "2:4", 0),
    (1, 4, "50%", 0),
    (None, None, "2:4", 3),
]


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize(("left", "right", "pattern", "rank"), CASES)
def test_the_weight_is_the_product_and_so_is_its_gradient(left, right, pattern, rank, once):
    """Also where it is multiplied once for many calls; a linear that none of them comes to has no gradient then."""
    f = factorization(left, right, pattern, rank)
    linear, idle = TrainableLinear(f), TrainableLinear(f)
    torch.testing.assert_close(linear.weight, f.reconstruct())
    rows, y = torch.randn(3, 5, 8), torch.randn(5, 6)
    with multiplied_once([linear, idle] if once else []):
        for x in rows:
            (linear(x) * y).sum().backward()
    assert linear.product is None and all(parameter.grad is None for parameter in idle.parameters())
    a, b, u, v = (None if w is None else w.clone().requires_grad_() for w in (f.left, f.right, f.up, f.down))
    core = f.core.clone().requires_grad_()
    slow = core if b is None else core @ blockdiag.expand(b)
    slow = slow if a is None else blockdiag.expand(a) @ slow
    slow = slow if u is None else slow + u @ v
    (rows @ slow.T * y).sum().backward()
    found = (linear.core_values, linear.left, linear.right, linear.up, linear.down)
    wanted = (core.grad[f.mask].view(6, -1), *(None if w is None else w.grad for w in (a, b, u, v)))
    for mine, grad in zip(found, wanted, strict=True):
        if grad is not None:
            torch.testing.assert_close(mine.grad, grad, rtol=1e-4, atol=1e-4)


def test_what_is_not_trained_is_stored_as_it_was():
    f = factorization(rank=2, dtype=torch.bfloat16)
    linear = TrainableLinear(f)
    assert linear.weight.dtype == torch.float32
    found = linear.factors()
    for name in ("core", "mask", "left", "right", "up", "down"):
        assert getattr(found, name).dtype == getattr(f, name).dtype and getattr(found, name).equal(getattr(f, name))


def integers(core="int4", blocks="int8", **options):
    f = factorization(**options)
    return quantize(torch.randn_like(f.core), torch.rand(8), f, core=core, blocks=blocks, group=2, trained=True)


INTEGERS = [
    {"core": "int4", "left": 2, "right": 8},
    {"core": "int4", "left": None, "right": None, "pattern": "50%", "rank": 2},
    {"core": "fp8", "left": 3, "right": 4, "blocks": "bfloat16"},
]


@pytest.mark.parametrize("options", INTEGERS)
def test_integers_are_trained_through_their_rounding_and_stored_as_they_are_multiplied(options):
    f = integers(**options)
    linear, floats = TrainableLinear(f), f.in_floats()
    same = linear.factors()
    for t, other in zip(*map(tensors_of, (f, same)), strict=True):
        assert t.dtype == other.dtype and t.double().equal(other.double())
    torch.testing.assert_close(linear.weight, f.reconstruct())

    twin, g = TrainableLinear(floats), torch.randn(6, 8)
    for each in (linear, twin):
        (each.weight * g).sum().backward()
    for name, parameter in twin.own().items():  # nothing was moved yet: the rounding is not there
        torch.testing.assert_close(linear.own()[name].grad, parameter.grad)

    with torch.no_grad():
        for name, parameter in linear.own().items():
            parameter += 0.05 * parameter.abs().mean() * torch.randn_like(parameter)
            parameter.copy_(parameter.to(linear.dtype(name)))
    moved = linear.factors()
    assert torch.equal(linear.weight, TrainableLinear(moved).weight) and not linear.weight.equal(f.reconstruct())
    core = moved.core.float()
    assert core.min() >= LIMITS[options["core"]][0] and core.max() <= LIMITS[options["core"]][1]
    assert moved.mask.equal(f.mask) and not core[~f.mask].any()


def tensors_of(f):
    return f.tensors().values()


def test_the_gradient_of_a_scale_is_what_the_rounding_leaves_and_the_integer_where_it_is_cut_off():
    f = integers(left=None, right=None)
    linear, g = TrainableLinear(f), torch.randn(6, 8)
    with torch.no_grad():
        linear.core_values *= 1 + 0.5 * torch.rand_like(linear.core_values)
    (linear.weight * g).sum().backward()
    exact = linear.factors().in_floats().core.new_zeros(6, 8)
    exact[f.mask] = linear.core_values.detach().flatten()
    exact /= expand_scales(linear.core_scales.detach(), f.quantization.group, 8)
    inside = (exact >= -8) & (exact <= 7)
    each = g * torch.where(inside, exact.round() - exact, exact.clamp(-8, 7))
    assert not inside.all()
    torch.testing.assert_close(linear.core_scales.grad, each.view(6, 2, 4).sum(2))
    values = (g * inside)[f.mask].view(6, 4)
    torch.testing.assert_close(linear.core_values.grad, values)
