"""A model before it is here: the same shapes as the real one, from no more than headers, or one line that says why."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from armor.config.sources import ModelSettings
from armor.core.errors import ArmorError
from armor.format.shards import Shards
from armor.model.fetch import fetch
from armor.model.inspect import inspect
from armor.model.outline import outline
from armor.model.source import Source
from tests.hub import hub, use
from tests.tiny import tiny_gguf, tiny_model

HUB = ModelSettings(hub="someone/model", revision="abc")


@pytest.fixture
def model(tmp_path) -> Path:
    return tiny_model(tmp_path / "model", layers=2, max_shard_size="100KB")


@pytest.fixture
def place(tmp_path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def described(folder: Path) -> dict:
    """Every tensor's file, dtype, shape and bytes."""
    shards = Shards(folder)
    return {n: (shards.file_of(n), shards.dtype(n), shards.shape(n), shards.bytes_of(n)) for n in shards.names()}


def ask(monkeypatch, tmp_path, endpoint, settings, place):
    """`outline` with the hub at `endpoint`."""
    use(monkeypatch, endpoint, tmp_path / "cache")
    return outline(settings, place)


def test_of_a_model_on_the_hub_the_headers_alone_are_read(place, tmp_path, monkeypatch):
    model = tiny_model(tmp_path / "model", layers=2, max_shard_size="5MB", vocab_size=20_000)
    with hub(model) as (asked, endpoint):
        folder = ask(monkeypatch, tmp_path, endpoint, HUB, place)
    assert folder == place and described(folder) == described(model)
    files = sorted(model.glob("*.safetensors"))
    assert max(file.stat().st_size for file in files) > 100_001 >= max(asked.sent[file.name] for file in files)
    real = inspect(Source(model, "", "float32"), tmp_path / "real.json")
    assert inspect(Source(folder, "", "float32"), tmp_path / "outline.json") == real


def test_of_a_gguf_file_it_is_what_fetch_makes(tmp_path, place):
    gguf = tiny_gguf(tmp_path / "model.gguf", tiny_model(tmp_path / "model", layers=2))
    settings = ModelSettings(gguf=str(gguf), dtype="float16")
    fetch(settings, tmp_path / "results/source.json")
    made = tmp_path / "results/source"
    assert described(outline(settings, place)) == described(made)
    assert {f.name for f in place.iterdir()} == {f.name for f in made.iterdir()} - {"generation_config.json"}


def edit(model: Path, **keys) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | keys))


def damage(model: Path) -> None:
    file = sorted(model.glob("*.safetensors"))[0]
    file.write_bytes(struct.pack("<Q", 40) + b"no JSON" * 20)


@pytest.mark.parametrize(
    ("name", "breaking", "said"),
    [
        ("someone/absent", None, "hub model someone/absent: there is no such model, or it is private; check the name"),
        ("someone/model-gated", None, "its owner wants you to accept terms; do so on its page, then log in with"),
        ("not a name", None, "hub model not a name: not a valid name"),
        ("someone/model", damage, r"someone/model: model-00001-of-\d+.safetensors: no safetensors header"),
        (
            "someone/model",
            lambda model: edit(model, quantization_config={"quant_method": "gptq"}),
            r"config.json: the model is quantized \(gptq\); expected a dense model",
        ),
    ],
    ids=["wrong name", "gated", "no name", "corrupt header", "quantized"],
)
def test_what_cannot_be_planned_is_one_line(model, place, tmp_path, monkeypatch, name, breaking, said):
    if breaking:
        breaking(model)
    with hub(model) as (_, endpoint), pytest.raises(ArmorError, match=said) as caught:
        ask(monkeypatch, tmp_path, endpoint, ModelSettings(hub=name, revision="abc"), place)
    assert "\n" not in str(caught.value)


def test_without_a_network_there_is_one_line(place, tmp_path, monkeypatch):
    with pytest.raises(ArmorError, match="someone/model: .*check (the )?network") as caught:
        ask(monkeypatch, tmp_path, "http://127.0.0.1:9", HUB, place)
    assert "\n" not in str(caught.value)
