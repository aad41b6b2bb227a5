import pytest
import torch

from armor.core.blockdiag import expand, multiply
from armor.core.blocksizes import block_size_for


@pytest.mark.parametrize(("count", "size"), [(3, 4), (1, 7)])
@pytest.mark.parametrize("lead", [(), (2, 5)])
def test_multiply_is_the_dense_product(count, size, lead):
    blocks = torch.randn(count, size, size, dtype=torch.float64)
    x = torch.randn(*lead, count * size, dtype=torch.float64)
    torch.testing.assert_close(multiply(blocks, x), x @ expand(blocks).T)


@pytest.mark.parametrize(
    ("dimension", "requested", "multiple", "found"),
    [(576, 128, 4, 96), (4096, 128, 4, 128), (7, 4, 1, 1), (6, 128, 1, 6), (10, 128, 4, None)],
)
def test_block_size_is_the_largest_usable_divisor(dimension, requested, multiple, found):
    assert block_size_for(dimension, requested, multiple) == found
