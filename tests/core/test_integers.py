"""q·s: small integers, or floats of a byte, with a scale for each group of a row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armor.core.integers import DTYPES, expand_scales, pack_int4, round_, rounded, unpack_int4
from armor.core.quantization import LIMITS, groups_of

SIZES = st.integers(1, 40)


@settings(max_examples=30, deadline=None)
@given(SIZES, SIZES, st.integers(0, 2**31))
def test_int4_comes_back_from_its_bytes(rows, columns, seed):
    values = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_int4(values)
    assert packed.shape == (rows, -(-columns // 2)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_int4(packed, columns), values)


@pytest.mark.parametrize("kind", LIMITS)
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), SIZES, st.integers(1, 50), st.integers(-30, 30), st.integers(0, 2**31))
def test_the_error_is_at_most_that_of_the_scale_that_holds_all(kind, rows, columns, group, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * 2.0**exponent
    values[:, ::5] = 0
    weights = torch.rand(columns, generator=generator) + 0.1
    numbers, scales = rounded(values, kind, group, weights)
    assert numbers.dtype == DTYPES[kind] and scales.dtype == torch.bfloat16
    numbers = numbers.float()
    assert scales.shape == (rows, groups_of(columns, group))
    least, most = LIMITS[kind]
    assert numbers.min() >= least and numbers.max() <= most
    spread = expand_scales(scales, group, columns)
    exact = numbers.double() * spread.double()
    assert torch.equal(exact, (numbers * spread.float()).double())  # q·s is a float32
    for start in range(0, columns, group):
        own = values[:, start : start + group].double()
        plain = (own.abs().amax(1, keepdim=True) / most).to(torch.bfloat16).double()
        nearest = round_((own / plain.clamp_min(1e-300)).float(), kind).double() * plain
        h = weights[start : start + group]
        error = (h * (own - exact[:, start : start + group]).square()).sum(1)
        assert (error <= (h * (own - nearest).square()).sum(1) * (1 + 1e-4) + 1e-300).all()


@pytest.mark.parametrize("kind", LIMITS)
def test_zeros_stay_zeros_and_what_lies_on_a_grid_is_kept(kind):
    zeros, scales = rounded(torch.zeros(3, 10), kind, 4)
    assert not zeros.float().any() and not scales.any()
    least, most = LIMITS[kind]
    grid = torch.tensor([[most, least, 1, -3, 0, 2.0]])
    numbers, scales = rounded(grid * 0.25, kind, 6)
    assert torch.equal(numbers.float(), grid) and scales.tolist() == [[0.25]]


def test_every_byte_of_fp8_is_the_number_of_its_bits_and_every_float_goes_to_the_nearest():
    numbers = [b for b in range(256) if b & 127 != 127]  # which is NaN
    bits = torch.tensor(numbers, dtype=torch.uint8)
    sizes = [(b & 7) / 512 if b & 120 == 0 else (1 + (b & 7) / 8) * 2.0 ** ((b >> 3 & 15) - 7) for b in numbers]
    exact = torch.tensor([-size if b > 127 else size for b, size in zip(numbers, sizes, strict=True)])
    assert torch.equal(bits.view(DTYPES["fp8"]).float(), exact)
    grid = exact.double().unique()
    values = torch.cat([torch.randn(2000) * 10.0 ** torch.randint(-4, 4, (2000,)), torch.tensor([3e38, -torch.inf])])
    found = round_(values.clone(), "fp8").double()
    wanted = values.double().clamp(-448, 448)
    assert torch.isin(found, grid).all()
    assert torch.equal((found - wanted).abs(), (wanted[:, None] - grid).abs().amin(1))
