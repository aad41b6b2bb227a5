"""What the operators of all backends have in common: the schema, the shapes, the gradients.

A backend brings one function that multiplies; torch.library makes it an operator that `torch.compile` and autograd see.
Gradients reach x and the bias, through torch: a training step has rows enough to pay for a dense core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from armor.core import blockdiag, packing

__all__ = ["check_shapes", "is_needed", "register"]

_SCHEMA = "(Tensor x, Tensor values, Tensor bits, Tensor? left, Tensor? right, Tensor? bias, int group) -> Tensor"


def register(device: str, multiply: Callable[..., Tensor]) -> torch.library.CustomOpDef:
    """`multiply` as the operator armor::{device}_linear on tensors of that device type."""
    operator = torch.library.custom_op(
        f"armor::{device}_linear", multiply, mutates_args=(), device_types=device, schema=_SCHEMA
    )
    operator.register_fake(lambda x, values, *others: x.new_empty(*x.shape[:-1], values.shape[0]))
    operator.register_autograd(_backward, setup_context=_save)
    return operator


def is_needed(x: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd, torch.compile or a tensor subclass must see the operator; calling past it is faster."""
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or bias is not None and bias.requires_grad)
    return wants_gradient or type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing()


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
