"""The Triton kernels against the product in float64, at shapes that fit no tile.

On a CUDA device; or without one in Triton's interpreter, with TRITON_INTERPRET=1 set before Triton is imported, as
tests/runtime/test_cuda.py runs this file.
"""

import os
from functools import partial

import pytest
import torch

from armor.core.packing import unpack
from armor.runtime import cuda
from armor.runtime.operator import Operands
from tests import linears
from tests.linears import product_within, random_linear, stored

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
kernels = pytest.importorskip("armor.runtime.kernels", reason="needs Triton", exc_type=ImportError)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [  # out, in, left block, right block, pattern
    (24, 64, 8, 32, "2:4"),
    (12, 20, 4, 4, "2:4"),
    (7, 140, None, None, "2:4"),
    (26, 44, None, 22, "2:4"),
    (20, 580, 20, None, "2:4"),
    (18, 24, 9, 6, "3:4"),
    (22, 50, 11, 10, "1:2"),
    (12, 40, 3, 10, "7:8"),
]
INTEGERS = [  # and the type of the core, that of the blocks, and the columns that share a scale
    (24, 80, 8, 40, "2:4", "int8", "int8", 32),
    (36, 20, 36, 4, "2:4", "int4", "int8", 16),
    (26, 44, None, 22, "2:4", "int4", None, 44),
    (22, 50, 11, None, "1:2", "int4", "int8", 16),
    (18, 24, 9, 6, "3:4", "int8", "int8", 96),
    (24, 80, 8, 40, "2:4", "fp8", "int8", 32),
]
JOINED = [  # outs of linears with one input, and the rest as above, for floats and for integers
    ((24, 8, 16), 36, 8, 18, "2:4"),
    ((12, 20), 20, None, 4, "2:4"),
    ((22, 11), 50, 11, None, "1:2"),
    ((24, 12), 40, 12, 20, "2:4", "int8", "int8", 16),
    ((18, 9), 24, 9, 12, "2:4", "int4", "int8", 24),
    ((18, 9), 24, 9, 12, "2:4", "fp8", "int8", 24),
]


def one_config(monkeypatch, number):
    """Have each kernel run with the given one of its configurations, untuned."""
    for kernel in (kernels.blocks, kernels.core, kernels.product):
        monkeypatch.setattr(kernel, "configs", [kernel.configs[number % len(kernel.configs)]])


def ulps(dtype):
    """The interpreter cuts bfloat16 off where a card rounds."""
    return 2 if INTERPRETED and dtype == torch.bfloat16 else 1


def twin(x, *operands):
    return linears.twin(x, *operands, ulps=ulps(x.dtype))


@pytest.fixture
def whole_products(monkeypatch):
    """The interpreter of Triton 3.7 multiplies the bits of bfloat16 as if they were integers: here it converts them."""
    if INTERPRETED:
        from triton import language
        from triton.runtime.interpreter import InterpreterBuilder

        dot = InterpreterBuilder.create_dot

        def in_floats(builder, a, b, *others):
            types = (language.float32 if t.dtype.scalar == language.bfloat16 else t.dtype.scalar for t in (a, b))
            return dot(builder, *map(builder.cast_impl, (a, b), types), *others)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", in_floats)


def of_integers(shape, dtype):
    """The operands of a linear of `INTEGERS`, and its factors in floats."""
    if shape[5] == "fp8" and not INTERPRETED and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 on this card")
    factors, bias = stored(*shape, dtype)
    names = ("core_values", "core_mask", "left", "right", "core_scales", "left_scales", "right_scales")
    tensors, (_, group) = factors.to(DEVICE).tensors(), factors.pattern.group(shape[1])
    values, bits, left, right, *scales = map(tensors.get, names)
    bias = bias.to(DEVICE) if shape[0] % 4 else None
    return Operands(values, bits, left, right, bias, group, *scales, columns=shape[-1]), factors.to(DEVICE).in_floats()


def joined(shape, dtype, shares_right):
    """The operands of linears of `JOINED`, and of each the dense core and blocks in floats."""
    outs, *rest = shape
    if len(rest) > 4:
        operands, held = zip(*(of_integers((out, *rest), dtype) for out in outs), strict=True)
        factors = [(own.core, own.left, own.right) for own in held]
    else:
        operands = [Operands(*on_device(*random_linear(out, *rest, dtype, bias=True))) for out in outs]
        factors = [(unpack(own.values, own.bits, rest[0])[0], own.left, own.right) for own in operands]
    if shares_right:
        first, right = operands[0], factors[0][2]
        operands = [own._replace(right=first.right, right_scales=first.right_scales) for own in operands]
        factors = [(core, left, right) for core, left, _ in factors]
    return operands, factors


def cases(shapes):
    """Each of `shapes` in each dtype; of which the interpreter, for it is slow, gets one, in turn."""
    pairs = enumerate((shape, dtype) for shape in shapes for dtype in DTYPES)
    return [pytest.param(*pair, id=f"{pair}") for i, pair in pairs if not INTERPRETED or i // 3 % 3 == i % 3]


def some(rows, number, dtype):
    """All on a card. The interpreter is slow: for each shape, by its number, and dtype one of them, in turn."""
    return [rows[(len(DTYPES) * number + DTYPES.index(dtype)) % len(rows)]] if INTERPRETED else rows


def on_device(*operands):
    return [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in operands]


@pytest.mark.parametrize(("shape", "dtype"), cases(SHAPES))
def test_the_linear_is_its_twin_within_rounding(shape, dtype):
    operands = on_device(*random_linear(*shape, dtype, bias=shape[0] % 4 == 0))
    for rows in some([1, 2, 3, 4, 5, 6, 7, 8], SHAPES.index(shape), dtype):
        x = torch.randn(rows, shape[1], device=DEVICE).to(dtype)
        expected, bound = twin(x, *operands)
        with pytest.MonkeyPatch.context() as monkeypatch:
            one_config(monkeypatch, rows)
            y = cuda._run(x, *operands)
        assert y.dtype == dtype and ((y.double() - expected).abs() <= bound).all(), f"{rows} rows"


@pytest.mark.parametrize(("shape", "dtype"), cases(INTEGERS))
def test_a_linear_of_integers_is_its_twin_within_rounding(shape, dtype, whole_products):
    operands, factors = of_integers(shape, dtype)
    for rows in some([1, 70, 4, 9, 7, 17, 2], INTEGERS.index(shape), dtype):
        x = torch.randn(rows, shape[1], device=DEVICE).to(dtype)
        expected, bound = product_within(x, factors.core, factors.left, factors.right, operands.bias, ulps(dtype))
        with pytest.MonkeyPatch.context() as monkeypatch:
            one_config(monkeypatch, rows)
            y = cuda.multiply(x, operands)
        assert y.dtype == dtype and ((y.double() - expected).abs() <= bound).all(), f"{rows} rows"


@pytest.mark.parametrize("number", range(len(JOINED)))
def test_joined_linears_are_their_twins_side_by_side(number, whole_products):
    shape, dtype = JOINED[number], DTYPES[number % len(DTYPES)]
    for rows, shares_right in (([1, 3, 5, 2, 4, 8][number], number % 2 == 1), (9, number % 2 == 0)):
        operands, factors = joined(shape, dtype, shares_right)
        x = torch.randn(rows, shape[1], device=DEVICE).to(dtype)
        with pytest.MonkeyPatch.context() as monkeypatch:
            one_config(monkeypatch, rows)
            y = cuda.Joined(operands, shape[1])(x)
            apart = torch.cat([cuda.multiply(x, own) for own in operands], dim=1)
        assert y.dtype == dtype and y.shape == apart.shape
        if INTERPRETED:  # a compiler may sum in another order
            assert torch.equal(y, apart), f"{rows} rows"
        for own, parts, found in zip(operands, factors, y.split(shape[0], dim=1), strict=True):
            expected, bound = product_within(x, *parts, own.bias, ulps(dtype))
            slack = bound + (2.0**-12 * expected.abs().amax() if rows > 8 else 0)  # torch's products round inside
            assert ((found.double() - expected).abs() <= slack).all(), f"{rows} rows"


@pytest.mark.parametrize("number", range(len(kernels._CORE_CONFIGS)))
def test_every_configuration_covers_more_than_one_tile_and_step(number, monkeypatch):
    one_config(monkeypatch, number)
    for shape in ((20, 1160, 20, None, "2:4"), (4, 96, None, 96, "2:4")):
        operands = on_device(*random_linear(*shape, torch.float32))
        x = torch.randn(3, shape[1], device=DEVICE)
        expected, bound = twin(x, *operands)
        assert ((cuda._run(x, *operands).double() - expected).abs() <= bound).all()
    operands, factors = of_integers((132, 36, None, None, "2:4", "int8", None, 16), torch.float32)
    x = torch.randn(17, 36, device=DEVICE)
    expected, bound = product_within(x, factors.core, factors.left, factors.right, operands.bias)
    assert ((cuda.multiply(x, operands).double() - expected).abs() <= bound).all()


@pytest.mark.skipif(not INTERPRETED, reason="on a card the other tests tune")
def test_tuning_leaves_no_trace_in_the_result(monkeypatch):
    operands = on_device(*random_linear(12, 20, 6, 10, "2:4", torch.float32))
    calls = []

    def run_twice(call, quantiles, kernel):
        calls.extend(call() for _ in range(2))
        kernel.nargs["y"].fill_(torch.nan)
        return [float(len(calls))] * 3

    for kernel in (kernels.blocks, kernels.core):
        monkeypatch.setitem(kernel.__dict__, "do_bench", partial(run_twice, kernel=kernel))
        monkeypatch.setattr(kernel, "cache", {})
    x = torch.randn(2, 20)
    expected, bound = twin(x, *operands)
    for _ in range(2):  # tuned, then from the cache
        assert ((cuda._run(x, *operands).double() - expected).abs() <= bound).all()
    assert len(calls) == 2 * len(kernels._CORE_CONFIGS) + 2 * len(kernels._BLOCK_CONFIGS)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_unpack_is_exact(shape):
    values, bits, *_ = on_device(*random_linear(*shape, DTYPES[SHAPES.index(shape) % len(DTYPES)]))
    assert torch.equal(cuda.unpack(values, bits, shape[1]), unpack(values, bits, shape[1])[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dimensions_and_strides_and_not_a_number_stays_in_its_row(dtype, monkeypatch):
    one_config(monkeypatch, 1)
    operands = Operands(*on_device(*random_linear(40, 60, 20, 12, "2:4", dtype)))
    for x in (torch.randn(60), torch.randn(2, 3, 60), torch.randn(60, 5).T, torch.randn(0, 60)):
        x = x.to(DEVICE, dtype)
        y, (expected, bound) = cuda.multiply(x, operands), twin(x, *operands[:6])
        assert y.shape == expected.shape and ((y.double() - expected).abs() <= bound).all()
    x = torch.zeros(3, 60, dtype=dtype, device=DEVICE)
    x[1] = torch.nan
    y = cuda.multiply(x, operands)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


@pytest.mark.parametrize(("name", "index"), [("mask", 1), ("left", 2), ("right", 3), ("bias", 4)])
def test_shapes_that_do_not_fit_are_refused(name, index):
    operands = on_device(*random_linear(64, 128, 32, 64, "2:4", torch.bfloat16))
    operands[index] = operands[index][:-1]
    with pytest.raises(ValueError, match=name):
        cuda._run(torch.randn(3, 128, device=DEVICE).bfloat16(), *operands)
