"""y = A (S (B x)) + b with the tensors of a packed linear, by the kernel of x's device or through dense products.

Integers are then multiplied out first, in float32, and rounded once to the dtype of their scales.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from armor.core import blockdiag
from armor.core.factorization import Factorization
from armor.core.packing import unpack
from armor.format.checkpoint import PackedLinear
from armor.runtime import cpu, cuda, integers
from armor.runtime.operator import Operands

__all__ = ["gathered", "multiply", "supports", "through"]


def gathered(
    layout: PackedLinear,
    values: Tensor | None,
    bits: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor | None,
    *scales: Tensor | None,
) -> Operands | None:
    """The tensors of a linear of `layout` as kernels take them; None where they are not packed. `scales` are
    core_scales, left_scales and right_scales."""
    if values is None or bits is None:
        return None
    own, group = layout.quantization, layout.pattern.group(layout.in_features)[1]
    if own is None:
        return Operands(values, bits, left, right, bias, group)
    return Operands(values, bits, left, right, bias, group, *scales, columns=own.group)


def supports(layout: PackedLinear, x: Tensor, own: Operands) -> bool:
    """Whether a kernel of x's device takes a linear of `layout`."""
    if layout.quantization is not None:
        return integers.supports(layout, x, own)
    if x.device.type == "cuda":
        return cuda.supports(x, *own[:5], group=own.group)
    return cpu.supports(x, *own[:5])


def multiply(layout: PackedLinear, x: Tensor, *tensors: Tensor | None) -> Tensor:
    """y = A (S (B x)) + bias for x (..., in): (..., out).

    `tensors` are those of a linear of `layout`: values, bits, left, right, bias, core_scales, left_scales,
    right_scales. By the kernel for x's device and dtype, or else through a core that is made dense and dropped.
    Integers are then multiplied out in float32 and rounded once to the scales' dtype.
    """
    own = gathered(layout, *tensors)
    if own is not None and supports(layout, x, own):
        if layout.quantization is not None:
            return integers.linear(layout, x, own)
        return (cuda if x.device.type == "cuda" else cpu).linear(x, *own[:5], group=own.group)
    values, bits, left, right, bias, *scales = tensors
    assert values is not None
    if layout.quantization is None:
        assert bits is not None
        return through(x, unpack(values, bits, x.shape[-1], layout.pattern)[0], left, right, bias)
    if (y := integers.whole(layout, x, values, scales[0], bias)) is not None:
        return y
    given = {"core_values": values, "core_mask": bits, "left": left, "right": right}
    given |= dict(zip(("core_scales", "left_scales", "right_scales"), scales, strict=True))
    present = {name: tensor for name, tensor in given.items() if tensor is not None}
    factors = Factorization.of_tensors(present, x.shape[-1], layout.pattern, layout.quantization).in_floats()
    own_type = present["core_scales"].dtype
    left, right = (t if t is None else t.to(own_type) for t in (factors.left, factors.right))
    return through(x, factors.core.to(own_type), left, right, bias)


def through(x: Tensor, core: Tensor, left: Tensor | None, right: Tensor | None, bias: Tensor | None) -> Tensor:
    """The same with S dense, `core` (out, in)."""
    if right is not None:
        x = blockdiag.multiply(right, x)
    y = F.linear(x, core)
    if left is not None:
        y = blockdiag.multiply(left, y)
    return y if bias is None else y + bias
