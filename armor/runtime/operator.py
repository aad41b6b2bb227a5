"""What the operators of all backends have in common: the schema, the operands, their shapes, the gradients.

A backend brings one function that multiplies; torch.library makes it an operator that `torch.compile` and autograd see.
Gradients reach x and the bias, through torch: a training step has rows enough to pay for a dense core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.jit._trace import is_tracing

from armor.core import blockdiag, packing
from armor.core.quantization import STORED, NumberType

__all__ = ["Operands", "check_shapes", "contiguous", "fits", "is_needed", "number_type", "register"]

_NUMBER_TYPES: dict[torch.dtype, NumberType] = {getattr(torch, dtype): kind for kind, dtype in STORED.items()}
_SCHEMA = "(Tensor x, Tensor values, Tensor bits, Tensor? left, Tensor? right, Tensor? bias, int group) -> Tensor"


class Operands(NamedTuple):
    """A packed linear as a kernel takes it: the first six are those of `linear`.

    A quantized one has scales in the dtype of x: `core_scales` (out, ceil(in/columns)), each for `columns` columns of a
    row of the core; `left_scales` (out,) and `right_scales` (in,), each for a row of a block, None where blocks are
    floats.
    int8 is int8, fp8 is float8_e4m3fn; int4 is uint8, two in a byte, of a core that keeps half of every 8 columns.
    Without `core_scales` all numbers are floats.
    """

    values: Tensor
    bits: Tensor
    left: Tensor | None
    right: Tensor | None
    bias: Tensor | None
    group: int
    core_scales: Tensor | None = None
    left_scales: Tensor | None = None
    right_scales: Tensor | None = None
    columns: int = 0


def register(device: str, multiply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`multiply` as the operator armor::{device}_linear on tensors of that device type; the function that calls it."""
    operator = torch.library.custom_op(
        f"armor::{device}_linear", multiply, mutates_args=(), device_types=device, schema=_SCHEMA
    )
    operator.register_fake(lambda x, values, *others: x.new_empty(*x.shape[:-1], values.shape[0]))
    operator.register_autograd(_backward, setup_context=_save)

    def linear(
        x: Tensor,
        values: Tensor,
        bits: Tensor,
        left: Tensor | None = None,
        right: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        group: int,
    ) -> Tensor:
        """y = A (S (B x)) + bias for x (..., in): (..., out). Sums in float32; B x and S B x are rounded to x's dtype.

        `values` (out, kept) and `bits` (out, ceil(in/8)) uint8 are the core as `armor.core.packing` packs it; in every
        `group` consecutive columns of a row it keeps kept·group/in (an unstructured core: `group` is in). `left`
        (out/d, d, d), `right` (in/d, d, d), `bias` (out,) or None. Gradients reach x and the bias. Ask the backend's
        `supports` first. Raises ValueError if the shapes do not fit each other.
        """
        if is_needed(x, bias):
            return operator(x, values, bits, left, right, bias, group)
        # The same, past torch's dispatcher, whose code each linear sweeps from the caches (docs/TRIED.md).
        return multiply(x, values, bits, left, right, bias, group)

    return linear


def fits(x: Tensor, values: Tensor, bits: Tensor, *others: Tensor | None) -> bool:
    """Whether all, given in the order of `linear`, are on x's device and, the mask aside, of its dtype, and the factors
    are frozen."""
    floats = [values, *(t for t in others if t is not None)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (values, *others[:2]) if t is not None):
        return False
    return bits.device == x.device and all(t.device == x.device and t.dtype == x.dtype for t in floats)


def is_needed(x: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd, torch.compile or a tensor subclass must see the operator; calling past it is faster."""
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or bias is not None and bias.requires_grad)
    return wants_gradient or type(x) is not Tensor or torch.compiler.is_compiling() or is_tracing()


def number_type(values: Tensor) -> NumberType:
    """That of a packed core with scales."""
    return _NUMBER_TYPES[values.dtype]


def check_shapes(x: Tensor, own: Operands) -> None:
    """Raises ValueError if the shapes do not fit each other; kernels trust them."""
    columns, out = x.shape[-1], own.values.shape[0]
    if own.bits.shape != (out, (columns + 7) // 8):
        raise ValueError(f"mask {tuple(own.bits.shape)} does not fit a core of {out} rows and {columns} columns")
    for name, blocks, dimension in (("left", own.left, out), ("right", own.right, columns)):
        if blocks is not None and blocks.numel() != dimension * blocks.shape[-1]:
            raise ValueError(f"{name} {tuple(blocks.shape)} does not cover {dimension} channels in blocks")
    if own.bias is not None and own.bias.numel() != out:
        raise ValueError(f"bias {tuple(own.bias.shape)} does not fit a core of {out} rows")
    if own.core_scales is not None:
        _check_integers(own, own.core_scales, columns)


def _check_integers(own: Operands, core_scales: Tensor, columns: int) -> None:
    out, width = own.values.shape
    if own.values.dtype == torch.uint8 and width != (columns // 2 + 1) // 2:
        raise ValueError(f"values {(out, width)} do not hold half of {columns} columns, two in a byte")
    if core_scales.shape != (out, -(-columns // own.columns)):
        found = tuple(core_scales.shape)
        raise ValueError(f"scales {found} do not fit {out} rows of {columns} columns in groups of {own.columns}")
    for name, scales, blocks, n in (
        ("left", own.left_scales, own.left, out),
        ("right", own.right_scales, own.right, columns),
    ):
        has_integers = blocks is not None and blocks.dtype == torch.int8
        if has_integers != (scales is not None) or scales is not None and scales.numel() != n:
            found = None if scales is None else tuple(scales.shape)
            raise ValueError(
                f"{name}_scales {found} do not fit {name} of {n} channels, {blocks is not None and blocks.dtype}"
            )


def contiguous(own: Operands) -> Operands:
    """The same with every tensor contiguous."""
    tensors = own[:5] if own.core_scales is None else (*own[:5], *own[6:9])
    if all([t is None or t.is_contiguous() for t in tensors]):  # a list: quicker than a generator
        return own
    held: Any = (t.contiguous() if isinstance(t, Tensor) else t for t in own)
    return Operands(*held)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, bits, left, right, _, _ = inputs
    ctx.save_for_backward(values, bits, left, right)
    ctx.columns = x.shape[-1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Aᵀ, Sᵀ and Bᵀ in turn."""
    values, bits, left, right = ctx.saved_tensors
    bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[5] else None
    if left is not None:
        gradient = blockdiag.multiply(left.transpose(1, 2), gradient)
    gradient = gradient @ packing.unpack(values, bits, ctx.columns)[0]
    if right is not None:
        gradient = blockdiag.multiply(right.transpose(1, 2), gradient)
    return gradient, None, None, None, None, bias, None
