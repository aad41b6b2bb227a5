"""armor.compress with refine and tune: what the stages make of the same text, without a file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import armor
from armor.assemble.verify import verify
from armor.core.errors import ArmorError
from armor.format.factors import read_factors, read_others
from armor.runtime.linear import ArmorLinear
from tests.packed import SETTINGS
from tests.tiny import SHARING, tiny_model, tiny_text
from tests.training.trained import LENGTH, TRAINING, ready, refined, tuned

TOKENS = torch.arange(40).view(2, 20)
RECIPE = {"block_size": 16, "solver": {"iterations": 2}}
SIZES = {"sequences": 4, "sequence_length": LENGTH}
SHORT = TRAINING | {"steps": 8}


def compressed(folder, recipe, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return armor.compress(model, AutoTokenizer.from_pretrained(folder), tiny_text(), recipe, **SIZES)


@torch.no_grad()
def divergence(model, folder):
    dense = AutoModelForCausalLM.from_pretrained(folder)
    own, other = (m(input_ids=TOKENS).logits.float().log_softmax(-1) for m in (model, dense))
    return (other.exp() * (other - own)).sum(-1).mean().item()


@pytest.mark.parametrize("inputs", ["dense", "compressed"])
def test_a_refined_model_is_that_of_the_stages(tmp_path, inputs):
    root = ready(tmp_path, settings=SETTINGS)
    model = compressed(root / "source", {**RECIPE, "refine": {**TRAINING, "inputs": inputs}})
    for k in range(2):
        refined(root, k, root / "refined", inputs=inputs)
        for name, factors in read_factors(root / f"refined/layer_{k}.safetensors")[0].items():
            layer = model.get_submodule(name)
            assert isinstance(layer, ArmorLinear)
            torch.testing.assert_close(layer.dense_weight(), factors.reconstruct(), rtol=1e-3, atol=1e-4)
        for name, tensor in read_others(root / f"refined/layer_{k}.safetensors").items():
            torch.testing.assert_close(model.get_parameter(name).data, tensor, rtol=1e-3, atol=1e-4)


def test_a_tuned_model_went_where_the_stage_goes(tmp_path):
    root = ready(tmp_path, settings=SETTINGS)
    model = compressed(root / "source", {**RECIPE, "tune": {**TRAINING, "rate": 3e-3}})
    tuned(root, root / "tuned")
    for k in range(2):
        start, end = (read_factors(root / folder / f"layer_{k}.safetensors")[0] for folder in ("layers", "tuned/tuned"))
        for name, factors in end.items():
            layer, there = model.get_submodule(name), factors.reconstruct()
            assert isinstance(layer, ArmorLinear)
            off, gone = layer.dense_weight() - there, there - start[name].reconstruct()
            assert 0 < gone.norm() and off.norm() < 0.05 * gone.norm()


@pytest.mark.parametrize("family", ["phi3", *SHARING])
def test_refined_and_tuned_it_is_closer_and_saved_as_ever(tmp_path, family):
    """Families train through what their layers share; no other test trains them."""
    source = tiny_model(tmp_path / "source", family, layers=3 if family in SHARING else 2)
    training = {"refine": SHORT, "tune": {**SHORT, "rate": 3e-3}}
    plain, model = (compressed(source, {**RECIPE, **more}) for more in ({}, training))
    assert divergence(model, source) < divergence(plain, source)
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "saved")
    verify(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again(input_ids=TOKENS).logits.allclose(model(input_ids=TOKENS).logits, atol=1e-5)


def test_a_bfloat16_model_is_tuned_as_the_integers_that_it_becomes(tmp_path):
    source = tiny_model(tmp_path, layers=1, dtype=torch.bfloat16)
    recipe, tune = {**RECIPE, "refine": SHORT, "quantize": {"core": "int4"}}, {**SHORT, "rate": 1e-2}
    plain, model = (compressed(source, recipe | more, dtype=torch.bfloat16) for more in ({}, {"tune": tune}))
    assert divergence(model, source) < divergence(plain, source)
    assert model.model.layers[0].mlp.up_proj.layout == plain.model.layers[0].mlp.up_proj.layout
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}


def test_an_error_leaves_the_model_as_it_was(tmp_path):
    source = tiny_model(tmp_path)
    before = load_file(source / "model.safetensors")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    for recipe, said in (
        ({**RECIPE, "refine": {**TRAINING, "sequences": 5000}}, "found .* tokens in 1 documents, needed 5002 x 48"),
        ({"base": "armor", "refine": {}}, "recipe: base: there is no recipe armor here"),
        ({**RECIPE, "budget": {"bits": 20}}, "recipe: budget: is for the workflow"),
        ({"method": "dense", "refine": {}}, "a dense recipe has no factors"),
    ):
        with pytest.raises(ArmorError, match=said):
            armor.compress(model, tokenizer, tiny_text(), recipe, **SIZES)
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in before.items())
