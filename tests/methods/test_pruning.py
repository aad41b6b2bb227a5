"""Pruning: each method keeps its own largest, in every group, with the weight's own values."""

from __future__ import annotations

import pytest
import torch

from armor.core.pattern import Pattern, is_nm
from armor.methods.magnitude import magnitude
from armor.methods.nowag import nowag
from armor.methods.wanda import wanda
from tests.methods.problems import problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "50%"])
def test_own_values_are_kept_and_nowag_has_the_least_loss(pattern, dtype):
    weight, importance = problem(6, 16)
    weight = weight.to(dtype)
    found = [method(weight, importance, pattern=pattern) for method in (nowag, wanda, magnitude)]
    for pruned in found:
        assert is_nm(pruned.mask, Pattern.parse(pattern)) and pruned.core.dtype == dtype
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
