"""A whole linear on packed weights on a CUDA device: y = A (S (B x)) + bias.

Decoding reads every weight once for each token, so with few rows of x Triton kernels (kernels.py) multiply with the
packed values as they are. With more rows the products decide, and torch has the fastest. The blocks are batched. A 2:4
core in 16 bits goes to sparse tensor cores, if the card and the shape allow. Else the core is made dense for the
moment. Nothing is kept beside the packed values: CUTLASS takes them as they are, with the mask in its own order. What
cuSPARSELt compresses for itself is dropped after use. Only very many rows pay for that. Where Triton is not installed
linears run through torch. docs/KERNELS.md tells more.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS, to_sparse_semi_structured

from armor.core import blockdiag, packing
from armor.execution.log import log
from armor.runtime import operator

__all__ = ["available", "linear", "supports", "unpack"]

_TYPES = (torch.bfloat16, torch.float16, torch.float32)
_FEW_ROWS = 8  # more are left to torch; a guess, as is the next
_COMPRESS_ROWS = 8192  # rows from which compressing a core for cuSPARSELt, each time, pays
_UNPACK_STEP = 1024


@cache
def _kernels() -> ModuleType | None:
    try:
        from armor.runtime import kernels
    except ImportError:
        log.warning("Triton is not installed: linears on CUDA devices run through torch; pip install triton")
        return None
    return kernels


@cache
def _is_able(index: int) -> bool:
    if torch.cuda.get_device_capability(index) < (8, 0):
        name = torch.cuda.get_device_name(index)
        log.warning("%s: compute capability below 8.0, which the kernels need: linears run through torch", name)
        return False
    return _kernels() is not None


@torch.compiler.assume_constant_result  # torch.compile asks once and does not look inside
def available(index: int = 0) -> bool:
    """Whether Triton is there and the CUDA device of that index can run its kernels; says once in the log why not."""
    return _is_able(index)


def supports(x: Tensor, values: Tensor | None, bits: Tensor, *others: Tensor | None, group: int) -> bool:
    """Whether `linear` can run on these tensors, given in its order. Triton is there. All are on one CUDA device that
    it can use and (the mask aside) of one dtype, bfloat16, float16 or float32. The factors are frozen, and `group`
    divides 8."""
    if values is None or x.device.type != "cuda" or x.dtype not in _TYPES or 8 % group:
        return False
    return operator.fits(x, values, bits, *others) and available(x.device.index)


def _run(
    x: Tensor, values: Tensor, bits: Tensor, left: Tensor | None, right: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    operator.check_shapes(x, values, bits, left, right, bias)
    vectors, values, bits = x.reshape(-1, x.shape[-1]).contiguous(), values.contiguous(), bits.contiguous()
    left, right, bias = (None if t is None else t.contiguous() for t in (left, right, bias))
    multiply = _packed if 0 < len(vectors) <= _FEW_ROWS else _through_torch
    with torch.cuda.device_of(x):  # Triton launches on the current device
        y = multiply(vectors, values, bits, left, right, bias, group)
    return y.view(*x.shape[:-1], values.shape[0])


linear = operator.register("cuda", _run)


def _packed(
    x: Tensor, values: Tensor, bits: Tensor, left: Tensor | None, right: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    """The Triton kernels, for a few rows: x (rows, in) -> (rows, out)."""
    kernels = _kernels()
    assert kernels is not None  # `available` said so
    (rows, columns), (out, kept) = x.shape, values.shape
    padded = 1 << (rows - 1).bit_length()
    if right is not None:
        size, transformed = right.shape[-1], torch.empty_like(x)
        kernels.blocks[_grid(columns, size)](x, right, transformed, rows, columns, size, ROWS=padded)
        x = transformed
    size = out if left is None else left.shape[-1]
    y, finished = x.new_empty(rows, out), torch.zeros(out // size, dtype=torch.int32, device=x.device)
    z = y if left is None else torch.empty_like(y)
    places, kept_in_byte = _places(x.device), kept * 8 // columns
    operands = (x, values, bits, places, left, bias, z, y, finished, rows, columns, out, kept, size)
    kernels.core[_grid(out, size)](*operands, KEPT=kept_in_byte, ROWS=padded)
    return y


def _grid(dimension: int, size: int):
    """One program for each tile of each block."""
    return lambda config: (dimension // size * -(-size // config["TILE"]),)


@cache
def _places(device: torch.device) -> Tensor:
    """For every byte (256,) int32: the positions of its set bits, in order, three bits each."""
    masks = packing.unpack_mask(torch.arange(256, dtype=torch.uint8, device="cpu").unsqueeze(1), 8)
    places = masks.int().argsort(dim=1, descending=True, stable=True)
    return (places << 3 * torch.arange(8, device="cpu")).sum(1).int().to(device)


def unpack(values: Tensor, bits: Tensor, columns: int) -> Tensor:
    """The dense core (out, columns) of `values` (out, kept) and `bits` (out, ceil(columns/8))."""
    out, kept = values.shape
    dense = values.new_empty(out, columns)
    grid, kernels = (out, -(-columns // _UNPACK_STEP)), _kernels()
    assert kernels is not None
    kernels.unpack[grid](values, bits, dense, columns, kept, KEPT=kept * 8 // columns, STEP=_UNPACK_STEP)
    return dense


def _through_torch(
    x: Tensor, values: Tensor, bits: Tensor, left: Tensor | None, right: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    """torch's products, for many rows: x (rows, in) -> (rows, out)."""
    u = x if right is None else blockdiag.multiply(right, x)
    core = _semi_structured(u, values, bits, group)
    z = F.linear(u, unpack(values, bits, x.shape[1]) if core is None else core)
    y = z if left is None else blockdiag.multiply(left, z)
    return y if bias is None else y + bias


def _semi_structured(x: Tensor, values: Tensor, bits: Tensor, group: int) -> Tensor | None:
    """The core as torch's sparse tensor (out, in), or None where that cannot, or had better not, multiply `x`."""
    (rows, columns), (out, kept) = x.shape, values.shape
    if rows == 0 or group != 4 or 2 * kept != columns or x.dtype == torch.float32:
        return None
    if out % 32 or columns % 64:
        _say_once("2:4 cores whose shape is not a multiple of (32, 64) do not run on sparse tensor cores, but dense")
        return None
    library = _sparse_library(x.device)
    if library == "CUTLASS":
        with warnings.catch_warnings(action="ignore"):  # that its interface is a prototype
            other: Any = {"packed_t": None, "meta_t": None, "compressed_swizzled_bitmask": None}
            return SparseSemiStructuredTensorCUTLASS(torch.Size((out, columns)), values, _cutlass_mask(bits), **other)
    if library == "cuSPARSELt" and rows >= _COMPRESS_ROWS:
        with warnings.catch_warnings(action="ignore"):
            return to_sparse_semi_structured(unpack(values, bits, columns))
    return None


@cache
def _sparse_library(device: torch.device) -> str | None:
    """Which of torch's two libraries for 2:4 runs on this card: CUTLASS, cuSPARSELt or None."""
    if torch.cuda.get_device_capability(device)[0] == 8:  # torch compiles CUTLASS's sparse kernels for these alone
        return "CUTLASS"
    if torch.backends.cusparselt.is_available():
        return "cuSPARSELt"
    _say_once(f"{torch.cuda.get_device_name(device)}: this torch has no library for its sparse tensor cores")
    return None


@cache
def _say_once(message: str) -> None:
    log.warning(message)


def _cutlass_mask(bits: Tensor) -> Tensor:
    """A 2:4 mask (out, in/8) uint8 as CUTLASS has it for 16-bit values: (out, in/16) int16.

    Each value's column in its group takes two bits, so a byte of the mask becomes a byte again. CUTLASS then stores the
    16-bit words in the order in which its threads load them: of 32 rows, every eighth side by side, by twos of columns.
    """
    out, width = bits.shape
    words = _pair_codes(bits.device).index_select(0, bits.flatten().int()).view(torch.int16)
    tiles = words.view(out // 32, 2, 2, 8, width // 4, 2)  # rows 32a + 16b + 8c + d, columns 2e + f
    return tiles.permute(4, 0, 3, 1, 5, 2).reshape(out, width // 2)


@cache
def _pair_codes(device: torch.device) -> Tensor:
    """For every byte (256,) uint8 that is two groups of a 2:4 mask: two bits for the column of each kept entry."""
    byte = torch.arange(256, dtype=torch.uint8, device="cpu")
    groups = packing.unpack_mask(byte.unsqueeze(1), 8).view(256, 2, 4)
    first, second = groups.int().argsort(dim=2, descending=True, stable=True)[..., :2].unbind(2)
    low, high = (first + 4 * second).unbind(1)
    return (low + 16 * high).to(torch.uint8).to(device)
