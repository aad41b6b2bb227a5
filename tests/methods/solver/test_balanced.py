"""Balanced factors: the same product, columns of A and rows of B alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armor.core import blockdiag
from armor.core.pattern import Pattern, top_n_mask
from armor.methods.armor import armor
from armor.methods.solver.objective import Objective, balanced, relative_loss
from armor.methods.solver.settings import SolverSettings

SHAPES = [((6, 8), (3, 4)), ((9, 12), (9, 12)), ((5, 4), (1, 4))]


def factors(shape, blocks, seed=0):
    """A, S and B in float64 with columns and rows of very unlike norms."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    a, b = (torch.randn(n // d, d, d, **options) for n, d in zip(shape, blocks, strict=True))
    a *= torch.logspace(-2, 2, blocks[0], dtype=torch.float64)
    b *= torch.logspace(-2, 2, blocks[1], dtype=torch.float64)[:, None]
    return a, torch.randn(shape, **options), b


def product(a, s, b):
    return blockdiag.expand(a) @ s @ blockdiag.expand(b)


@pytest.mark.parametrize(("shape", "blocks"), SHAPES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_product_stays_but_for_its_scale_and_norms_become_alike(shape, blocks, seed):
    given_a, given_s, given_b = factors(shape, blocks, seed)
    a, s, b = balanced(given_a, given_s, given_b)
    found, expected = product(a, s, b), product(given_a, given_s, given_b)
    torch.testing.assert_close(found / found.norm(), expected / expected.norm(), rtol=1e-9, atol=1e-12)
    for norms in (a.norm(dim=1), b.norm(dim=2)):
        torch.testing.assert_close(norms, norms.max().expand_as(norms))


def test_zeros_stay_zeros_and_a_zero_column_harms_nothing():
    a, s, b = factors((6, 8), (3, 4))
    a[0, :, 1] = b[1, 2] = 0
    s *= top_n_mask(s.abs(), Pattern(2, 4))
    for tensor, kept in zip((a, s, b), balanced(a, s, b), strict=True):
        assert kept.isfinite().all() and torch.equal(kept == 0, tensor == 0)


def test_conditions_are_those_of_the_blocks():
    blocks = torch.stack([torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([0.0, 1.0]))])
    assert blockdiag.condition(blocks).tolist() == [2.0, 1e16]
    assert blockdiag.condition(torch.zeros(1, 2, 2)).tolist() == [1e16]


def test_what_is_stored_is_balanced_and_no_worse_than_the_start_in_any_dtype():
    generator = torch.Generator().manual_seed(1)
    weight, importance = torch.randn(32, 32, generator=generator), torch.rand(32, generator=generator) ** 8
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        stored = weight.to(dtype)
        found = armor(stored, importance, block_size=16, solver=SolverSettings(iterations=20))
        assert found.loss < found.start_loss
        assert found.loss == pytest.approx(relative_loss(stored, Objective.of(stored, importance), found))
        for norms in (found.left.double().norm(dim=1), found.right.double().norm(dim=2)):
            torch.testing.assert_close(norms, norms.mean().expand_as(norms), rtol=0.02, atol=0)
