"""Statistics of experts: routed tokens by the square of what the router gives them, all tokens where these are few."""

from __future__ import annotations

import torch

from armor.calibrate.capture import calibrate
from armor.calibrate.routed import PRIOR, blended
from armor.config.sources import CalibrationSettings
from armor.format.records.calibration import CalibrationRecord
from armor.format.statistics import Accumulator, read_statistics
from armor.model.inspect import inspect
from armor.model.source import open_source
from tests.packed import edit_tensors
from tests.tiny import tiny_model, tiny_text


def sums(x, weights=None, gram=True):
    found = Accumulator(x.shape[1], gram)
    found.add(x, weights)
    return found


def test_tokens_count_with_the_square_of_their_weight():
    x, w = torch.randn(50, 8), torch.rand(50, 1)
    found = sums(x, w).statistics()
    expected = (w * x).square().sum(0) / w.square().sum()
    assert torch.allclose(found.importance, expected, rtol=1e-5)
    assert torch.allclose(found.gram.diagonal(), expected, rtol=1e-5)
    same, plain = sums(x, torch.full((50, 1), 0.5)), sums(x)
    assert torch.allclose(same.statistics().importance, plain.statistics().importance, rtol=1e-6)
    assert same.effective_tokens() == 50 and sums(x, w).effective_tokens() < 50


def test_few_tokens_are_blended_with_all_and_none_is_all():
    everyone = sums(torch.randn(100, 8))
    all_tokens = everyone.statistics()
    nothing = blended(Accumulator(8, True), everyone)
    assert torch.equal(nothing.importance, all_tokens.importance) and torch.equal(nothing.gram, all_tokens.gram)
    assert nothing.tokens == 0
    as_many = sums(10 * torch.randn(PRIOR, 8))
    middle, own = blended(as_many, everyone), as_many.statistics()
    assert torch.allclose(middle.importance, (own.importance + all_tokens.importance) / 2, rtol=1e-5)
    assert torch.allclose(middle.gram, (own.gram + all_tokens.gram) / 2, rtol=1e-5, atol=1e-5)
    many = sums(10 * torch.randn(10_000, 8))
    assert torch.allclose(blended(many, everyone).importance, many.statistics().importance, rtol=0.02)


def test_an_expert_that_saw_no_token_is_named_and_has_statistics(tmp_path):
    folder = tiny_model(tmp_path / "model", "mixtral", layers=2, num_experts_per_tok=1)
    experts = "model.layers.1.block_sparse_moe.experts"

    def two_alone(tensors):  # of two opposite numbers one is above zero, which is what the other experts have
        gate = tensors["model.layers.1.block_sparse_moe.gate.weight"]
        gate[1], gate[2:] = -gate[0], 0.0

    edit_tensors(folder, two_alone)
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(60))
    source = open_source(folder)
    topology = inspect(source, tmp_path / "model.json")
    settings = CalibrationSettings(text={"files": [str(text)]}, sequences=3, sequence_length=64, gram=True)
    record = calibrate(source, topology, settings, tmp_path / "calibration/calibration.json")
    assert record == CalibrationRecord.read(tmp_path / "calibration/calibration.json")
    assert record.unrouted_experts == (f"{experts}.2", f"{experts}.3")
    found = read_statistics(tmp_path / "calibration/layer_1.safetensors")
    for name in ("w1", "w2", "w3"):
        assert (found[f"{experts}.3.{name}"].importance > 0).all()
        assert not torch.equal(found[f"{experts}.3.{name}"].importance, found[f"{experts}.0.{name}"].importance)
    assert found[f"{experts}.0.w1"].importance is found[f"{experts}.0.w3"].importance
