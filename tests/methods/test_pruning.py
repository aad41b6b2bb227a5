"""Pruning: each method keeps its own largest, in every group, with the weight's own values."""

from __future__ import annotations

import pytest
import torch

from armor.core.pattern import Pattern, is_nm
from armor.methods.magnitude import magnitude
from armor.methods.nowag import nowag
from armor.methods.wanda import wanda

METHODS = [magnitude, wanda, nowag]


def problem(rows: int, columns: int):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, columns, generator=generator), torch.rand(columns, generator=generator) + 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "50%"])
@pytest.mark.parametrize("method", METHODS)
def test_keeps_own_values(method, pattern, dtype):
    weight, importance = problem(6, 16)
    weight = weight.to(dtype)
    result = method(weight, importance, pattern=pattern)
    assert is_nm(result.mask, Pattern.parse(pattern)) and result.core.dtype == dtype
    assert result.core.equal(weight * result.mask) and result.left is None and result.right is None
    assert result.start_loss <= result.loss + 1e-12


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


def test_nowag_has_the_least_loss_of_masks():
    weight, importance = problem(16, 32)
    losses = {m.__name__: m(weight, importance).loss for m in METHODS}
    assert losses["nowag"] <= min(losses.values())


@pytest.mark.parametrize("method", METHODS)
def test_bad_inputs(method):
    weight, importance = problem(4, 8)
    with pytest.raises(ValueError, match="^weight: found 1 NaN"):
        method(weight.index_fill(0, torch.tensor([0]), 0).masked_fill(weight == weight.max(), torch.nan), importance)
    with pytest.raises(ValueError, match="^importance: found -"):
        method(weight, -importance)
