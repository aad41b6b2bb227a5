"""Topology: what inspect wrote is what is read."""

from __future__ import annotations

import json

import pytest

from armor.core.errors import ArmorError
from armor.format.records.topology import DecoderLayer, Linear, Topology


def topology() -> Topology:
    def linear(name: str, group: int) -> Linear:
        return Linear(
            name=f"model.layers.0.{name}",
            out_features=8,
            in_features=4,
            dtype="bfloat16",
            bias=False,
            shard="model.safetensors",
            input_group=group,
        )

    layer = DecoderLayer(
        index=0,
        prefix="model.layers.0",
        linears=(linear("q", 0), linear("o", 1), linear("k", 0)),
        dense_parameters=("model.layers.0.m",),
    )
    return Topology(
        model_type="llama",
        fingerprint="f" * 64,
        dtype="bfloat16",
        context_length=128,
        hidden_size=4,
        parameters=1000,
        linear_parameters=96,
        decoder_parameters=128,
        tied_embeddings=True,
        layers=(layer,),
    )


def test_what_was_written_is_read(tmp_path):
    topology().write(tmp_path / "model.json")
    assert Topology.read(tmp_path / "model.json") == topology()


def test_what_is_kept_dense_is_not_of_the_compressed_share():
    assert topology().compressed_share() == 96 / 128
    assert topology().compressed_share(["model.layers.0.q", "model.layers.0.m"]) == 64 / 128


def test_groups_keep_the_order_of_the_linears():
    groups = topology().layers[0].groups()
    assert [[linear.name[-1] for linear in group] for group in groups] == [["q", "k"], ["o"]]


@pytest.mark.parametrize("change", [{"format_version": 9}, {"format_version": True}, {"colour": 1}, {"layers": [{}]}])
def test_another_format_is_refused(tmp_path, change):
    (tmp_path / "model.json").write_text(json.dumps(topology().as_json() | change))
    with pytest.raises(ArmorError, match="run armor inspect again"):
        Topology.read(tmp_path / "model.json")
