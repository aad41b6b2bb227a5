import json

import pytest
import torch
from safetensors.torch import load_file

from armor.assemble.verify import Distance, Verified, table, verify
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


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md"])
def test_hashes_cover_the_files_that_are_not_loaded_too(checkpoint, name):
    file = checkpoint / name
    file.write_bytes(file.read_bytes() + b" ")
    refused(checkpoint, name, "checksums.json")
    file.unlink()
    refused(checkpoint, name)


@pytest.mark.parametrize("kind", ["dense", "empty", "no folder"])
def test_what_is_no_checkpoint(root, tmp_path, kind):
    folder = {"dense": root / "source", "empty": tmp_path, "no folder": tmp_path / "nowhere"}[kind]
    refused(folder, "config.json")


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
    printed = table(summary)
    assert "14 linears (14 x 2:4)" in printed and "model.layers.1 " in printed and "down_proj" in printed
    assert all(f"{error:.4f}" in printed for error in expected.values())


def test_a_table_of_names_that_share_their_last_part():
    errors = {"h.0.a.proj": 0.1, "h.0.b.proj": 0.2, "h.10.a.proj": 0.3, "h.2.b.proj": 0.4}
    facts = {"folder": "f", "shards": 1, "tensors": 9, "bytes": 9, "compressed_count": 4, "patterns": {"2:4": 4}}
    distance = Distance(against="s", equal_tensors=0, trained_tensors=0, relative_errors=errors)
    summary = Verified(**facts, bits_per_weight=9.0, checksums=False, distance=distance)
    rows = [line.split() for line in table(summary).splitlines()[-5:-1]]
    assert rows == [
        ["a.proj", "b.proj"],
        ["h.0", "0.1000", "0.2000"],
        ["h.2", "–", "0.4000"],
        ["h.10", "0.3000", "–"],
    ]


def test_another_model_is_one_line(root, tmp_path):
    folder = root / "checkpoint"
    for name, config, parts in (
        ("wider", {"intermediate_size": 256}, ("mlp.gate_proj.weight", "(256, 64)", "(128, 64)")),
        ("shorter", {"layers": 1}, ("shorter: model.layers.1.", "missing")),
        ("longer", {"layers": 3}, (f"{folder}: model.layers.2.", "missing")),
        ("other numbers", {"seed": 1}, ("is that the model that was compressed?",)),
        ("other dtype", {"dtype": torch.bfloat16}, ("float32", "bfloat16")),
    ):
        tiny_model(tmp_path / name, **({"layers": 2} | config))
        refused(folder, *parts, against=tmp_path / name)
    refused(folder, "quantized itself", against=folder)
    refused(folder, "nowhere", against=tmp_path / "nowhere")


def test_a_model_whose_class_has_another_name_in_transformers_passes(tmp_path):
    """Phi MoE was published as PhiMoEForCausalLM, which vLLM calls it too."""

    def rename(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["PhiMoEForCausalLM"]}))

    folder = packed(tmp_path, "phimoe", layers=1, change=rename) / "checkpoint"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["PhiMoEForCausalLM"]
    assert any(".experts." in name for name in check(folder))
