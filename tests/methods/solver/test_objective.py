"""The proxy loss: against its definition, in any scale and dtype, and the fallback that finish never falls behind."""

from __future__ import annotations

import pytest
import torch

from armor.core import blockdiag
from armor.core.blocksizes import sizes
from armor.core.factorization import Factorization
from armor.core.pattern import Pattern, top_n_mask
from armor.methods.solver.memory import PIECE
from armor.methods.solver.objective import Objective, finish, relative_loss
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
