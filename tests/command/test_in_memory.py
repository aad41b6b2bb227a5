"""armor.compress does in memory what the pipeline does through files."""

import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import armor
from armor.assemble.verify import verify
from armor.assemble.writer import assemble
from armor.calibrate.capture import calibrate
from armor.config.layers import Override
from armor.config.quantization import QuantizeSettings
from armor.config.recipes import Recipe
from armor.config.sources import CalibrationSettings, TextSettings
from armor.core.errors import ArmorError
from armor.factorize.layer import factorize_layer
from armor.factorize.quantize import quantize_layer
from armor.format.records.topology import Topology
from armor.methods.solver.settings import SolverSettings
from armor.model.inspect import inspect
from armor.model.source import open_source
from armor.runtime.linear import ArmorLinear
from tests.tiny import MAMBA2, tiny_model, tiny_text

TOKENS = torch.arange(40).view(2, 20)
TEXT = tiny_text()
RECIPE = {"block_size": 16, "solver": {"iterations": 2}}
SIZES = {"sequences": 4, "sequence_length": 32}


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


def assert_equal(one, other):
    """Both have the same tensors by name, to the last bit."""
    found, expected = one.state_dict(), other.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model with biases and tied embeddings."""
    return tiny_model(tmp_path_factory.mktemp("model") / "source", "qwen2", layers=2)


@pytest.mark.parametrize(
    "integers",
    [None, QuantizeSettings(core="int4", group=16)],
    ids=["floats", "int4"],
)
def test_the_factors_are_those_of_the_pipeline(source, tmp_path, integers):
    overrides = [
        Override(layers=[1], modules="*.up_proj", method="wanda"),
        Override(layers=[0], modules="*.up_proj", method="sparsegpt"),
        Override(layers=[0], modules="*.down_proj", method="armor_gram"),
        Override(modules="*.v_proj", block_size=8),
    ]
    recipe = Recipe(block_size=16, solver=SolverSettings(iterations=2), keep_dense=["*.k_proj"], overrides=overrides)
    recipe = recipe.replace(quantize=integers)
    (tmp_path / "text.txt").write_text(TEXT)
    inspect(open_source(source), tmp_path / "model.json")
    stages = open_source(source), Topology.read(tmp_path / "model.json")
    settings = CalibrationSettings(text=TextSettings(files=[str(tmp_path / "text.txt")]), gram=True, **SIZES)
    calibrate(*stages, settings, tmp_path / "calibration.json")
    for layer in (0, 1):
        file = f"layer_{layer}.safetensors"
        factors = tmp_path / "layers" / file
        factorize_layer(*stages, layer, tmp_path / file, recipe.for_layer(layer, 7), factors)
        if integers:
            own = integers.for_layer(layer)
            quantize_layer(*stages, layer, factors, tmp_path / file, own, tmp_path / "integers" / file)
    assemble(*stages, tmp_path / ("integers" if integers else "layers"), tmp_path / "checkpoint.json")

    model = armor.compress(*loaded(source), TEXT, recipe, **SIZES, seed=7)
    assert_equal(model, loaded(tmp_path / "checkpoint")[0])


def test_it_generates_and_comes_back_from_disk_the_same(source, tmp_path):
    model, tokenizer = loaded(source, dtype=torch.bfloat16)
    dense = logits(model)
    integers = {"core": "int4", "group": 16, "overrides": [{"modules": "*.k_proj", "leave": True}]}
    assert armor.compress(model, tokenizer, [TEXT, TEXT], RECIPE | {"quantize": integers}, **SIZES) is model
    linears = {name: module for name, module in model.named_modules() if isinstance(module, ArmorLinear)}
    kinds = {name: linear.layout.quantization for name, linear in linears.items()}
    assert len(linears) == 14 and all((kinds[name] is None) == ("k_proj" in name) for name in linears)
    compressed = logits(model)
    assert compressed.dtype == dense.dtype and 0 < (compressed - dense).norm() < 0.9 * dense.norm()
    model.save_pretrained(tmp_path)
    assert verify(tmp_path).compressed_count == 14
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert_equal(again, model)
    assert (logits(again) - compressed).abs().max() <= 3e-2 * compressed.abs().max()
    generated = again.generate(TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=256)
    assert generated.shape == (2, TOKENS.shape[1] + 5)


def test_by_default_as_long_as_the_context_and_training_goes_on(source):
    model, tokenizer = loaded(source)
    model.train()
    armor.compress(model, tokenizer, TEXT, RECIPE | {"method": "wanda"}, sequences=2)  # 2 x 128 tokens
    assert model.training
    with pytest.raises(ArmorError, match=r"needed 1000 x 128 = 128000"):
        armor.compress(*loaded(source), TEXT, RECIPE, sequences=1000)


def test_an_all_dense_recipe_changes_nothing(source):
    model, tokenizer = loaded(source)
    assert armor.compress(model, tokenizer, "", {"method": "dense"}) is model
    assert getattr(model, "hf_quantizer", None) is None and type(model.model.layers[0].mlp.up_proj) is nn.Linear


def infinite(model):
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("inf")


def broken_embedding(model):
    model.model.embed_tokens.weight.data[:] = float("nan")


def offloaded(model):
    model.model.layers[1].to("meta")


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (None, {"recipe": {"blok_size": 3}}, r"recipe: blok_size: unknown key; did you mean block_size\?"),
        (None, {"recipe": {"overrides": [{"layers": [2]}]}}, "layers: found 2, but the model's are 0 to 1"),
        (None, {"text": "short"}, r"text: found 5 tokens in 1 documents, needed 4 x 32"),
        (None, {"sequence_length": 129}, "context length is 128"),
        (None, {"sequences": 0}, "at least 1"),
        (infinite, {}, r"layers\.1\.mlp\.up_proj: its weight holds NaN"),
        (broken_embedding, {}, r"layers\.0\.self_attn\.q_proj: its input holds NaN"),
        (offloaded, {}, r"layers\.1\..*: is offloaded"),
    ],
    ids=["key", "layers", "text", "length", "sequences", "weight", "input", "offloaded"],
)
def test_a_mistake_is_one_line_and_leaves_the_model_dense(source, change, options, said):
    model, tokenizer = loaded(source)
    if change:
        change(model)
    given = {"text": TEXT, "recipe": RECIPE | {"method": "nowag"}} | SIZES | options
    with pytest.raises(ArmorError, match=said) as error:
        armor.compress(model, tokenizer, given.pop("text"), given.pop("recipe"), **given)
    assert "\n" not in str(error.value)
    assert not any(isinstance(module, ArmorLinear) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_is_no_dense_model_of_transformers(source):
    with pytest.raises(ArmorError, match="Linear: not a model of transformers"):
        armor.compress(nn.Linear(4, 4), None, TEXT, RECIPE)
    model = armor.compress(*loaded(source), TEXT, RECIPE | {"method": "nowag"}, **SIZES)
    with pytest.raises(ArmorError, match="quantized already"):
        armor.compress(model, None, TEXT, RECIPE)


def test_a_linear_that_another_module_multiplies_with_as_in_mamba_2_stays_dense_with_one_line(tmp_path, caplog):
    folder = tiny_model(tmp_path / "mamba2", "mamba2", layers=2, **MAMBA2)
    with caplog.at_level(logging.WARNING, "armor"):
        model = armor.compress(*loaded(folder), TEXT, RECIPE | {"method": "nowag"}, **SIZES)
    (told,) = [line for line in caplog.messages if "stay dense, for another module" in line]
    assert "2 linears" in told and told.endswith(": backbone.layers.*.mixer.out_proj")
    packed = [name for name, module in model.named_modules() if isinstance(module, ArmorLinear)]
    assert packed == ["backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.in_proj"]
    assert logits(model).isfinite().all()
