"""The cost of the blocks, told beforehand, is what the packed tensors take."""

import torch

from armor.core.pattern import Pattern
from armor.format.checkpoint import PackedLinear
from armor.model.cost import block_costs
from tests.records import linear, topology_record


def test_bits_per_weight_are_those_of_the_tensors():
    layout = PackedLinear(40, 48, Pattern(2, 4), 8, 16)
    size = {"core_mask": 1}  # bytes of an entry, where they are not two
    total = sum(size.get(name, 2) * torch.empty(shape).numel() for name, shape in layout.shapes().items())
    assert layout.bits_per_weight(16) == 8 * total / (40 * 48)


def test_a_linear_that_would_grow_is_named():
    (line,) = block_costs(topology_record(1, (linear("self_attn.k_proj", 256, 2048),)))
    assert line.startswith("self_attn.k_proj 256 x 2048") and line.endswith("(block 128: larger than dense)")
