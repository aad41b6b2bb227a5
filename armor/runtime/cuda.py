"""A whole linear on packed weights on a CUDA device: y = A (S (B x)) + bias.

Decoding reads every weight once for each token, so with few rows of x Triton kernels (kernels.py) multiply with the
packed values as they are. With more rows the products decide, and torch has the fastest of floats. The blocks are
batched. A 2:4 core in 16 bits goes to sparse tensor cores, if the card and the shape allow. Else the core is made dense
for the moment. Integers would have to be made floats for that, so a Triton kernel multiplies with them, in tiles.
Nothing is kept beside the packed values: CUTLASS takes them as they are, with the mask in its own order. What
cuSPARSELt compresses for itself is dropped after use. Only very many rows pay for that. Linears with one input are
multiplied together (`Joined`). Where Triton is not installed linears run through torch. docs/KERNELS.md tells more.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, groupby
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS, to_sparse_semi_structured

from armor.core import blockdiag, packing
from armor.execution.log import log
from armor.runtime import operator
from armor.runtime.operator import Operands

__all__ = ["GROUP", "TYPES", "Joined", "available", "linear", "multiply", "supports", "unpack"]

GROUP = 16
"""Columns that the kernels multiply with one scale at least: a group of integers is a multiple, or the whole row."""
TYPES = (torch.bfloat16, torch.float16, torch.float32)
_FEW_ROWS = 8  # with more the products decide; a guess, as are the next
_ROW_TILES = 16, 64  # rows of x that meet a tile of integers at once, in few tiles and in more
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
    if values is None or x.device.type != "cuda" or x.dtype not in TYPES or 8 % group:
        return False
    return operator.fits(x, values, bits, *others) and available(x.device.index)


def multiply(x: Tensor, operands: Operands) -> Tensor:
    """x (..., in) times a linear, in floats or integers: (..., out).

    Ask `supports`, or for integers that of `armor.runtime.integers`, first. Raises ValueError if the shapes do not fit
    each other.
    """
    operator.check_shapes(x, operands)
    return _together(x, [operator.contiguous(operands)])


def _together(x: Tensor, parts: Sequence[Operands]) -> Tensor:
    """x (..., in) times contiguous linears of one form: their outputs (..., out), side by side."""
    vectors = x.reshape(-1, x.shape[-1]).contiguous()
    with torch.cuda.device_of(x):  # Triton launches on the current device
        y = (_packed if 0 < len(vectors) <= _FEW_ROWS else _one_by_one)(vectors, parts)
    return y.view(*x.shape[:-1], y.shape[1])


class Joined:
    """Linears with one input, made ready once. Their outputs are side by side in one tensor.

    Those beside each other that are of one form (types, pattern, block sizes) are multiplied together: a few rows of x
    in two launches. Linears with the same tensor B, and so its scales, share B x. Tensors that later take the place of
    these are not seen. No gradient goes through.
    """

    def __init__(self, operands: Sequence[Operands], columns: int) -> None:
        """`columns` are the input channels of each. Ask what `multiply` says of each first.

        Raises ValueError if shapes do not fit each other.
        """
        for own in operands:
            operator.check_shapes(own.values.new_empty(0, columns), own)
        self._columns, self.out_features = columns, sum(len(own.values) for own in operands)
        self._runs = [list(run) for _, run in groupby(map(operator.contiguous, operands), _form)]

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out). Raises ValueError for another `in`."""
        if x.shape[-1] != self._columns:
            raise ValueError(f"x of {x.shape[-1]} columns, expected {self._columns}")
        return _side_by_side([_together(x, run) for run in self._runs])


def _form(own: Operands) -> tuple[Any, ...]:
    """What linears multiplied together have in common: all but their output channels and their numbers."""
    tensors = (*own[:5], *own[6:9])
    return own.group, own.columns, *(None if t is None else (t.dtype, t.shape[1:]) for t in tensors)


def _side_by_side(outputs: list[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _holders(parts: Sequence[Operands]) -> tuple[list[Operands], list[int]]:
    """A linear for each distinct B (or for none), and for each of `parts` the index of the one that has its B."""
    holders = list({id(own.right): own for own in parts}.values())
    places = {id(own.right): place for place, own in enumerate(holders)}
    return holders, [places[id(own.right)] for own in parts]


def _run(x: Tensor, *operands: Any) -> Tensor:
    return multiply(x, Operands(*operands))


linear = operator.register("cuda", _run)


def _packed(x: Tensor, parts: Sequence[Operands]) -> Tensor:
    """The Triton kernels, for a few rows: x (rows, in) -> (rows, out)."""
    kernels = _kernels()
    assert kernels is not None  # `available` said so
    (rows, columns), sizes, own = x.shape, [len(own.values) for own in parts], parts[0]
    kept, padded = _kept(own, columns), 1 << (rows - 1).bit_length()
    holders, inputs = _holders(parts)
    if own.right is not None:
        transformed, size = x.new_empty(len(holders), rows, columns), own.right.shape[-1]
        rights, scales = _each(holders, "right"), _each(holders, "right_scales")
        kernels.blocks[_grid(len(holders) * columns, size)](
            x, rights, scales, transformed, rows, columns, size, FORM=f"{len(holders)} {own.right.dtype}", ROWS=padded
        )
        x = transformed
    out, size = sum(sizes), math.gcd(*sizes) if own.left is None else own.left.shape[-1]
    y, finished = x.new_empty(rows, out), torch.zeros(out // size, dtype=torch.int32, device=x.device)
    z = y if own.left is None else torch.empty_like(y)
    kernels.core[_grid(out, size)](
        x, tuple(inputs), tuple(accumulate(sizes[:-1], initial=0)),
        _each(parts, "values"), _each(parts, "bits"), _places(x.device), _each(parts, "core_scales"),
        _each(parts, "left"), _each(parts, "left_scales"), _each(parts, "bias"), z, y, finished,
        rows, columns, out, kept, size, own.columns or columns,
        FORM=f"{len(parts)} {own.values.dtype} {None if own.left is None else own.left.dtype}",
        KEPT=kept * 8 // columns, ROWS=padded,
    )  # fmt: skip
    return y


def _each(parts: Sequence[Operands], name: str) -> tuple[Tensor | None, ...]:
    return tuple(getattr(own, name) for own in parts)


def _grid(dimension: int, size: int, row_tiles: int = 1):
    """One program for each tile of each block, and each tile of rows."""
    return lambda config: (dimension // size * -(-size // config["TILE"]), row_tiles)


def _kept(own: Operands, columns: int) -> int:
    """How many values a row of the core has; int4 are two in a byte."""
    return columns // 2 if own.values.dtype == torch.uint8 else own.values.shape[1]


def _one_by_one(x: Tensor, parts: Sequence[Operands]) -> Tensor:
    """Many rows, (rows, in) -> (rows, out): B x once for all that share B, the rest of each part by itself."""
    rest = _through_torch if parts[0].core_scales is None else _in_tiles
    holders, places = _holders(parts)
    inputs = [_times_right(x, own) for own in holders]
    return _side_by_side([rest(inputs[place], own) for own, place in zip(parts, places, strict=True)])


def _times_right(x: Tensor, own: Operands) -> Tensor:
    """B x, (rows, in)."""
    if own.right is None:
        return x
    if own.core_scales is None:
        return blockdiag.multiply(own.right, x)
    return _block_product(x, own.right, own.right_scales, None)


def _in_tiles(u: Tensor, own: Operands) -> Tensor:
    """Integers, a launch for each factor: u = B x (rows, in) -> (rows, out)."""
    sizes, bias = (len(own.values), u.shape[1], _kept(own, u.shape[1]), own.columns), own.bias
    z = _product(u, own.values, own.bits, own.core_scales, bias if own.left is None else None, *sizes)
    return z if own.left is None else _block_product(z, own.left, own.left_scales, bias)


def _block_product(x: Tensor, blocks: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor:
    size = blocks.shape[-1]
    return _product(x, blocks.flatten(0, 1), None, scales, bias, size, size, size, size)


def _product(
    x: Tensor,
    values: Tensor,
    bits: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    size: int,
    width: int,
    kept: int,
    group: int,
) -> Tensor:
    """The Triton kernel of that name."""
    rows, out = len(x), len(values)
    y, kernels = x.new_empty(rows, out), _kernels()
    if rows:
        assert kernels is not None  # `available` said so
        step = next(step for step in (64, 32, GROUP) if group % step == 0 or group >= width)
        tile = _ROW_TILES[rows > _ROW_TILES[0]]
        kernels.product[_grid(out, size, -(-rows // tile))](
            x, values, bits, scales, bias, y, rows, out, size, width, kept, group,
            KEPT=kept * 8 // width, ROWS=tile, STEP=step,
        )  # fmt: skip
    return y


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


def _through_torch(u: Tensor, own: Operands) -> Tensor:
    """Floats, by torch's products: u = B x (rows, in) -> (rows, out)."""
    core = _semi_structured(u, own.values, own.bits, own.group)
    z = F.linear(u, unpack(own.values, own.bits, u.shape[1]) if core is None else core)
    y = z if own.left is None else blockdiag.multiply(own.left, z)
    return y if own.bias is None else y + own.bias


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
