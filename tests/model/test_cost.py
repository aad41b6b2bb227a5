"""The cost of the blocks, told beforehand, is what the packed tensors take."""

import pytest
import torch

from armor.core.pattern import Pattern
from armor.format.checkpoint import PackedLinear
from armor.model.cost import block_costs
from tests.records import linear, topology_record


@pytest.mark.parametrize("pattern, left, right", [("2:4", 8, 16), ("4:8", None, 8), ("50%", 5, None)])
def test_bits_per_weight_are_those_of_the_tensors(pattern, left, right):
    layout = PackedLinear(40, 48, Pattern.parse(pattern), left, right)
    size = {"core_mask": 1}  # bytes of an entry, where they are not two
    total = sum(size.get(name, 2) * torch.empty(shape).numel() for name, shape in layout.shapes().items())
    assert layout.bits_per_weight(16) == 8 * total / (40 * 48)


def test_a_linear_that_would_grow_is_named():
    shapes = (("self_attn.k_proj", 256, 2048), ("mlp.up_proj", 5632, 2048), ("odd", 4, 6))
    lines = list(block_costs(topology_record(1, tuple(linear(*shape) for shape in shapes))))
    assert lines == [
        "self_attn.k_proj 256 x 2048: 16 bits/weight dense, 2:4 with block 32: 11.25, block 64: 13.50, block 128: 18.00"
        " (block 128: larger than dense)",
        "mlp.up_proj 5632 x 2048: 16 bits/weight dense, 2:4 with block 32: 9.34, block 64: 9.68, block 128: 10.36",
        "odd 4 x 6: 16 bits/weight dense, 2:4 does not fit",
    ]
