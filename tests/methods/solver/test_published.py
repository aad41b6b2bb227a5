"""The published optimiser: its group update against brute force, its bookkeeping, its guarantee."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch

from armor.core import blockdiag
from armor.core.pattern import Pattern, is_nm
from armor.methods.nowag import nowag
from armor.methods.solver import published
from armor.methods.solver.objective import supports
from armor.methods.solver.settings import Selection
from tests.methods.problems import problem


def test_group_update_is_the_best_support():
    """Of every block the drawn group gets the support and values of least loss; A S and the residual follow."""
    generator = torch.Generator().manual_seed(0)
    rows, columns, size_a, size_b, m = 4, 16, 2, 8, 4
    w, d = problem(rows, columns)
    a = torch.randn(rows // size_a, size_a, size_a, generator=generator)
    b = torch.randn(columns // size_b, size_b, size_b, generator=generator)
    mask = torch.tensor([True, True, False, False]).repeat(rows, columns // m)
    s = torch.randn(rows, columns, generator=generator) * mask
    dense_a, dense_b = blockdiag.expand(a), blockdiag.expand(b)
    left, residual = dense_a @ s, dense_a @ s @ dense_b - w
    row, group = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[1, 0], [0, 1]])

    def fitted(place, support):
        """The least loss with this support of the group at `place`, and the group's values."""
        basis = torch.zeros(len(support), rows, columns)
        for unit, position in zip(basis, support, strict=True):
            unit[place[0], place[1].start + position] = 1
        empty = s.clone()
        empty[place] = 0
        matrix = ((dense_a @ basis @ dense_b) * d.sqrt()).flatten(1).T.double()
        target = ((w - dense_a @ empty @ dense_b) * d.sqrt()).view(-1, 1).double()
        fit = torch.linalg.lstsq(matrix, target).solution
        values = torch.zeros(m)
        values[list(support)] = fit.flatten().float()
        return float((matrix @ fit - target).square().sum()), values

    expected = []
    for i, j in itertools.product(range(2), range(2)):
        start = size_b * j + m * int(group[i, j])
        place = (size_a * i + int(row[i, j]), slice(start, start + m))
        tried = (fitted(place, support) for support in itertools.combinations(range(m), 2))
        expected.append((place, min(tried, key=lambda found: found[0])[1]))

    published.update_groups(a, b, s, mask, left, residual, d, (row, group), supports(Pattern(2, 4)), m)
    for place, values in expected:
        torch.testing.assert_close(s[place], values, rtol=1e-3, atol=1e-4)
    assert is_nm(mask, Pattern(2, 4))
    torch.testing.assert_close(left, dense_a @ s, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(residual, dense_a @ s @ dense_b - w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("selection", "weights"),
    [
        ("l1-random", [3, 4, 1, 0]),
        ("l2-random", [3, 8**0.5, 1, 0]),
        ("uniform", [1, 1, 1, 1]),
        ("l1-greedy", [0, 1, 0, 0]),
    ],
)
def test_draw_follows_its_rule(selection, weights):
    """How often each of four groups is drawn, over the 4,000 blocks of one draw."""
    blocks = 4000
    groups = torch.tensor([[3.0, 0, 0, 0], [2, -2, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    gradient = groups.view(1, 2, 8).expand(blocks, 2, 8).reshape(2 * blocks, 8)
    drawn = [published.draw(gradient, (blocks, 2, 1, 2, 4), torch.Generator().manual_seed(5), selection) for _ in "ab"]
    assert all(one.equal(two) for one, two in zip(*drawn, strict=True))
    row, group = drawn[0]
    found = (2 * row + group).flatten().bincount(minlength=4) / blocks
    torch.testing.assert_close(found, torch.tensor(weights) / sum(weights), rtol=0, atol=0.03)
    assert not found[torch.tensor(weights) == 0].any()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "50%"])
def test_lowers_the_loss(pattern):
    weight, importance = problem(16, 32)
    settings = published.Settings(iterations=200, learning_rate=1e-3)
    result = published.solve(weight, importance, pattern=pattern, block_size=8, settings=settings)
    assert result.loss < 0.95 * result.start_loss
    assert result.start_loss == pytest.approx(nowag(weight, importance, pattern=pattern).loss)
    assert is_nm(result.mask, Pattern.parse(pattern)) and not result.core[~result.mask].any()
    losses = [loss for _, _, loss in result.trace]
    assert losses == sorted(losses, reverse=True)


def test_never_worse_than_nowag_where_adam_diverges():
    weight, importance = problem(16, 32)
    settings = published.Settings(iterations=20, learning_rate=10.0)
    result = published.solve(weight, importance, block_size=8, settings=settings)
    assert result.loss <= result.start_loss


@pytest.mark.parametrize("selection", get_args(Selection))
def test_same_seed_same_bytes(selection):
    weight, importance = problem(16, 32)
    settings = published.Settings(iterations=10, selection=selection)
    one, two = (published.solve(weight, importance, block_size=8, settings=settings, seed=5) for _ in "ab")
    assert one.core.equal(two.core) and one.left.equal(two.left) and one.right.equal(two.right)
