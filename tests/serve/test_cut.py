"""The parts of all ranks together compute what the whole linear does; what a cut would break is refused, with help."""

import re

import pytest
import torch
from torch.nn.functional import linear

from armor.core.errors import ArmorError
from armor.core.pattern import Pattern
from armor.format.checkpoint import PackedLinear
from armor.runtime.linear import ArmorLinear
from armor.serve.cut import MAX_RANKS, cut
from tests.linears import stored
from tests.runtime.test_linear import factorization


def multiply(part, tensors, x):
    """x (rows, columns of the part) by the part of the linear that `tensors` hold."""
    layer = ArmorLinear(part.packed)
    layer.load_state_dict({suffix: part.take(suffix, tensor) for suffix, tensor in tensors.items()})
    return layer(x)


def check_divided(factors, ranks):
    """The parts of all ranks, by outputs and by inputs, together give what the whole linear does."""
    tensors, layout, weight = factors.tensors(), PackedLinear.of(factors), ArmorLinear.of(factors).dense_weight()
    out, columns = weight.shape
    x = torch.randn(3, columns)
    rows = [(range(start, start + out // ranks),) for start in range(0, out, out // ranks)]
    parts = [multiply(cut("q", layout, some, range(columns), ranks), tensors, x) for some in rows]
    torch.testing.assert_close(torch.cat(parts, dim=1), linear(x, weight), rtol=1e-4, atol=1e-4)
    if layout.pattern.group(columns)[1] == columns:
        return  # a row without groups is not divided
    own = [range(start, start + columns // ranks) for start in range(0, columns, columns // ranks)]
    parts = [multiply(cut("o", layout, (range(out),), c, ranks), tensors, x[:, c.start : c.stop]) for c in own]
    torch.testing.assert_close(sum(parts), linear(x, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%"])
@pytest.mark.parametrize(("left", "right", "rank"), [(8, 8, 0), (4, None, 3), (None, 16, 0)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_channels_are_divided_over_ranks(pattern, left, right, rank, ranks):
    check_divided(factorization(pattern, 32, 64, left, right, rank), ranks)


@pytest.mark.parametrize(("core", "blocks"), [("int8", "int8"), ("int4", None), ("fp8", "int8")])
def test_integers_are_divided_with_their_scales(core, blocks):
    factors, _ = stored(64, 128, 16, 16, "2:4", core, blocks, 32, torch.float32)
    check_divided(factors, 2)
    with pytest.raises(ArmorError, match=r"8 ranks would cut a block of B, its pattern, mask or scales, 32 input"):
        cut("o", PackedLinear.of(factors), (range(64),), range(16), 8)


def test_several_ranges_of_one_linear_on_disk():
    """q, k and v in one, two heads of q and one of k and v on each of two ranks."""
    factors = factorization("2:4", 64, 32, 8, 8)
    tensors, layout, weight = factors.tensors(), PackedLinear.of(factors), factors.reconstruct()
    x = torch.randn(3, 32)
    part = cut("qkv", layout, (range(16, 32), range(40, 48), range(56, 64)), range(32), 2)
    rows = [*range(16, 32), *range(40, 48), *range(56, 64)]
    torch.testing.assert_close(multiply(part, tensors, x), linear(x, weight[rows]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
@pytest.mark.parametrize("divided", ["output", "input"])
@pytest.mark.parametrize("block", [None, 12, 24])
def test_sizes_that_a_refusal_names_do_and_no_others(pattern, divided, block):
    layout = PackedLinear(192, 192, Pattern.parse(pattern), block, block)

    def divide(ranks):
        some = range(192 // ranks)
        rows, columns = (some, range(192)) if divided == "output" else (range(192), some)
        return cut("layer.proj", layout, (rows,), columns, ranks)

    refusals, fitting = {}, []
    for ranks in (size for size in range(1, MAX_RANKS + 1) if 192 % size == 0):
        try:
            divide(ranks)
            fitting.append(ranks)
        except ArmorError as error:
            refusals[ranks] = str(error)
    assert fitting and (refusals or divided == "output")
    for ranks, message in refusals.items():
        assert message.startswith(f"layer.proj: {ranks} ranks would cut") and "\n" not in message
        named = re.search(r"parallel size of ([\d, ]+) \(", message)[1]
        assert [int(size) for size in named.split(", ")] == fitting
