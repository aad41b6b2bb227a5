"""q·s: small integers with a scale for each group of a row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armor.core.integers import expand_scales, pack_int4, rounded, unpack_int4
from armor.core.quantization import LIMITS, groups_of

SIZES = st.integers(1, 40)


@settings(max_examples=30, deadline=None)
@given(SIZES, SIZES, st.integers(0, 2**31))
def test_int4_comes_back_from_its_bytes(rows, columns, seed):
    values = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_int4(values)
    assert packed.shape == (rows, -(-columns // 2)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_int4(packed, columns), values)


def test_the_first_of_two_int4_is_in_the_low_half():
    assert pack_int4(torch.tensor([[1, -1, -8]], dtype=torch.int8)).tolist() == [[0xF1, 0x08]]


@pytest.mark.parametrize("kind", LIMITS)
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), SIZES, st.integers(1, 50), st.integers(-30, 30), st.integers(0, 2**31))
def test_the_error_is_at_most_that_of_the_scale_that_holds_all(kind, rows, columns, group, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * 2.0**exponent
    values[:, ::5] = 0
    weights = torch.rand(columns, generator=generator) + 0.1
    numbers, scales = rounded(values, kind, group, weights)
    assert numbers.dtype == torch.int8 and scales.dtype == torch.bfloat16
    assert scales.shape == (rows, groups_of(columns, group))
    least, most = LIMITS[kind]
    assert int(numbers.min()) >= least and int(numbers.max()) <= most
    spread = expand_scales(scales, group, columns)
    exact = numbers.double() * spread.double()
    assert torch.equal(exact, (numbers * spread.float()).double())  # q·s is a float32
    for start in range(0, columns, group):
        own = values[:, start : start + group].double()
        plain = (own.abs().amax(1, keepdim=True) / most).to(torch.bfloat16).double()
        nearest = (own / plain.clamp_min(1e-300)).round().clamp(least, most) * plain
        h = weights[start : start + group]
        error = (h * (own - exact[:, start : start + group]).square()).sum(1)
        assert (error <= (h * (own - nearest).square()).sum(1) * (1 + 1e-4) + 1e-300).all()


@pytest.mark.parametrize("kind", LIMITS)
def test_zeros_stay_zeros_and_what_lies_on_a_grid_is_kept(kind):
    zeros, scales = rounded(torch.zeros(3, 10), kind, 4)
    assert not zeros.any() and not scales.any()
    least, most = LIMITS[kind]
    grid = torch.tensor([[most, least, 1, -3, 0, 2]], dtype=torch.int8)
    numbers, scales = rounded(grid * 0.25, kind, 6)
    assert torch.equal(numbers, grid) and scales.tolist() == [[0.25]]
