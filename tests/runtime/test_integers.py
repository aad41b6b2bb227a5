"""The CPU kernel on int8, int4 and fp8, every level against the product of the stored numbers in float64."""

import copy
import re

import pytest
import torch

from armor.core.factorization import Factorization
from armor.core.pattern import Pattern
from armor.core.quantization import Quantization
from armor.runtime import cpu
from armor.runtime.linear import ArmorLinear
from armor.runtime.operator import Operands
from tests.linears import product_within, random_linear, stored, twin
from tests.memory import NoRoom

needs_library = pytest.mark.skipif(not cpu.available(), reason="the CPU kernel was not built")
LEVELS = [pytest.param(i, id=name) for i, name in enumerate(cpu.LEVELS[: cpu.LEVELS.index(cpu.level()) + 1])]
DTYPES = [torch.bfloat16, torch.float32]
SHAPES = [  # out, in, left block, right block, pattern, core, blocks, group
    (64, 256, 32, 64, "2:4", "int8", "int8", 128),
    (36, 100, 4, 20, "2:4", "int4", "int8", 32),
    (70, 1156, None, None, "2:4", "int8", None, 512),
    (40, 96, 8, 16, "4:8", "int4", "int8", 64),
    (30, 72, 5, 9, "1:3", "int8", "int8", 96),
    (33, 100, 11, 20, "50%", "int8", "int8", 100),
    (64, 256, 32, 64, "2:4", "fp8", "int8", 128),
    (36, 100, 4, 20, "2:4", "fp8", None, 32),
]


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_the_linear_is_its_twin_within_rounding(shape, dtype, level):
    factors, bias = stored(*shape, dtype)
    linear = ArmorLinear.of(factors, bias)
    for rows in (1, 3, 8, 9, 17, 33):
        x = torch.randn(rows, shape[1]).to(dtype)
        y = cpu.multiply(x, linear._operands(x), level)
        exact = factors.in_floats()
        expected, bound = product_within(x, exact.core, exact.left, exact.right, bias)
        assert y.dtype == dtype and ((y.double() - expected).abs() <= bound).all(), f"{rows} rows"


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_linear_runs_in_the_kernel_and_gradients_reach_its_input(dtype):
    factors, bias = stored(*SHAPES[0], dtype)
    linear = ArmorLinear.of(factors, bias)
    assert linear.runs_packed
    x = torch.randn(3, 256).to(dtype).requires_grad_()
    y = linear(x)
    y.sum().backward()
    expected = factors.reconstruct().sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad.float(), expected, rtol=0.02, atol=0.02)
    with torch.no_grad():
        assert torch.equal(linear(x), y)
    unpacked = ArmorLinear.of(factors, bias).unpack()
    torch.testing.assert_close(unpacked(x).float(), y.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_that_keeps_every_weight_is_multiplied_as_it_is_by_torchs_kernel(dtype):
    factors, bias = stored(48, 96, None, None, "1:1", "int8", None, 96, dtype)
    linear = ArmorLinear.of(factors, bias)
    assert linear.runs_packed
    exact = factors.in_floats()
    for rows in (1, 5, 300):
        x = torch.randn(rows, 2, 96).to(dtype)
        with torch.no_grad():
            y = linear(x)
        expected = x.double() @ exact.core.double().T + bias.double()
        assert y.shape == (rows, 2, 48) and y.dtype == dtype
        assert (y.double() - expected).abs().max() <= 6 * torch.finfo(dtype).eps * expected.abs().max()
        with torch.no_grad(), NoRoom(lambda _, tensor: tensor.numel() == 48 * 96 and tensor.is_floating_point()):
            if rows < 300:  # it makes no weight of floats
                linear(x)
    # With a number of columns that is no multiple of 16 the kernel reads beyond the weight, which may end the process.
    assert not ArmorLinear.of(*stored(48, 100, None, None, "1:1", "int8", None, 100, dtype)).runs_packed


@pytest.mark.parametrize("group", [4, 48, 528])
def test_groups_that_the_kernel_does_not_cut_go_through_torch(group):
    factors, bias = stored(16, 1056, None, None, "2:4", "int8", None, group, torch.float32)
    x = torch.randn(2, 1056)
    expected = x @ factors.reconstruct().T + bias
    torch.testing.assert_close(ArmorLinear.of(factors, bias)(x), expected, rtol=1e-4, atol=1e-4)


def operands(linear, dtype):
    """What the kernel takes of it."""
    return linear._operands(torch.ones(1, linear.in_features, dtype=dtype))


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_and_integers_in_one_call_give_the_bits_of_separate_calls(dtype, level):
    """With B shared, of its own and absent."""
    kinds = [("int8", "int8"), ("fp8", "int8"), ("int8", None), ("int4", "int8")]
    sizes = [(64, 16, 32), (40, 8, 32), (36, 4, None), (44, None, 64)]
    made = [
        operands(ArmorLinear.of(*stored(out, 256, left, right, "2:4", *kind, 64, dtype)), dtype)
        for kind, (out, left, right) in zip(kinds, sizes, strict=True)
    ]
    made[1] = made[1]._replace(right=made[0].right, right_scales=made[0].right_scales)
    group = [*made, Operands(*random_linear(33, 256, 11, None, "2:4", dtype))]
    for rows in (1, 3, 17, 300):
        x = torch.randn(rows, 256).to(dtype)
        expected = [cpu.multiply(x, own, level) for own in group]
        assert all(map(torch.equal, cpu.Table(group, 256).apart(x, level), expected)), rows


@needs_library
@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("core_scales", lambda t: t[:, :-1], "scales (64, 1) do not fit 64 rows of 256 columns in groups of 128"),
        ("left_scales", lambda t: t[:-1], "left_scales (63,) do not fit"),
        ("right_scales", lambda t: None, "right_scales None do not fit"),
        ("left", torch.Tensor.bfloat16, "left_scales (64,) do not fit"),
    ],
)
def test_scales_that_do_not_fit_are_refused(name, change, said):
    factors, bias = stored(*SHAPES[0], torch.bfloat16)
    own = operands(ArmorLinear.of(factors, bias), torch.bfloat16)
    with pytest.raises(ValueError, match=re.escape(said)):
        cpu.multiply(torch.ones(1, 256).bfloat16(), own._replace(**{name: change(getattr(own, name))}))


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_fp8_is_multiplied_as_what_it_is(dtype, level):
    bits = torch.tensor([b for b in range(256) if b & 127 != 127] + [0, 0], dtype=torch.uint8)
    mask = torch.tensor([True, False, False, True]).repeat(128).expand(1, -1)
    core = torch.zeros(1, 512, dtype=torch.uint8).masked_scatter(mask, bits).view(torch.float8_e4m3fn)
    scales = torch.ones(1, 1, dtype=dtype)
    kind = Quantization("fp8", None, 512)
    linear = ArmorLinear.of(Factorization(core, mask, Pattern(2, 4), quantization=kind, core_scales=scales))
    for rows in (512, 2):  # which take the two ways of the kernel
        x = torch.eye(512, dtype=dtype)[:rows]
        assert torch.equal(cpu.multiply(x, linear._operands(x), level).float(), core.float().T[:rows])


def test_fp8_moves_and_is_never_cast():
    factors, bias = stored(*SHAPES[6], torch.float32)
    linear = ArmorLinear.of(factors, bias)
    before = linear.core_values.view(torch.uint8).clone()
    others = [copy.deepcopy(linear) for _ in range(3)]
    for moved in (others[0].bfloat16(), others[1].type(torch.bfloat16), others[2].to("meta", torch.bfloat16)):
        assert moved.core_values.dtype == torch.float8_e4m3fn and moved.core_values.shape == before.shape
        assert moved.core_scales.dtype == torch.bfloat16
        assert moved.core_values.is_meta or torch.equal(moved.core_values.view(torch.uint8), before)
    unpacked = linear.unpack().half()
    assert unpacked.core.dtype == torch.float8_e4m3fn and unpacked.left_scales.dtype == torch.float16
    assert torch.equal(unpacked.pack().core_values.view(torch.uint8), before)


@needs_library
@pytest.mark.parametrize("has_tiles", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_and_integers_side_by_side_are_what_each_gives_alone(monkeypatch, dtype, has_tiles):
    """Bit for bit in the C loops. Where torch multiplies the floats, they are near their twin."""
    monkeypatch.setattr(cpu, "_has_tiles", has_tiles)
    factors, bias = stored(*SHAPES[0], dtype)
    floats = random_linear(33, 256, 11, None, "2:4", dtype)
    group = [operands(ArmorLinear.of(factors, bias), dtype), Operands(*floats)]
    joined = cpu.Joined(group, 256)
    for rows in (1, 31, 300):
        x = torch.randn(rows, 256).to(dtype)
        expected, bound = twin(x, *floats)
        integers, own = joined(x).split([64, 33], dim=-1)
        assert torch.equal(integers, cpu.multiply(x, group[0])), rows
        assert not cpu.runs_in_c(x) or torch.equal(own, cpu.multiply(x, group[1])), rows
        assert ((own.double() - expected).abs() <= bound).all(), rows
