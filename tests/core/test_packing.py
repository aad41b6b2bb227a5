import pytest
import torch

from armor.core.packing import pack, pack_mask, unpack, unpack_mask
from armor.core.pattern import Pattern, top_n_mask


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%"])
@pytest.mark.parametrize(("rows", "columns"), [(5, 24), (3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpack_of_pack_is_the_core(pattern, rows, columns, dtype):
    mask = top_n_mask(torch.rand(rows, columns), Pattern.parse(pattern))
    core = torch.randn(rows, columns).to(dtype) * mask
    core[0] = 0  # a kept position may hold a zero
    values, bits = pack(core, mask)
    assert values.shape == (rows, int(mask[0].sum())) and bits.shape == (rows, (columns + 7) // 8)
    again, again_mask = unpack(values, bits, columns)
    assert torch.equal(again, core) and torch.equal(again_mask, mask)


def test_bit_order_is_least_significant_first():
    mask = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0]]).bool()
    assert pack_mask(mask).tolist() == [[0b10000001, 0b00000010]]


def test_columns_that_do_not_fill_a_byte():
    mask = top_n_mask(torch.rand(4, 12), Pattern(2, 4))
    bits = pack_mask(mask)
    assert bits.shape == (4, 2) and torch.equal(unpack_mask(bits, 12), mask)
    assert (bits[:, 1] >> 4 == 0).all()
