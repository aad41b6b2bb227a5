"""Topology: which linears share an input, and how much of a model is compressed."""

from armor.format.records.topology import DecoderLayer
from tests.records import linear, topology_record

LINEARS = (linear("q", 8, 4, 0), linear("o", 8, 4, 1), linear("k", 8, 4, 0))
LAYER = DecoderLayer(index=0, prefix="model.layers.0", linears=LINEARS, dense_parameters=("model.layers.0.m",))


def test_what_is_kept_dense_is_not_of_the_compressed_share():
    topology = topology_record(linear_parameters=96, decoder_parameters=128).replace(layers=(LAYER,))
    assert topology.compressed_share() == 96 / 128
    assert topology.compressed_share(["model.layers.0.q", "model.layers.0.m"]) == 64 / 128


def test_groups_keep_the_order_of_the_linears():
    assert [[linear.name[-1] for linear in group] for group in LAYER.groups()] == [["q", "k"], ["o"]]
