"""The proxy loss: against its definition, in any scale and dtype, and the fallback that finish never falls behind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armor.core import blockdiag
from armor.core.blocksizes import sizes
from armor.core.factorization import Factorization
from armor.core.pattern import Pattern, top_n_mask
from armor.methods.armor import armor
from armor.methods.solver.memory import PIECE
from armor.methods.solver.objective import Objective, balanced, finish, relative_loss
from armor.methods.solver.settings import SolverSettings
from tests.methods.problems import problem


def test_normalisation():
    """W = diag(row) W̄ diag(column); the rows of W̄ have unit norm, its columns had before the rows were divided."""
    weight, importance = problem(6, 8, dtype=torch.float64)
    objective = Objective.of(weight, importance)
    restored = objective.row[:, None] * objective.normal(weight).double() * objective.column
    torch.testing.assert_close(restored, weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(objective.normal(weight).norm(dim=1), torch.ones(6))
    torch.testing.assert_close(objective.column, weight.norm(dim=0))


@pytest.mark.parametrize("shape, blocks", [((6, 8), (3, 4)), ((9, 12), (9, 12)), ((5, 4), (1, 1))])
def test_loss_is_its_definition(shape, blocks):
    weight, importance = problem(*shape, dtype=torch.float64)
    objective = Objective.of(weight, importance)
    mask = top_n_mask(weight.abs(), Pattern(2, 4))
    left, right = (torch.randn(n // d, d, d, dtype=torch.float64) for n, d in zip(shape, blocks, strict=True))
    factors = Factorization(weight * mask, mask, Pattern(2, 4), left, right)
    product = blockdiag.expand(left) @ (weight * mask) @ blockdiag.expand(right)
    scale = objective.row[:, None] * objective.column
    error = (((weight - product) / scale).square() * importance).sum()
    total = ((weight / scale).square() * importance).sum()
    assert relative_loss(weight, objective, factors) == pytest.approx(float(error / total), rel=1e-12)


def test_loss_in_pieces():
    """A weight of two pieces and a half against its definition, on all rows at once."""
    weight, importance = problem(PIECE * 5 // 2 // 1024, 1024, dtype=torch.float64)
    objective = Objective.of(weight, importance)
    factors = Factorization(0.5 * weight, weight != 0, Pattern(2, 4), blockdiag.identity(len(weight), 4) * 1.5)
    error = (objective.normal(weight - 0.75 * weight).double().square() * importance).sum()
    total = (objective.normal(weight).double().square() * importance).sum()
    assert relative_loss(weight, objective, factors) == pytest.approx(float(error / total), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_loss_does_not_depend_on_scales(scale):
    weight, importance = problem(6, 8, dtype=torch.float64)
    mask = top_n_mask(weight.abs(), Pattern(2, 4))

    def loss(weight, importance):
        pruned = Factorization(weight * mask, mask, Pattern(2, 4))
        return relative_loss(weight, Objective.of(weight, importance), pruned)

    assert loss(weight * scale, importance) == pytest.approx(loss(weight, importance), rel=1e-9)
    assert loss(weight, importance * scale) == pytest.approx(loss(weight, importance), rel=1e-9)


def test_finish_keeps_what_is_better():
    """Exact factors win over NoWag-P, useless and broken ones lose."""
    weight, importance = problem(4, 8)
    objective, pattern = Objective.of(weight, importance), Pattern(2, 4)
    mask = top_n_mask(objective.score(weight), pattern)
    a, b = blockdiag.identity(4, 2), blockdiag.identity(8, 4)
    best_values = (a, objective.normal(weight) * mask, mask, b)
    start = finish(weight, objective, pattern, None, [], (2, 4))
    assert start.loss == start.start_loss and start.core.equal(weight * mask)
    assert finish(weight, objective, pattern, best_values, [], (2, 4)).loss == pytest.approx(start.loss, rel=1e-5)
    for spoiled in (a * 0, a * torch.nan, a * torch.inf, a * 7):
        found = finish(weight, objective, pattern, (spoiled, *best_values[1:]), [], (2, 4))
        assert found.loss == start.loss and found.core.equal(start.core)


@pytest.mark.parametrize(
    "shape, pattern, block, expected",
    [
        ((576, 1536), "2:4", 64, (64, 64)),
        ((576, 576), "2:4", 128, (96, 96)),
        ((30, 40), "2:4", 16, (15, 8)),
        ((30, 40), "50%", 16, (15, 10)),
        ((8, 8), "2:4", 1, (1, 1)),
        ((8, 8), "4:8", 4, (1, 1)),
        ((8, 8), "2:4", 1000, (8, 8)),
    ],
)
def test_sizes(shape, pattern, block, expected):
    assert sizes(shape, Pattern.parse(pattern), block) == expected


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
