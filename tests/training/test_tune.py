"""Tune: the KL divergence from the dense model, of the model as stored, never rises on held-out text."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from armor.assemble.verify import verify
from armor.assemble.writer import assemble
from armor.core.errors import ArmorError
from armor.format.records.layer import LayerRecord
from armor.format.shards import Shards
from armor.runtime.load import load_model
from armor.training import tune as whole
from armor.training.memory import best_bytes, factor_shapes, predictions_bytes, tune_bytes
from armor.training.spread import spread
from armor.training.tune import kept_predictions, kl_divergence
from tests.memory import NoRoom, card_of, host_of
from tests.packed import opened
from tests.training.trained import LENGTH, ready, refined, tuned


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return ready(tmp_path_factory.mktemp("model"))


def divergence(root, folder, output):
    """KL(dense ‖ compressed) on the held-out rows, over all tokens, of a checkpoint that transformers loads."""
    assemble(*opened(root), folder, output / "checkpoint.json")
    tokens = load_file(root / "states/tokens.safetensors")["tokens"][6:8]
    with torch.no_grad():
        own, dense = (
            load_model(path, "float32")(tokens).logits.log_softmax(-1)
            for path in (output / "checkpoint", root / "source")
        )
    return F.kl_div(own, dense, log_target=True, reduction="none").sum(-1).mean().item()


@pytest.mark.parametrize("vocabulary", [5, 300])
def test_the_divergence_over_what_is_kept_is_exact_or_less(vocabulary):
    dense, own = torch.randn(2, 9, vocabulary) * 4, torch.randn(2, 9, vocabulary) * 4
    kept = kept_predictions(iter(dense))
    assert kept.tokens.shape == (2, 9, min(256, vocabulary))
    if vocabulary > 256:
        assert kept.log_probabilities.double().exp().sum(-1).allclose(torch.ones(2, 9).double(), rtol=1e-6)
    for index in (0, 1):
        pair = own[index].log_softmax(-1), dense[index].log_softmax(-1)
        whole_sum = F.kl_div(*pair, log_target=True, reduction="none").sum(-1)
        own_kept = kept.tokens[index], kept.log_probabilities[index]
        found = kl_divergence(own[index], *own_kept)
        assert (found >= -1e-5).all() and (found <= whole_sum + 1e-4).all()
        if vocabulary <= 256:
            torch.testing.assert_close(found, whole_sum, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kl_divergence(dense[index], *own_kept), torch.zeros(9), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_the_divergence_falls(tmp_path, family):
    """Of a model with tied embeddings and biases, and of one with fused projections."""
    root = ready(tmp_path, family)
    before = divergence(root, root / "layers", tmp_path / "before")
    done = tuned(root, tmp_path).training
    after = divergence(root, tmp_path / "tuned", tmp_path / "after")
    assert done.loss < done.start_loss and done.stage == "tune" and done.kept > 0
    assert done.start_loss == pytest.approx(before, rel=0.02) and done.loss == pytest.approx(after, rel=0.02)
    trained = verify(tmp_path / "after/checkpoint", root / "source").distance.trained_tensors
    assert trained == len(done.norms_and_biases) > 0


def test_a_refined_model_is_tuned_further_and_its_card_says_both(root, tmp_path):
    for k in range(2):
        refined(root, k, tmp_path / "refined")
    record = tuned(root, tmp_path, tmp_path / "refined")
    assert record.training.loss < record.training.start_loss
    layers = [LayerRecord.read(tmp_path / f"tuned/layer_{k}.json") for k in range(2)]
    assert [layer.sha256 for layer in layers] == list(record.sha256)
    assert all([done.stage for done in layer.training] == ["refine", "tune"] for layer in layers)
    divergence(root, tmp_path / "tuned", tmp_path)
    card = (tmp_path / "checkpoint/README.md").read_text()
    assert "Refined: A, B, the values of S" in card and "Tuned: A, B, the values of S" in card


def test_layers_that_are_run_again_give_the_same_but_for_rounding(root, tmp_path, monkeypatch):
    expected = tuned(root, tmp_path / "a").training
    shapes = [factor_shapes(root / f"layers/layer_{k}.safetensors") for k in range(2)]
    (_, again), (_, most) = (
        tune_bytes(Shards(root / "source"), shapes, True, LENGTH, recompute=recompute) for recompute in (True, False)
    )
    host_of(monkeypatch, (again + best_bytes(shapes, True) + predictions_bytes(8 * LENGTH)) / 0.9)
    assert again < most
    found = tuned(root, tmp_path / "b").training
    assert found.kept == expected.kept and found.start_loss == pytest.approx(expected.start_loss, rel=1e-5)
    assert [look.held_out_loss for look in found.looks] == pytest.approx(
        [look.held_out_loss for look in expected.looks], rel=1e-3
    )


def test_too_little_memory_is_refused_with_what_is_needed(root, tmp_path, monkeypatch):
    """On the host, on the host beside a large GPU, on several small GPUs."""
    with monkeypatch.context() as patch:
        host_of(patch, 1_000_000)
        with pytest.raises(ArmorError, match="the whole model needs about .* GB, cpu has 0.0 GB; refine its layers"):
            tuned(root, tmp_path)
        card_of(patch, 10**12)
        patch.setattr(whole, "leased", lambda device: [device])
        with pytest.raises(ArmorError, match="keeps about .* GB on the host, which has 0.0 GB; refine its layers"):
            tuned(root, tmp_path, device="cuda:0")
    card_of(monkeypatch, 1_000_000)
    monkeypatch.setattr(whole, "leased", lambda _: ["cuda:0", "cuda:1"])
    with pytest.raises(ArmorError, match="GB, on the fullest of 2 devices; the smallest has 0.0 GB; refine its layers"):
        tuned(root, tmp_path, device="cuda:0")
    assert not any(tmp_path.iterdir())


def test_out_of_memory_is_one_line(root, tmp_path):
    with NoRoom(lambda name, _: name == "silu_backward"), pytest.raises(ArmorError, match="out of memory on cpu; low"):
        tuned(root, tmp_path)


def fullest(sizes, places, count, first):
    held = [first] + [0] * (count - 1)
    for place, size in zip(places, sizes, strict=True):
        held[place] += size
    return max(held)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3), st.integers(0, 60))
def test_no_other_way_leaves_the_fullest_emptier(sizes, count, first):
    places = spread(sizes, count, first)
    assert places == sorted(places)
    best = min(fullest(sizes, other, count, first) for other in combinations_with_replacement(range(count), len(sizes)))
    assert fullest(sizes, places, count, first) == best
