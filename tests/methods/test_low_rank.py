"""Sparse plus low rank: what the papers say of the alternations, and of each part beside the other."""

from __future__ import annotations

import importlib

import pytest
import torch

from armor.core.pattern import Pattern, is_nm
from armor.format.checkpoint import PackedLinear
from armor.methods.basil import basil
from armor.methods.lora import lora
from armor.methods.oats import oats
from armor.methods.sparsegpt import damped, sparsegpt
from armor.methods.wanda import wanda
from tests.methods.problems import core_alone, correlated, error


def test_the_weighted_error_of_oats_falls_from_alternation_to_alternation(monkeypatch):
    weight, importance, _ = correlated()
    errors = []
    for count in range(1, 12):
        monkeypatch.setattr(importlib.import_module("armor.methods.oats"), "ALTERNATIONS", count)
        errors.append(error(weight, oats(weight, importance, rank=4).reconstruct(), importance.diag()))
    assert errors[-1] < 0.9 * errors[0]
    assert all(after <= before * (1 + 1e-5) for before, after in zip(errors, errors[1:], strict=False))


def test_oats_keeps_the_largest_of_what_its_pair_leaves():
    weight, importance, _ = correlated()
    found = oats(weight, importance, rank=4)
    rest = weight - found.up @ found.down
    pruned = wanda(rest, importance)
    assert torch.equal(found.mask, pruned.mask)
    torch.testing.assert_close(found.core, pruned.core)
    assert error(weight, found.reconstruct(), importance.diag()) < error(weight, weight * found.mask, importance.diag())


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "50%"])
def test_oats_of_rank_0_is_wanda(pattern):
    weight, importance, _ = correlated()
    found, pruned = oats(weight, importance, pattern=pattern, rank=0), wanda(weight, importance, pattern=pattern)
    assert found.up is found.down is None
    assert torch.equal(found.core, pruned.core) and torch.equal(found.mask, pruned.mask)
    assert (found.loss, found.start_loss) == (pruned.loss, pruned.start_loss)


def test_the_output_error_of_3basil_falls_from_turn_to_turn(monkeypatch):
    weight, importance, gram = correlated()
    gram_damped, errors = damped(gram, 32)[0], []
    for turns in range(8):
        monkeypatch.setattr(importlib.import_module("armor.methods.basil"), "TURNS", turns)
        errors.append(error(weight, basil(weight, importance, gram, rank=4).reconstruct(), gram_damped))
    assert errors[-1] < errors[0]
    assert all(after <= before * (1 + 1e-4) for before, after in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_3basil_is_better_than_its_core_alone_could_be_and_than_what_sees_less(pattern):
    weight, importance, gram = correlated()
    found = basil(weight, importance, gram, pattern=pattern, rank=4)
    own = error(weight, found.reconstruct(), gram)
    assert own < error(weight, core_alone(weight, found.mask, gram.double()), gram)
    assert own < error(weight, oats(weight, importance, pattern=pattern, rank=4).reconstruct(), gram)


def test_3basil_of_rank_0_prunes_and_fits_what_it_keeps():
    weight, importance, gram = correlated()
    found = basil(weight, importance, gram, rank=0)
    best = core_alone(weight, found.mask, damped(gram, 32)[0])
    assert found.up is found.down is None and is_nm(found.mask, Pattern(2, 4))
    torch.testing.assert_close(found.core.double(), best, rtol=2e-2, atol=2e-3)
    assert error(weight, found.core, gram) < error(weight, sparsegpt(weight, importance, gram).core, gram)


def test_lora_starts_as_sparsegpt_with_a_pair_of_the_weights_size():
    weight, importance, gram = correlated(64, 96)
    found, pruned = lora(weight, importance, gram, rank=16), sparsegpt(weight, importance, gram)
    assert torch.equal(found.reconstruct(), pruned.core) and found.loss == pruned.loss
    assert not found.up.any()
    grown = torch.randn_like(found.up) * found.down.square().mean().sqrt() @ found.down
    assert 0.7 < float(grown.norm() / weight.norm()) < 1.4
    assert not torch.equal(found.down, lora(weight, importance, gram, rank=16, seed=1).down)


def test_a_rank_takes_the_bits_of_blocks_of_that_size():
    low_rank, blocks = PackedLinear(192, 576, Pattern(2, 4), rank=64), PackedLinear(192, 576, Pattern(2, 4), 64, 64)
    assert low_rank.bits_per_weight(16) == blocks.bits_per_weight(16)
