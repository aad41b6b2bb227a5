"""Packed linears of any shape, and their product in float64 with the error that a kernel may make."""

import torch

from armor.core import blockdiag
from armor.core.factorization import Factorization
from armor.core.integers import rounded
from armor.core.packing import pack, unpack
from armor.core.pattern import Pattern, top_n_mask
from armor.core.quantization import Quantization


def random_linear(out, columns, left, right, pattern, dtype, bias=True):
    """The operands of `linear` beside x: values, bits, left, right, bias, group."""
    generator = torch.Generator().manual_seed(out * columns)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    pattern = Pattern.parse(pattern)
    core = random(out, columns) / columns**0.5
    values, bits = pack(core.to(dtype), top_n_mask(random(out, columns), pattern))
    blocks = [
        None if d is None else (random(n // d, d, d) / d**0.5).to(dtype) for n, d in ((out, left), (columns, right))
    ]
    return values, bits, *blocks, random(out).to(dtype) if bias else None, pattern.group(columns)[1]


def stored(out, columns, left, right, pattern, core, blocks, group, dtype):
    """Random factors of integers, their scales and floats in `dtype`, and a bias."""
    generator = torch.Generator().manual_seed(out * columns)
    mask = top_n_mask(torch.randn(out, columns, generator=generator), Pattern.parse(pattern))
    values, scales = rounded(torch.randn(out, columns, generator=generator) / columns**0.5 * mask, core, group)
    sides = {}
    for side, size, n in (("left", left, out), ("right", right, columns)):
        if size is None:
            continue
        made = torch.randn(n // size, size, size, generator=generator) / size**0.5
        if blocks:
            numbers, own = rounded(made.view(n, size), "int8", size)
            sides |= {side: numbers.view(made.shape), f"{side}_scales": own.view(-1).to(dtype)}
        else:
            sides[side] = made.to(dtype)
    kind = Quantization(core, blocks, group)
    found = Factorization(
        values, mask, Pattern.parse(pattern), quantization=kind, core_scales=scales.to(dtype), **sides
    )
    return found, torch.randn(out, generator=generator).to(dtype)


def twin(x, values, bits, left, right, bias, group, ulps=1):
    """The product in float64, and how far one in x's dtype with float32 sums may be from it, element by element.

    Each result is rounded by at most so many `ulps`, 2 where it is cut off.
    """
    core = unpack(values, bits, x.shape[-1])[0]
    return product_within(x, core, left, right, bias, ulps)


def product_within(x, core, left, right, bias, ulps=1):
    """The same of a dense core."""
    core = core.double()
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2.0**-24}[x.dtype] * ulps
    summing = 2.0**-23 * (x.shape[-1] + sum(b.shape[-1] for b in (left, right) if b is not None))
    y, size, error = x.double(), x.double().abs(), torch.zeros_like(x, dtype=torch.float64)
    for matrix in (right, core, left):
        if matrix is None:
            continue
        times = (lambda v, m: v @ m.T) if matrix is core else (lambda v, m: blockdiag.multiply(m.double(), v))
        y, size, error = times(y, matrix), times(size, matrix.abs()), times(error, matrix.abs())
        error = error + rounding * (y.abs() + error)
    if bias is not None:
        y, error = y + bias.double(), error + 2 * rounding * (y + bias.double()).abs() + rounding * bias.double().abs()
    return y, error + summing * size
