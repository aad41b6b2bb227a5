"""A trainable linear is the packed one, its gradient that of the product, and what it stores what it was."""

from __future__ import annotations

import pytest
import torch

from armor.core import blockdiag
from armor.core.factorization import Factorization
from armor.core.pattern import Pattern, top_n_mask
from armor.training.trainable import TrainableLinear, multiplied_once, rounded


def factorization(left=3, right=4, pattern="2:4", rank=0, out=6, inner=8, dtype=torch.float32):
    pattern = Pattern.parse(pattern)
    mask = top_n_mask(torch.rand(out, inner), pattern)
    blocks = [torch.randn(n // d, d, d).to(dtype) if d else None for n, d in ((out, left), (inner, right))]
    pair = {"up": torch.randn(out, rank).to(dtype), "down": torch.randn(rank, inner).to(dtype)} if rank else {}
    return Factorization((torch.randn(out, inner) * mask).to(dtype), mask, pattern, *blocks, **pair)


CASES = [
    (3, 4, "2:4", 0),
    (6, 8, "4:8", 0),
    (None, None, "2:4", 0),
    (2, 4, "50%", 0),
    (1, 4, "1:4", 0),
    (None, None, "2:4", 3),
]


@pytest.mark.parametrize(("left", "right", "pattern", "rank"), CASES)
def test_the_weight_is_the_product_and_so_is_its_gradient(left, right, pattern, rank):
    f = factorization(left, right, pattern, rank)
    linear = TrainableLinear(f)
    torch.testing.assert_close(linear.weight, f.reconstruct())
    x, y = torch.randn(5, 8), torch.randn(5, 6)
    (linear(x) * y).sum().backward()
    a, b, u, v = (None if w is None else w.clone().requires_grad_() for w in (f.left, f.right, f.up, f.down))
    core = f.core.clone().requires_grad_()
    slow = core if b is None else core @ blockdiag.expand(b)
    slow = slow if a is None else blockdiag.expand(a) @ slow
    slow = slow if u is None else slow + u @ v
    (x @ slow.T * y).sum().backward()
    torch.testing.assert_close(linear.core_values.grad, core.grad[f.mask].view(6, -1))
    for mine, other in ((linear.left, a), (linear.right, b), (linear.up, u), (linear.down, v)):
        if other is not None:
            torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize(("left", "right", "pattern", "rank"), CASES)
def test_multiplied_once_for_many_calls_the_gradient_is_the_same(left, right, pattern, rank):
    f = factorization(left, right, pattern, rank)
    every, once, idle = (TrainableLinear(f) for _ in range(3))
    rows = torch.randn(3, 5, 8)
    for x in rows:
        every(x).square().sum().backward()
    with multiplied_once([once, idle]):
        for x in rows:
            torch.testing.assert_close(once(x), every(x))
            once(x).square().sum().backward()
        assert once.left is None or once.left.grad is None
    for name, parameter in every.named_parameters():
        torch.testing.assert_close(once.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-3)
        assert idle.get_parameter(name).grad is None
    assert once.product is None
    with torch.no_grad(), multiplied_once([once]):
        torch.testing.assert_close(once(rows[0]), every(rows[0]))


def test_an_error_while_multiplied_once_leaves_no_product():
    linear = TrainableLinear(factorization())
    with pytest.raises(KeyboardInterrupt), multiplied_once([linear]):
        raise KeyboardInterrupt
    assert linear.product is None and linear.core_values.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_trained_is_stored_as_it_was(dtype):
    f = factorization(rank=2, dtype=dtype)
    linear = TrainableLinear(f)
    assert linear.weight.dtype == torch.float32
    found = linear.factors()
    for name in ("core", "mask", "left", "right", "up", "down"):
        assert getattr(found, name).dtype == getattr(f, name).dtype and getattr(found, name).equal(getattr(f, name))


def test_rounded_shows_what_would_be_stored_and_no_longer():
    parameter = torch.nn.Parameter(torch.tensor([1.0 + 2**-12]))
    with rounded({"a": parameter}, {"a": torch.bfloat16}):
        assert parameter.item() == 1.0
    assert parameter.item() == 1.0 + 2**-12
