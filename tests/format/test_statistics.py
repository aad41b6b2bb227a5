"""Statistics: means over tokens in float64, and a file that knows whose they are."""

from __future__ import annotations

import pytest
import torch

from armor.core.errors import ArmorError
from armor.format.records.base import File
from armor.format.statistics import Accumulator, Statistics, read_statistics, statistics_of, write_statistics
from tests.records import calibration_record


def test_any_cut_into_batches_gives_the_same_means():
    x = torch.randn(60, 5)
    whole, parts = Accumulator(5, gram=True), Accumulator(5, gram=True)
    whole.add(x)
    for part in x.split([1, 20, 0, 39]):
        parts.add(part.unsqueeze(0))
    for accumulator in (whole, parts):
        found = accumulator.statistics()
        assert found.tokens == 60
        torch.testing.assert_close(found.importance, x.square().mean(0))
        torch.testing.assert_close(found.gram, x.T @ x / 60)


def test_small_terms_survive_a_long_sum():
    accumulator = Accumulator(1, gram=True)
    accumulator.add(torch.tensor([[1e4]]))  # a float32 sum of 1e8 does not see 1e-1 added to it
    for _ in range(1000):
        accumulator.add(torch.full((1, 1), 0.3))
    expected = (1e8 + 1000 * 0.09) / 1001
    assert accumulator.squares.item() / 1001 == pytest.approx(expected, rel=1e-9)
    assert accumulator.products.item() / 1001 == pytest.approx(expected, rel=1e-9)


def test_what_was_written_is_read_and_only_for_its_model(tmp_path):
    path = tmp_path / "layer_0.safetensors"
    own = Statistics(torch.rand(4), torch.rand(4, 4), 7)
    users = {"a.q": "a.q", "a.k": "a.q", "a.o": "a.o"}
    write_statistics(path, {"a.q": own, "a.o": Statistics(torch.rand(3), None, 7)}, users, "f" * 64)
    found = read_statistics(path, "f" * 64)
    assert set(found) == {"a.q", "a.k", "a.o"} and found["a.k"] is found["a.q"] and found["a.k"].tokens == 7
    assert torch.equal(found["a.q"].importance, own.importance) and torch.equal(found["a.q"].gram, own.gram)
    assert found["a.o"].gram is None and read_statistics(path, gram=False)["a.q"].gram is None
    with pytest.raises(ArmorError, match="statistics of another model"):
        read_statistics(path, "e" * 64)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ArmorError, match="layer_0.safetensors: not a readable"):
        read_statistics(path)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_impossible_values_are_refused(tmp_path, value):
    path = tmp_path / "layer_0.safetensors"
    write_statistics(path, {"a.q": Statistics(torch.tensor([1.0, value]), None, 1)}, {"a.q": "a.q"}, "f")
    with pytest.raises(ArmorError, match=r"a\.q\.importance holds"):
        read_statistics(path)


def test_statistics_must_be_those_that_calibration_recorded(tmp_path):
    calibration, path = tmp_path / "calibration.json", tmp_path / "layer_0.safetensors"
    path.write_bytes(b"some")
    calibration_record(files={path.name: File.of(path)}).write(calibration)
    assert statistics_of(calibration, 0) == path
    with pytest.raises(ArmorError, match=r"calibration.json: lists no layer_1.safetensors"):
        statistics_of(calibration, 1)
    path.write_bytes(b"same")
    with pytest.raises(ArmorError, match=r"layer_0.safetensors: differs from its hash in calibration.json"):
        statistics_of(calibration, 0)
    path.unlink()
    with pytest.raises(ArmorError, match=r"layer_0.safetensors: missing"):
        statistics_of(calibration, 0)
