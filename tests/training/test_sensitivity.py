"""Sensitivities are those of the whole model's autograd, predict its KL divergence, and survive a kill."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from armor.config.sample import SensitivityJob
from armor.core.errors import ArmorError
from armor.format.records.sensitivity import SensitivityRecord
from armor.format.sensitivity import read_sensitivities
from armor.format.statistics import read_statistics
from armor.methods.nowag import nowag
from armor.training.sensitivity import drawn, measure_sensitivity
from tests.killed import SAVED, killed_everywhere
from tests.packed import edit_tensors, opened, prepared
from tests.tiny import SHARING, tiny_text
from tests.training.trained import ready, sample

SEQUENCES = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return ready(tmp_path_factory.mktemp("model"))


def measured(root, output, **changes):
    job = SensitivityJob(sample=sample(root, SEQUENCES), **changes)
    record = measure_sensitivity(*opened(root), job, output)
    topology = opened(root)[1]
    return record, read_sensitivities(output, [n.name for n in topology.linears()], topology.fingerprint)


def whole(root):
    """The model, the tokens that are measured on, and M (out, in) of every linear by autograd of all of it."""
    model = AutoModelForCausalLM.from_pretrained(root / "source", dtype=torch.float32)
    tokens = load_file(root / "states/tokens.safetensors")["tokens"][:SEQUENCES]
    weights = {n.name: model.get_parameter(f"{n.name}.weight") for n in opened(root)[1].linears()}
    generator, curvature = torch.Generator().manual_seed(0), dict.fromkeys(weights, torch.tensor(0.0))
    for row in tokens:
        logits = model(row[None], use_cache=False).logits[0]
        log_likelihood = F.log_softmax(logits, -1).gather(-1, drawn(logits.detach(), generator)[:, None]).sum()
        gradients = torch.autograd.grad(log_likelihood, list(weights.values()))
        for name, g in zip(weights, gradients, strict=True):
            curvature[name] = curvature[name] + g.double().square() / tokens.numel()
    return model, tokens, curvature


@pytest.mark.parametrize("family", ["phi3", "gemma3n_text"])
def test_they_are_the_sums_of_the_curvature_by_autograd_of_the_whole_model(tmp_path, family):
    root = ready(tmp_path, family, layers=3 if family in SHARING else 2)
    record, found = measured(root, tmp_path / "words.json")
    assert record == SensitivityRecord.read(tmp_path / "words.json") and record.sequences == SEQUENCES
    _, _, curvature = whole(root)
    for name, m in curvature.items():
        own = found[name].rows.double()[:, None] * found[name].columns.double()
        scale = m.sum() * 1e-3
        torch.testing.assert_close(own.sum(0), m.sum(0), rtol=2e-3, atol=float(scale / m.shape[1]))
        torch.testing.assert_close(own.sum(1), m.sum(1), rtol=2e-3, atol=float(scale / m.shape[0]))


def test_they_predict_the_kl_divergence_of_one_linear_pruned(root, tmp_path):
    _, found = measured(root, tmp_path / "words.json")
    model, tokens, _ = whole(root)
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits.double().log_softmax(-1)
        for layer in range(2):
            for name, statistics in read_statistics(root / f"calibration/layer_{layer}.safetensors").items():
                weight = model.get_parameter(f"{name}.weight")
                kept, pruned = weight.clone(), nowag(weight, statistics.importance).core
                weight.copy_(pruned)
                after = model(tokens, use_cache=False).logits.double().log_softmax(-1)
                weight.copy_(kept)
                kl = float((before.exp() * (before - after)).sum(-1).mean())
                assert found[name].predicted_kl(pruned - kept) == pytest.approx(kl, rel=0.5), name


def test_tokens_are_drawn_with_their_probability():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0]).expand(20000, 4)
    found = drawn(logits, torch.Generator().manual_seed(0)).bincount(minlength=4) / 20000
    torch.testing.assert_close(found, logits[0].softmax(-1), rtol=0, atol=0.015)


def test_killed_after_a_layer_it_goes_on_and_ends_with_the_same_bytes(root, tmp_path):
    assert killed_everywhere(lambda folder: measured(root, folder / "words.json"), tmp_path, SAVED, 4)
    _, found = measured(root, tmp_path / "whole/words.json")
    _, other = measured(root, tmp_path / "seed.json", seed=1)
    assert not all(found[name].rows.equal(other[name].rows) for name in found)


def test_gradients_that_overflow_are_named_by_module(tmp_path):
    prepared(tmp_path, change=partial(edit_tensors, change=lambda tensors: tensors["lm_head.weight"].fill_(3e38)))
    (tmp_path / "text.txt").write_text(tiny_text())
    with pytest.raises(ArmorError, match=r"model.layers.1.*_proj: the gradient of its weight holds NaN or infinity"):
        measured(tmp_path, tmp_path / "words.json")


def test_what_is_missing_or_of_another_model_is_one_line(root, tmp_path):
    measured(root, tmp_path / "words.json")
    fingerprint = opened(root)[1].fingerprint
    with pytest.raises(ArmorError, match="of another model .*; run armor sensitivity again"):
        read_sensitivities(tmp_path / "words.json", [], "0" * 64)
    with pytest.raises(ArmorError, match="holds nothing of a.q; run armor sensitivity again"):
        read_sensitivities(tmp_path / "words.json", ["a.q"], fingerprint)
    (tmp_path / "words.safetensors").unlink()
    with pytest.raises(ArmorError, match="missing; run armor sensitivity again, or delete .* and run the workflow"):
        read_sensitivities(tmp_path / "words.json", [], fingerprint)
