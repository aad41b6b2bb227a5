import json

import pytest
import torch
from safetensors.torch import load_file

from armor.assemble.verify import table, verify
from armor.assemble.writer import assemble
from armor.core.errors import ArmorError
from armor.format.records.checkpoint import CheckpointRecord
from armor.serve.check import check
from tests.packed import factors_of, opened, packed
from tests.tiny import tiny_model


def refused(folder, *parts, **options):
    with pytest.raises(ArmorError) as error:
        verify(folder, **options)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_a_sound_checkpoint_and_its_summary(root):
    summary = verify(root / "checkpoint")
    record = CheckpointRecord.read(root / "checkpoint.json")
    assert summary.compressed_count == 14 and summary.patterns == {"2:4": 14} and summary.shards == 1
    assert summary.checksums and summary.bits_per_weight == record.bits_per_weight


def test_hashes_cover_the_files_that_are_not_loaded_too(checkpoint):
    file = checkpoint / "tokenizer.json"
    file.write_bytes(file.read_bytes() + b" ")
    refused(checkpoint, file.name, "checksums.json")
    file.unlink()
    refused(checkpoint, file.name)


def test_what_is_no_checkpoint(root, tmp_path):
    refused(root / "source", "config.json")
    refused(tmp_path, "config.json")


def test_beside_the_source_the_errors_are_those_of_the_factors(root, tmp_path):
    assemble(*opened(root), root / "layers", tmp_path / "checkpoint.json", max_shard_bytes=150_000)
    summary = verify(tmp_path / "checkpoint", root / "source")
    assert summary.shards == 3
    source = load_file(root / "source/model.safetensors")
    expected = {}
    for name, factors in factors_of(root).items():
        weight = source[f"{name}.weight"].double()
        expected[name] = float((weight - factors.reconstruct(torch.float64)).norm() / weight.norm())
    assert summary.distance.relative_errors == pytest.approx(expected, rel=1e-5)
    assert summary.distance.equal_tensors == len(source) - len(expected)
    assert all(f"{error:.4f}" in table(summary) for error in expected.values())


def test_another_model_is_one_line(root, tmp_path):
    folder = root / "checkpoint"
    for name, config, parts in (
        ("wider", {"intermediate_size": 256}, ("mlp.gate_proj.weight", "(256, 64)", "(128, 64)")),
        ("longer", {"layers": 3}, (f"{folder}: model.layers.2.", "missing")),
        ("other numbers", {"seed": 1}, ("is that the model that was compressed?",)),
        ("other dtype", {"dtype": torch.bfloat16}, ("float32", "bfloat16")),
    ):
        tiny_model(tmp_path / name, **({"layers": 2} | config))
        refused(folder, *parts, against=tmp_path / name)
    refused(folder, "quantized itself", against=folder)


def test_a_model_whose_class_has_another_name_in_transformers_passes(tmp_path):
    """Phi MoE was published as PhiMoEForCausalLM, which vLLM calls it too."""

    def rename(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["PhiMoEForCausalLM"]}))

    folder = packed(tmp_path, "phimoe", layers=1, change=rename) / "checkpoint"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["PhiMoEForCausalLM"]
    assert any(".experts." in name for name in check(folder))
