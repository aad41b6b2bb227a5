import json
import shutil
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from armor.assemble.verify import verify
from armor.assemble.writer import assemble
from armor.config.layers import LayerSettings, Override
from armor.core.errors import ArmorError
from armor.format.records.checkpoint import CheckpointRecord
from armor.format.records.layer import LayerRecord
from armor.format.shards import Shards
from tests.packed import SETTINGS, edit_tensors, factorized, factors_of, opened, packed

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("model"), "qwen2")  # biases and tied embeddings


@pytest.fixture
def copy(root, tmp_path):
    return shutil.copytree(root, tmp_path / "copy")


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_it_holds_the_factors_and_everything_else_of_the_source(root):
    found = load_file(root / "checkpoint/model.safetensors")
    expected = load_file(root / "source/model.safetensors")
    factors = factors_of(root)
    for name, f in factors.items():
        del expected[f"{name}.weight"]
        expected |= {f"{name}.{suffix}": tensor for suffix, tensor in f.tensors().items()}
    tombstone = found.pop(f"{Q}.weight")
    assert tombstone.tolist() == [0] and tombstone.dtype == torch.uint8
    assert found.keys() == expected.keys() and f"{Q}.bias" in found and "lm_head.weight" not in found
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def test_the_files_around_the_weights(root):
    checkpoint = root / "checkpoint"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (checkpoint / name).read_bytes() == (root / "source" / name).read_bytes()
    source, found = (json.loads((root / folder / "config.json").read_text()) for folder in ("source", "checkpoint"))
    quantization = found.pop("quantization_config")
    assert found == source and quantization["quant_method"] == "armor" and quantization["format_version"] == 1


def test_the_card_says_what_the_hub_and_people_ask(copy):
    card = ModelCard.load(copy / "checkpoint/README.md")
    tags = ["armor", "sparse", "2:4"]
    assert card.data.to_dict() == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    record = LayerRecord.read(copy / "layers/layer_0.json")
    assert record.fingerprint in card.text and record.made_by.code in card.text and "iterations: 2" in card.text
    assert f"torch {version('torch')}" in card.text and str(copy) not in card.text
    # What the source says of itself is passed on.
    said = "license: other\nlicense_name: theirs\nlicense_link: https://there\nlanguage: en\ntags: [old]"
    (copy / "source/README.md").write_text(f"---\n{said}\n---\nTheir words.\n")
    source, topology = opened(copy)
    assemble(replace(source, hub="them/tiny"), topology, copy / "layers", copy / "checkpoint.json")
    data = ModelCard.load(copy / "checkpoint/README.md").data.to_dict()
    assert data.pop("base_model") == "them/tiny" and data.pop("base_model_relation") == "quantized"
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "theirs", "https://there")
    assert data["language"] == "en" and data["tags"] == tags


def test_the_card_s_snippet_runs_where_the_folder_is(root, monkeypatch):
    card = (root / "checkpoint/README.md").read_text()
    monkeypatch.chdir(root)
    found = {}
    exec(card.partition("```python\n")[2].partition("```")[0], found)
    assert found["model"](torch.tensor([found["tokenizer"]("the old city").input_ids])).logits.isfinite().all()


def test_checkpoint_json(root):
    result = CheckpointRecord.read(root / "checkpoint.json")
    source, topology = opened(root)
    files = contents(root / "checkpoint")
    assert result.fingerprint == source.fingerprint
    assert result.checkpoint_bytes == sum(map(len, files.values()))
    assert {name: file.bytes for name, file in result.files.items()} == {n: len(b) for n, b in files.items()}
    assert result.compressed_count == 14 and result.kept_dense == () and result.dense_bits_per_weight == 32
    # fp32, 2:4: 16 bits of values and 1 of mask for each weight, and the blocks of 16.
    blocks = sum(32 * 16 * (linear.out_features + linear.in_features) for linear in topology.linears())
    assert result.bits_per_weight == pytest.approx(17 + blocks / topology.linear_parameters)


def test_the_same_input_gives_the_same_bytes(root, copy):
    assemble(*opened(copy), copy / "layers", copy / "checkpoint.json")
    assert contents(copy / "checkpoint") == contents(root / "checkpoint")


def test_shards(root, copy):
    assemble(*opened(copy), copy / "layers", copy / "checkpoint.json", max_shard_bytes=60_000)
    files = sorted((copy / "checkpoint").glob("model*.safetensors"))
    assert len(files) > 3 and not (copy / "checkpoint/model.safetensors").exists()
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 60_000 for file in files[1:])
    together = {name: tensor for file in files for name, tensor in load_file(file).items()}
    whole = load_file(root / "checkpoint/model.safetensors")
    assert together.keys() == whole.keys() and all(torch.equal(whole[name], t) for name, t in together.items())
    index = json.loads((copy / "checkpoint/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    # The names that were in shards before are gone when a later recipe needs fewer.
    assemble(*opened(copy), copy / "layers", copy / "checkpoint.json")
    assert contents(copy / "checkpoint") == contents(root / "checkpoint")


def test_recipes_of_all_kinds_in_one_checkpoint(tmp_path):
    overrides = [
        Override(modules="*.mlp.up_proj", method="dense"),
        Override(modules="*.mlp.down_proj", method="magnitude", pattern="50%"),
        Override(modules="*.k_proj", method="wanda", pattern="4:8"),
        Override(modules="*.o_proj", block_size=32),
    ]
    settings = LayerSettings(**(SETTINGS.model_dump() | {"overrides": overrides}))
    root = packed(tmp_path, settings=settings)
    result = CheckpointRecord.read(root / "checkpoint.json")
    dense = [f"model.layers.{k}.mlp.up_proj" for k in (0, 1)]
    assert list(result.kept_dense) == dense and result.compressed_count == 12
    assert all(f"{name}.weight" in Shards(root / "checkpoint") for name in dense)
    assert verify(root / "checkpoint").patterns == {"2:4": 8, "4:8": 2, "50%": 2}


def test_an_all_dense_recipe_gives_the_source_back(tmp_path):
    root = packed(tmp_path, settings=LayerSettings(method="dense"))
    assert contents(root / "checkpoint")["model.safetensors"] == contents(root / "source")["model.safetensors"]
    assert "quantization_config" not in json.loads((root / "checkpoint/config.json").read_text())
    assert verify(root / "checkpoint").compressed_count == 0


def refused(root, message, **options):
    """Assembling fails with one line; afterwards there is no checkpoint, or still the one from before."""
    before = contents(root / "checkpoint") if (root / "checkpoint").exists() else None
    with pytest.raises(ArmorError, match=message) as error:
        assemble(*opened(root), root / "layers", root / "checkpoint.json", **options)
    assert "\n" not in str(error.value)
    assert not list(root.glob(".checkpoint*"))
    if (root / "checkpoint").exists():
        assert (root / "checkpoint.json").exists() and contents(root / "checkpoint") == before
    else:
        assert not (root / "checkpoint.json").exists()
    return str(error.value)


def record(layer, change):
    def edit(root):
        file = root / f"layers/layer_{layer}.json"
        found = json.loads(file.read_text())
        change(found)
        file.write_text(json.dumps(found))

    return edit


def of_another_run(root):
    other = factorized(root, LayerSettings(method="wanda"), "others")
    shutil.copy(other / "layer_1.safetensors", root / "layers/layer_1.safetensors")


def missing(stage):
    def edit(root):
        (root / "layers/layer_1.safetensors").unlink()
        record(1, lambda found: found["made_by"].update(stage=stage))(root)

    return edit


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (record(0, lambda found: found.update(fingerprint="f")), r"factors of another model .*factorize layer 0 again"),
        (of_another_run, "layer_1.safetensors: not what its JSON describes; factorize layer 1 again"),
        (
            lambda root: edit_tensors(root / "source", lambda tensors: tensors["model.norm.weight"].add_(1)),
            "not the model that was inspected",
        ),
        (missing("armor.factorize.layer"), "layer_1.safetensors: missing; factorize layer 1 again"),
        (missing("armor.training.tune"), "missing; run armor tune again, or delete .*/layers.json and run"),
        (record(0, lambda found: found.pop("modules")), "layer_0.json: .*run armor factorize for this layer again"),
        (record(1, lambda found: found["modules"].pop(UP)), f"layer_1.json: {UP}: missing"),
        (
            record(1, lambda found: found["modules"][UP].update(pattern="1:4")),
            f"layer_1.safetensors: {UP}: pattern 2:4, expected 1:4 as layer_1.json says",
        ),
        (
            record(1, lambda found: found["modules"][UP].update(block_sizes={"left": 8, "right": 16})),
            r"up_proj.left: shape \(8, 16, 16\), expected \(16, 8, 8\)",
        ),
    ],
)
def test_factors_that_do_not_fit(copy, edit, message):
    edit(copy)
    refused(copy, message)


def test_a_folder_that_is_no_checkpoint_is_not_deleted(copy):
    shutil.rmtree(copy / "checkpoint")
    (copy / "checkpoint").mkdir()
    (copy / "checkpoint/thesis.txt").write_text("years of work")
    refused(copy, "in the way, and not a checkpoint")


def test_nan_in_a_tensor_that_is_copied(copy):
    source, topology = opened(copy)
    name = "model.layers.1.input_layernorm.weight"
    edit_tensors(copy / "source", lambda tensors: tensors[name].__setitem__(3, float("nan")))
    with pytest.raises(ArmorError, match=rf"model.safetensors: {name}: 1 of 64 numbers are NaN"):
        assemble(source, topology, copy / "layers", copy / "checkpoint.json")
    assert not list(copy.glob("*checkpoint*"))
