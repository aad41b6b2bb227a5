"""Topology: what inspect wrote is what is read."""

from __future__ import annotations

import json

import pytest

from armor.core.errors import ArmorError
from armor.format.records.topology import DecoderLayer, Linear, Topology


def topology() -> Topology:
    def linear(name: str, group: int) -> Linear:
        return Linear(f"model.layers.0.{name}", 8, 4, "bfloat16", False, "model.safetensors", group)

    layer = DecoderLayer(0, "model.layers.0", (linear("q", 0), linear("o", 1), linear("k", 0)), ("model.layers.0.m",))
    return Topology("llama", "f" * 64, "bfloat16", 128, 4, 1000, 96, True, (layer,))


def test_what_was_written_is_read(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(topology().to_json()))
    assert Topology.read(tmp_path / "model.json") == topology()


def test_groups_keep_the_order_of_the_linears():
    groups = topology().layers[0].groups()
    assert [[linear.name[-1] for linear in group] for group in groups] == [["q", "k"], ["o"]]


@pytest.mark.parametrize("change", [{"format_version": 2}, {"format_version": True}, {"colour": 1}, {"layers": [{}]}])
def test_another_format_is_refused(tmp_path, change):
    (tmp_path / "model.json").write_text(json.dumps(topology().to_json() | change))
    with pytest.raises(ArmorError, match="run armor inspect again"):
        Topology.read(tmp_path / "model.json")
