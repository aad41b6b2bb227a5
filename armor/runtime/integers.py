"""A quantized linear, by the CPU's kernel or the card's: y = A (S (B x)) + bias, expanded in registers.

Decoding takes the time of its bytes, and int8 and fp8 have half of those of bfloat16. Their numbers are exact in any
type of x. So they meet x as they are, in float32 sums, and the sum of each group meets its scale; or each of them meets
it in float32, where their product is exact. Nothing is rounded but B x and S B x, as with floats. Gradients reach x and
the bias, through a dense product.

A linear that keeps every weight as int8, with a scale for each output, has neither mask nor blocks. torch's own kernel
multiplies with it as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from armor.core.factorization import Factorization
from armor.core.pattern import Pattern
from armor.core.quantization import Quantization
from armor.format.checkpoint import PackedLinear
from armor.runtime import cpu, cuda, operator
from armor.runtime.operator import Operands

__all__ = ["HAS_FP8", "is_whole", "linear", "supports", "whole"]

_SCHEMA = (
    "(Tensor x, Tensor values, Tensor bits, Tensor? left, Tensor? right, Tensor? bias, Tensor core_scales, "
    "Tensor? left_scales, Tensor? right_scales, int n, int m, int columns) -> Tensor"
)
HAS_FP8 = (8, 9)
"""The least capability of a card for which Triton knows fp8."""
_TILE = 512  # columns that the CPU's kernel unpacks at a time: a larger group is a multiple of them
_COLUMNS = 32  # of a multiple of them torch's kernel is right; with others in bfloat16 it reads beyond the weight
_ROWS = 256  # with more rows torch's kernel takes longer than a product with the weight as floats, made for it


def supports(layout: PackedLinear, x: Tensor, operands: Operands) -> bool:
    """Whether `linear` can run on these operands. The kernel of x's device is there. All are on that device and frozen,
    and what has no scales is of one dtype that the kernel takes, whose groups and pattern are such as it cuts."""
    own, on_card = layout.quantization, x.device.type == "cuda"
    if own is None or x.dtype not in (cuda.TYPES if on_card else cpu.TYPES):
        return False
    if any(t.device != x.device for t in operands if isinstance(t, Tensor)):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*operands[:4], *operands[6:9])):
        return False
    floats = [*operands[6:9], operands.bias, *((operands.left, operands.right) if not own.blocks else ())]
    if any(t is not None and t.dtype != x.dtype for t in floats):
        return False
    if own.core == "fp8" and on_card and torch.cuda.get_device_capability(x.device) < HAS_FP8:
        return False
    n, m = layout.pattern.group(layout.in_features)
    if own.core == "int4" and not (2 * n == m and 8 % m == 0) or on_card and 8 % m:
        return False
    whole, step = own.group >= layout.in_features, cuda.GROUP if on_card else _TILE if own.group > _TILE else 32
    if not whole and own.group % step:
        return False
    return cuda.available(x.device.index) if on_card else x.device.type == "cpu" and cpu.available()


def _multiply(x: Tensor, operands: Operands) -> Tensor:
    return (cuda.multiply if x.device.type == "cuda" else cpu.multiply)(x, operands)


def _run(x: Tensor, *given: Any) -> Tensor:
    values, bits, left, right, bias, *scales, _, m, columns = given
    return _multiply(x, Operands(values, bits, left, right, bias, m, *scales, columns=columns))


_operator = torch.library.custom_op(
    "armor::integers_linear", _run, mutates_args=(), device_types=("cpu", "cuda"), schema=_SCHEMA
)
_operator.register_fake(lambda x, values, *others: x.new_empty(*x.shape[:-1], values.shape[0]))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5], *inputs[6:9])
    ctx.rest = (inputs[0].shape[-1], *inputs[9:])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    values, bits, left, right, *scales = ctx.saved_tensors
    in_features, n, m, columns = ctx.rest
    bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[5] else None
    names = ("core_values", "core_mask", "left", "right", "core_scales", "left_scales", "right_scales")
    given = zip(names, (values, bits, left, right, *scales), strict=True)
    tensors = {name: tensor for name, tensor in given if tensor is not None}
    blocks = "int8" if scales[1:] != [None, None] else None
    kind = Quantization(operator.number_type(values), blocks, columns)
    factors = Factorization.of_tensors(tensors, in_features, Pattern(n, m), kind)
    return gradient @ factors.reconstruct().to(gradient.dtype), None, None, None, None, bias, *([None] * 6)


_operator.register_autograd(_backward, setup_context=_save)


def linear(layout: PackedLinear, x: Tensor, operands: Operands) -> Tensor:
    """y = A (S (B x)) + bias for x (..., in): (..., out), of a linear of `layout`.

    Ask `supports` first. Raises ValueError if the shapes do not fit each other.
    """
    if not operator.is_needed(x, operands.bias):
        return _multiply(x, operands)  # past torch's dispatcher, as in `operator`
    n, m = layout.pattern.group(layout.in_features)
    return _operator(x, *operands[:5], *operands[6:9], n, m, operands.columns)


def is_whole(layout: PackedLinear) -> bool:
    """Whether `whole` can run on a linear of `layout`: every weight as int8, a scale for each output, no blocks."""
    own, blocks = layout.quantization, layout.left_block_size or layout.right_block_size
    kept = own == Quantization("int8", None, layout.in_features) and layout.pattern.is_dense
    return kept and not blocks and layout.in_features % _COLUMNS == 0


def whole(layout: PackedLinear, x: Tensor, values: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """y = W x + bias for x (..., in): (..., out), where `is_whole`: by torch's kernel for int8 weights on a CPU.

    None where that cannot be or does not pay: on another device, in another dtype than the scales', with many rows,
    where a gradient or a compiler needs the operator.
    """
    if scales is None or not is_whole(layout) or x.device.type != "cpu" or x.dtype != scales.dtype:
        return None
    if x.numel() > _ROWS * layout.in_features or operator.is_needed(x, bias):
        return None
    rows = x.reshape(-1, layout.in_features)
    y = torch.ops.aten._weight_int8pack_mm(rows, values, scales.flatten()).view(*x.shape[:-1], layout.out_features)
    return y if bias is None else y + bias
