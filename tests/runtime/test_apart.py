"""Layers whose experts are read one after the other: what the whole layers make, with one expert in memory."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from armor.calibrate.capture import calibrate, peak_bytes
from armor.config.sources import CalibrationSettings
from armor.core.errors import ArmorError
from armor.execution.machine import USABLE
from armor.model.inspect import inspect
from armor.model.source import open_source
from armor.runtime import apart
from armor.runtime.apart import HOST_SHARE
from armor.runtime.experts import Expert
from armor.runtime.filling import layer_bytes
from armor.runtime.streaming import stream_model
from tests.memory import host_of
from tests.packed import edit_tensors, packed
from tests.tiny import tiny_model, tiny_text


@pytest.fixture
def read(monkeypatch):
    """How often each expert was given its tensors, of which no other of its layer has any then."""
    counts: Counter[str] = Counter()

    def fill(expert, prefix, *args, original=apart.fill):
        path, _, number = prefix.rpartition(".")
        assert isinstance(expert, Expert) and all(parameter.is_meta for parameter in expert.parameters())
        counts[prefix] += 1
        return original(expert, prefix, *args)

    monkeypatch.setattr(apart, "fill", fill)
    return counts


def too_small(folder) -> int:
    """The bytes of a host that has no room for a decoder layer with all its experts, beside what is outside of them."""
    skeleton = stream_model(folder).skeleton
    outside = {id(tensor): tensor.nbytes for *_, tensor in skeleton.outside(head=True)}
    return int((sum(outside.values()) + max(map(layer_bytes, skeleton.layers))) / USABLE / (1 - HOST_SHARE)) - 1


def check(monkeypatch, folder, read, exact: bool = True, copies: int = 1) -> None:
    """The logits with experts read one by one are those with whole layers; each is read once for a group of batches.

    `copies` is how often the family hands a token to its mixture.
    """
    host = too_small(folder)
    rows = int(host * HOST_SHARE / copies / 2 / (64 * 4) * 0.7 / 20)  # the second of these has no more room to wait
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(250, shape, generator=generator) for shape in [(1, 1), (rows, 20), (rows, 20), (1, 1)]]
    whole = list(stream_model(folder).logits(batches))
    assert not read
    host_of(monkeypatch, host)
    model = stream_model(folder)
    found = list(model.logits(batches))
    assert read and set(read.values()) <= {1, 2}
    assert all(parameter.is_meta for layer in model.skeleton.layers for parameter in layer.parameters())
    for logits, expected in zip(found, whole, strict=True):
        if exact:
            assert torch.equal(logits, expected)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "llama4_text"])
def test_a_model_has_the_logits_of_whole_layers(tmp_path, read, monkeypatch, family):
    check(monkeypatch, tiny_model(tmp_path / "model", family), read, copies=4 if family == "llama4_text" else 1)


def test_packed_experts_are_read_one_by_one(tmp_path, read, monkeypatch):
    check(monkeypatch, packed(tmp_path, "qwen3_moe") / "checkpoint", read, exact=False)


def bare(folder) -> None:
    """Give the tensors the names of a base model."""
    edit_tensors(folder, lambda own: [own.update({n.removeprefix("model."): own.pop(n)}) for n in [*own]])


@pytest.mark.parametrize(("family", "gram"), [("mixtral", False), ("deepseek_v3", True)])
def test_statistics_are_those_of_whole_layers_byte_for_byte(tmp_path, read, monkeypatch, family, gram):
    folder = tiny_model(tmp_path / "model", family)
    if family == "mixtral":
        bare(folder)
    (tmp_path / "text.txt").write_text(tiny_text())
    source = open_source(folder)
    topology = inspect(source, tmp_path / "model.json")
    host = int((peak_bytes(topology, 64, torch.float32, gram) + 4) / USABLE)
    together = int(HOST_SHARE * host / (2 * 64 * 64 * 4)) + 1  # by what a sequence holds that waits
    settings = CalibrationSettings(
        text={"files": [str(tmp_path / "text.txt")]},
        sequences=2 * together + 1,
        sequence_length=64,
        gram=gram,
        hidden_states_memory_gb=1e-8,
    )
    whole = calibrate(source, topology, settings, tmp_path / "whole/calibration.json")
    assert not read
    host_of(monkeypatch, host)
    by_expert = calibrate(source, topology, settings, tmp_path / "apart/calibration.json")
    assert by_expert.statistics_fingerprint == whole.statistics_fingerprint
    experts = {linear.name.rpartition(".")[0] for linear in topology.linears() if ".experts." in linear.name}
    assert len(read) == len(experts) and set(read.values()) == {3}


def test_an_expert_that_is_damaged_is_named(tmp_path, monkeypatch):
    folder = tiny_model(tmp_path / "model", "mixtral")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    edit_tensors(folder, lambda tensors: tensors[name].fill_(float("nan")))
    host_of(monkeypatch, too_small(folder))
    model = stream_model(folder)
    batches = [torch.arange(40)[None], torch.arange(40)[None] + 40]
    with pytest.raises(ArmorError, match=r"experts\.2\.w3.* holds NaN or infinity"):
        list(model.logits(batches))
