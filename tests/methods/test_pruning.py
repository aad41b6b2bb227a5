"""Pruning: each method keeps its own largest, with the weight's own values; SparseGPT is its definition."""

from __future__ import annotations

import pytest
import torch

from armor.core.pattern import Pattern, is_nm
from armor.methods.magnitude import magnitude
from armor.methods.nowag import nowag
from armor.methods.sparsegpt import DAMPING, WIDTH, sparsegpt
from armor.methods.wanda import wanda
from tests.methods.problems import correlated, error, problem


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "50%"])
def test_own_values_are_kept_and_nowag_has_the_least_loss(pattern):
    weight, importance = problem(6, 16)
    found = [method(weight, importance, pattern=pattern) for method in (nowag, wanda, magnitude)]
    for pruned in found:
        assert is_nm(pruned.mask, Pattern.parse(pattern))
        assert pruned.core.equal(weight * pruned.mask) and pruned.left is None and pruned.right is None
        assert found[0].loss == found[0].start_loss == pruned.start_loss <= pruned.loss + 1e-12


def test_scores():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    importance = torch.tensor([100.0, 9.0, 4.0, 0.1])
    assert magnitude(weight, importance).mask.tolist() == [[False, False, True, True]]
    assert wanda(weight, importance).mask.tolist() == [[True, True, False, False]]  # 10, 6, 6, 1.3; left first
    assert nowag(weight, importance).mask.tolist() == [[True, True, False, False]]


def test_nowag_is_blind_to_the_scale_of_columns():
    weight, importance = problem(8, 16)
    scale = torch.logspace(-2, 2, 16)
    assert nowag(weight * scale, importance).mask.equal(nowag(weight, importance).mask)


def definition(weight, gram, pattern):
    """The slow twin of SparseGPT, in float64: one column after another goes, the inverse of what is left of H is
    computed anew."""
    w, h = weight.double().clone(), gram.double().clone()
    columns = len(h)
    h += DAMPING * h.diagonal().mean() * torch.eye(columns)
    kept, m = pattern.group(columns)
    mask = torch.zeros_like(w, dtype=torch.bool)
    for j in range(columns):
        inverse = torch.linalg.inv(h[j:, j:])
        run = m if pattern.m else WIDTH
        if j % run == 0:
            end = min(j + run, columns)
            n = kept if pattern.m else end * kept // columns - j * kept // columns
            # The k-th column of the group is judged when those before it are passed.
            costs = [w[:, k] ** 2 / torch.linalg.inv(h[k:, k:])[0, 0] for k in range(j, end)]
            mask[:, j:end].scatter_(1, torch.stack(costs, 1).argsort(1, descending=True)[:, :n], True)
        pruned = w[:, j].masked_fill(mask[:, j], 0)
        w[:, j:] -= torch.outer(pruned, inverse[0] / inverse[0, 0])
    return w, mask


@pytest.mark.parametrize(
    ("pattern", "rows", "columns", "tolerance"),
    [("2:4", 9, 24, 1e-4), ("4:8", 6, 40, 1e-4), ("50%", 7, 30, 1e-4), ("3:6", 8, 204, 1e-3), ("50%", 8, 205, 1e-3)],
)
def test_sparsegpt_is_its_definition(pattern, rows, columns, tolerance):
    """Also for more columns than are updated at once; of so many, near ties may fall either way."""
    weight, importance, gram = correlated(rows, columns, tokens=900, decades=0)
    found = sparsegpt(weight, importance, gram, pattern=pattern)
    expected, mask = definition(weight, gram, Pattern.parse(pattern))
    assert is_nm(found.mask, Pattern.parse(pattern))
    assert (found.mask != mask).float().mean() <= (0.01 if columns > WIDTH else 0)
    same = (found.mask == mask).all(1)
    torch.testing.assert_close(found.core[same].double(), expected[same], rtol=tolerance, atol=tolerance)


def test_the_output_error_of_sparsegpt_is_below_wandas():
    weight, importance, gram = correlated(32, 64, decades=0)
    pruned = (method.core for method in (sparsegpt(weight, importance, gram), wanda(weight, importance)))
    own, other = (error(weight, core, gram) for core in pruned)
    assert own < 0.8 * other
