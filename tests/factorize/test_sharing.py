"""Linears that share B: one problem, one B in every file, and the same product wherever it is computed."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from armor.assemble.export import export
from armor.assemble.verify import verify
from armor.config.layers import Override
from armor.config.reading import parse_settings
from armor.config.recipes import Recipe
from armor.core.errors import ArmorError
from armor.factorize.asked import groups_asked
from armor.format.checkpoint import modules_of
from armor.format.factors import read_factors
from armor.format.records.checkpoint import CheckpointRecord
from armor.format.records.layer import LayerRecord
from armor.format.shards import Shards
from armor.format.statistics import read_statistics, write_statistics
from armor.methods import METHODS
from armor.methods.solver.objective import Objective, relative_loss
from armor.model.inspect import inspect
from armor.model.source import open_source
from tests.packed import QUANTIZE, SETTINGS, edit_tensors, factorized, factors_of, opened, packed, prepared, quantized
from tests.training.trained import ready, refined

SHARED = SETTINGS.model_copy(update={"share_right": True})
TOKENS = torch.arange(40).view(2, 20)
ATTENTION = "model.layers.0.self_attn"
Q, K, V = (f"{ATTENTION}.{name}_proj" for name in "qkv")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("shared"), settings=SHARED)


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def dense(root, factors=None):
    model = AutoModelForCausalLM.from_pretrained(root / "source")
    for name, found in (factors or factors_of(root)).items():
        model.get_submodule(name).weight.data = found.reconstruct()
    return logits(model)


def close(a, b, tolerance=1e-4):
    return (a - b).abs().max() <= tolerance * b.abs().max()


def groups(root, **settings):
    """The last parts of the names of the linears of layer 0 as they are compressed, a text for each group."""
    layer, own = opened(root)[1].layers[0], SETTINGS.model_copy(update=settings)
    found = groups_asked(layer, own, {linear.name: own.for_module(linear.name) for linear in layer.linears})
    return [" ".join(n.name.rpartition(".")[2].removesuffix("_proj") for n in group) for group, _ in found], found


def test_who_shares(root):
    apart = ["q", "k", "v", "o", "gate", "up", "down"]
    assert groups(root)[0] == apart
    assert groups(root, share_right=True)[0] == ["q k v", "o", "gate up", "down"]
    assert groups(root, share_right=[["v_proj", "q_proj"]])[0] == ["q v", "k", "o", "gate", "up", "down"]
    other = [Override(modules="*.k_proj", block_size=8), Override(modules="*.up_proj", method="nowag")]
    assert groups(root, share_right=True, overrides=other)[0] == ["q v", "k", "o", "gate", "up", "down"]
    assert groups(root, share_right=True, block_size=1)[0] == apart
    # Blocks of A end where a linear ends: 32 divides the 64 rows of q and the 32 of k and v.
    assert groups(root, share_right=True, block_size=48)[1][0][1].block_size == 32
    with pytest.raises(ArmorError, match=r"o_proj is not fed the same tensor as .*q_proj"):
        groups(root, share_right=[["q_proj", "o_proj"]])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"share_right": [["q_proj"]]}, "two names"),
        ({"share_right": [["q_proj", "k_proj"], ["v_proj", "q_proj"]]}, "q_proj is named twice"),
        ({"share_right": True, "method": "nowag"}, "nowag makes no B"),
        ({"share_right": True, "budget": {"bits": 12}}, "goes without budget"),
    ],
)
def test_recipes_that_cannot_be(settings, said):
    with pytest.raises(ArmorError, match=said):
        parse_settings(Recipe, settings, "recipe")


def test_a_name_that_is_nowhere_is_refused(root, tmp_path):
    with pytest.raises(ArmorError, match=r"share_right: '\*.qproj' matches no linear"):
        factorized(root, SETTINGS.model_copy(update={"share_right": [["qproj", "k_proj"]]}), str(tmp_path / "no"))


def test_b_is_stored_once_and_no_linear_is_above_nowag(root):
    source, factors = Shards(root / "source"), factors_of(root)
    for index in range(2):
        stored = load_file(root / f"layers/layer_{index}.safetensors")
        holders = [name.removesuffix(".right").rpartition(".")[2] for name in stored if name.endswith(".right")]
        assert sorted(holders) == ["down_proj", "gate_proj", "o_proj", "q_proj"]
        record = LayerRecord.read(root / f"layers/layer_{index}.json")
        statistics = read_statistics(root / f"calibration/layer_{index}.safetensors")
        for name, entry in record.modules.items():
            last = name.rpartition(".")[2]
            of = "q_proj" if last in ("k_proj", "v_proj") else "gate_proj" if last == "up_proj" else None
            assert (entry.right_of, factors[name].right_of) == (of, of)
            weight = source.read(f"{name}.weight")
            objective = Objective.of(weight, statistics[name].importance)
            assert entry.loss == pytest.approx(relative_loss(weight, objective, factors[name]), rel=1e-6)
            plain = METHODS["nowag"].run(weight, statistics[name], SETTINGS, 0)
            assert entry.loss <= entry.start_loss == pytest.approx(plain.loss, rel=1e-6)
    assert torch.equal(factors[Q].right, factors[V].right)


def test_where_sharing_would_hurt_each_gets_its_own(tmp_path):
    """The columns that matter to q are those that do not matter to k, so what suits both together is bad for each."""
    root = prepared(tmp_path, layers=1)
    scale = torch.logspace(-6, 6, 64)

    def change(tensors):
        tensors[f"{Q}.weight"] *= scale
        tensors[f"{K}.weight"] *= scale.flip(0)

    edit_tensors(root / "source", change)
    topology, file = (
        inspect(open_source(root / "source"), root / "model.json"),
        root / "calibration/layer_0.safetensors",
    )
    inputs = {name: replace(own, importance=own.importance.clone()) for name, own in read_statistics(file).items()}
    write_statistics(file, inputs, {name: name for name in inputs}, topology.fingerprint)
    factors = read_factors(factorized(root, SHARED) / "layer_0.safetensors")[0]
    record = LayerRecord.read(root / "layers/layer_0.json")
    for name in (Q, K, V):
        entry = record.modules[name]
        assert "has a B of its own" in entry.note and entry.right_of is None and entry.loss <= entry.start_loss
        assert factors[name].right_of is None
    assert not torch.equal(factors[Q].right, factors[K].right)
    assert record.modules["model.layers.0.mlp.up_proj"].right_of == "gate_proj"


def test_the_checkpoint_counts_b_once_and_computes_the_product(root, tmp_path):
    folder = root / "checkpoint"
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    assert modules_of(config)[K].right_of == "q_proj" and "right_of" not in config["groups"][0]
    names = Shards(folder).names()
    assert f"{Q}.right" in names and f"{K}.right" not in names
    size = sum(Shards(folder).bytes_of(n) for n in names if ".layers." in n and "norm" not in n and "weight" not in n)
    topology = opened(root)[1]
    assert CheckpointRecord.read(root / "checkpoint.json").bits_per_weight == 8 * size / topology.linear_parameters
    assert verify(folder, root / "source").compressed_count == 14
    model, expected = AutoModelForCausalLM.from_pretrained(folder), dense(root)
    assert close(logits(model), expected) and close(logits(copy.deepcopy(model)), expected)
    linear = model.get_submodule(K)
    assert linear.right is None and linear.held("right") is model.get_submodule(Q).right
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    assert modules_of(saved) == modules_of(config)
    assert (tmp_path / "saved/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert close(logits(cpu_offload(model, execution_device="cpu", offload_buffers=True)), expected)
    export(folder, tmp_path / "dense")
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)


@pytest.mark.parametrize(
    "change",
    [{"right_of": "o_proj", "in_features": 32}, {"right_of": "b_proj"}, {"right_of": "v_proj"}],
)
def test_a_holder_that_holds_nothing_is_refused(root, change):
    config = json.loads((root / "checkpoint/config.json").read_text())["quantization_config"]
    with pytest.raises(ArmorError, match=r"right_of|quantization"):
        modules_of(config | {"format_version": 1})
    next(group for group in config["groups"] if "right_of" in group).update(change)
    with pytest.raises(ArmorError, match=r"right_of|quantization"):
        modules_of(config)


def test_integers_are_rounded_as_one(root):
    folder = quantized(root, QUANTIZE)
    record = LayerRecord.read(root / "quantized/quantized/layer_0.json")
    assert record.modules[K].right_of == "q_proj" and record.modules[K].loss < 2 * record.modules[K].start_loss
    names = Shards(folder).names()
    assert f"{Q}.right_scales" in names and not {f"{K}.right_scales", f"{K}.right"} & set(names)
    files = (root / "quantized/quantized").glob("*.safetensors")
    factors = {name: found for file in files for name, found in read_factors(file)[0].items()}
    assert close(logits(AutoModelForCausalLM.from_pretrained(folder)), dense(root, factors))
    verify(folder)
    other = [*QUANTIZE.overrides, QUANTIZE.overrides[0].model_copy(update={"modules": "*.k_proj"})]
    with pytest.raises(ArmorError, match=r"k_proj: another quantization than .*q_proj"):
        quantized(root, QUANTIZE.model_copy(update={"overrides": other}), "no")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return ready(tmp_path_factory.mktemp("text"), settings=SHARED, layers=1)


def test_training_trains_one_b(text, tmp_path):
    record = refined(text, 0, tmp_path / "refined", inputs="dense")
    before, after = (read_factors(f / "layer_0.safetensors")[0] for f in (text / "layers", tmp_path / "refined"))
    assert torch.equal(after[Q].right, after[K].right) and not torch.equal(after[Q].right, before[Q].right)
    assert after[K].right_of == "q_proj" and record.modules[K].right_of == "q_proj"
    numbers = load_file(tmp_path / "refined/layer_0.safetensors")
    assert f"{K}.right" not in numbers
    trained = [tensor.numel() for name, tensor in numbers.items() if not name.endswith("core_mask")]
    assert record.training[-1].parameters == sum(trained)
