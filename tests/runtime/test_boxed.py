"""The kernel as torch's dispatcher calls it: the bits that the other ways give, and one line for what does not fit."""

import gc
import weakref

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
    gc.collect()
    bare = [own._replace(bias=None) for own in group]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in ((COLUMNS,), (1, COLUMNS), (2, 3, COLUMNS), (0, COLUMNS), (3, 0, COLUMNS), (1, 300, 1, COLUMNS)):
            x = torch.randn(shape).to(dtype)
            for with_bias, own in ((True, group), (False, bare)):
                y = boxed.linears(x, table, with_bias, OUT)
                expected = torch.cat([cpu.multiply(x, one) for one in own], dim=-1)
                assert y.is_contiguous() and torch.equal(y, expected), shape
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_refused_in_one_line():
    fits, group = torch.ones(2, COLUMNS).bfloat16(), linears(torch.bfloat16)
    table = boxed.table(group, COLUMNS, torch.bfloat16)
    for x, given, out, line in (
        (fits.float(), table, OUT, "x is not what the linears were made for"),
        (torch.ones(2, 2 * COLUMNS).bfloat16()[:, ::2], table, OUT, "x is not contiguous"),
        (fits, table, OUT - 1, "the linears do not have so many outputs together"),
        (fits, table[8:], OUT, "this is no table of linears"),
    ):
        with pytest.raises(RuntimeError, match=f"armor::cpu_linears: {line}"):
            boxed.linears(x, given, True, out)
    with pytest.raises(ValueError, match="9 linears with one input, expected at most 8"):
        boxed.table([group[1]] * 9, COLUMNS, torch.bfloat16)


def test_a_table_keeps_the_memory_of_its_linears_but_no_reference_is_left_behind():
    group = linears(torch.bfloat16)
    x = torch.randn(4, COLUMNS).bfloat16()
    expected = torch.cat([cpu.multiply(x, one) for one in group], dim=-1)
    table = boxed.table(group, COLUMNS, torch.bfloat16)
    held = weakref.ref(group[1].values.untyped_storage())
    del group
    gc.collect()
    filled = [torch.full((n,), torch.nan) for n in range(1, 20000, 100)]  # what was given back would be among these
    for given in (x, x.float()):
        try:
            y = boxed.linears(given, table, True, OUT)
            assert y._use_count() == 1 and torch.equal(y, expected) and filled
        except RuntimeError:
            assert given is not x
    assert x._use_count() == 1 and table._use_count() == 1
    del table
    gc.collect()
    assert held() is None
