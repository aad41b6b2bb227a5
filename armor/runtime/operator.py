"""What the operators of all backends have in common: the schema, the shapes, the gradients.

A backend brings one function that multiplies; torch.library makes it an operator that `torch.compile` and autograd see.
Gradients reach x and the bias, through torch: a training step has rows enough to pay for a dense core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.jit._trace import is_tracing

from armor.core import blockdiag, packing

__all__ = ["check_shapes", "fits", "is_needed", "register"]

_SCHEMA = "(Tensor x, Tensor values, Tensor bits, Tensor? left, Tensor? right, Tensor? bias, int group) -> Tensor"


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
        # The same, past torch's dispatcher, whose code each linear sweeps from the caches (docs/log/kernels.md).
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


def check_shapes(
    x: Tensor, values: Tensor, bits: Tensor, left: Tensor | None, right: Tensor | None, bias: Tensor | None
) -> None:
    """Raises ValueError if the shapes do not fit each other; kernels trust them."""
    columns, out = x.shape[-1], values.shape[0]
    if bits.shape != (out, (columns + 7) // 8):
        raise ValueError(f"mask {tuple(bits.shape)} does not fit a core of {out} rows and {columns} columns")
    for name, blocks, dimension in (("left", left, out), ("right", right, columns)):
        if blocks is not None and blocks.numel() != dimension * blocks.shape[-1]:
            raise ValueError(f"{name} {tuple(blocks.shape)} does not cover {dimension} channels in blocks")
    if bias is not None and bias.numel() != out:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit a core of {out} rows")


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
