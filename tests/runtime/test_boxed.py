"""The kernel as torch's dispatcher calls it: the bits that the other ways give, and one line for what does not fit."""

import gc

import pytest
import torch

from armor.runtime import boxed, cpu
from armor.runtime.linear import ArmorLinear
from armor.runtime.operator import Operands
from tests.linears import random_linear, stored

pytestmark = pytest.mark.skipif(not boxed.available(), reason="the CPU kernel was not built, or torch is before 2.10")
COLUMNS = 256
OUT = 64 + 40 + 33


def linears(dtype):
    """Of int8, of floats that share no B, and without any blocks nor a bias; together OUT rows."""
    factors, bias = stored(64, COLUMNS, 16, 32, "2:4", "int8", "int8", 64, dtype)
    integers = ArmorLinear.of(factors, bias)._operands(torch.ones(1, COLUMNS, dtype=dtype))
    floats = Operands(*random_linear(40, COLUMNS, 8, 64, "2:4", dtype))
    return [integers, floats, Operands(*random_linear(33, COLUMNS, None, None, "2:4", dtype, bias=False))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("threads", [1, 3])
def test_it_gives_the_bits_of_each_linear_alone(dtype, threads):
    group = linears(dtype)
    table = boxed.table(group, COLUMNS, dtype)
    gc.collect()  # the table keeps what its addresses mean, but for the operands
    bare = [own._replace(bias=None) for own in group]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in ((COLUMNS,), (1, COLUMNS), (2, 3, COLUMNS), (0, COLUMNS), (1, 300, 1, COLUMNS)):
            x = torch.randn(shape).to(dtype)
            for with_bias, own in ((True, group), (False, bare)):
                y = boxed.ready(x, table, with_bias, OUT)
                expected = torch.cat([cpu.multiply(x, one) for one in own], dim=-1)
                assert y.is_contiguous() and torch.equal(y, expected), shape
    finally:
        torch.set_num_threads(before)


def test_a_compiled_model_calls_it_with_any_number_of_rows():
    group = linears(torch.bfloat16)
    table = boxed.table(group, COLUMNS, torch.bfloat16)

    @torch.compile(backend="aot_eager", dynamic=True, fullgraph=True)
    def compiled(x):
        return boxed.ready(2 * x, table, True, OUT).relu()

    for rows in (3, 5, 40):
        x = torch.randn(rows, COLUMNS).bfloat16()
        assert torch.equal(compiled(x), boxed.ready(2 * x, table, True, OUT).relu())


@pytest.mark.parametrize(
    ("x", "line"),
    [
        (torch.ones(2, COLUMNS - 1).bfloat16(), "x is not what the linears were made ready for"),
        (torch.ones(2, COLUMNS), "x is not what the linears were made ready for"),
        (torch.tensor(1.0).bfloat16(), "x is not what the linears were made ready for"),
        (torch.ones(2, 2 * COLUMNS).bfloat16()[:, ::2], "x is not contiguous"),
        (torch.ones(COLUMNS, 2).bfloat16().t(), "x is not contiguous"),
    ],
    ids=["columns", "dtype", "no dimension", "every other", "turned"],
)
def test_what_does_not_fit_is_refused_in_one_line(x, line):
    table = boxed.table(linears(torch.bfloat16), COLUMNS, torch.bfloat16)
    with pytest.raises(RuntimeError, match=f"armor::ready: {line}"):
        boxed.ready(x, table, True, OUT)


def test_another_table_and_another_width_are_refused():
    table, x = boxed.table(linears(torch.bfloat16), COLUMNS, torch.bfloat16), torch.ones(2, COLUMNS).bfloat16()
    for given, out, line in (
        (table, OUT - 1, "the linears do not have so many outputs together"),
        (table[8:], OUT, "this is no table of linears"),
        (table[None], OUT, "this is no table of linears"),
    ):
        with pytest.raises(RuntimeError, match=f"armor::ready: {line}"):
            boxed.ready(x, given, True, out)


def test_no_reference_is_left_behind():
    """Neither by a call nor by one that is refused: memory is given back."""
    table = boxed.table(linears(torch.bfloat16), COLUMNS, torch.bfloat16)
    x = torch.ones(4, COLUMNS).bfloat16()
    for given in (x, x.float()):
        try:
            y = boxed.ready(given, table, True, OUT)
            assert y._use_count() == 1
        except RuntimeError:
            pass
    assert x._use_count() == 1 and table._use_count() == 1
