"""A whole linear on packed weights in one call into C: y = A (S (B x)) + bias.

Decoding reads every weight once for each token. So its time is bytes over bandwidth. A 2:4 core has 0.5625 of the bytes
of a dense one in bf16. The C library (folder native/) therefore never writes a dense core to memory. With few rows of x
it meets the packed values in registers. With more it does so too, or unpacks tiles of them into cache. Where it could
not be built, linears run through torch. docs/KERNELS.md tells how it works, docs/RESULTS.md what was measured.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from armor.core import blockdiag
from armor.execution.log import log
from armor.runtime import operator
from armor.runtime.library import BEST, C_LIBRARY, LEVELS, NUMBERS, PARALLEL, PARTS, TYPES, Integers, Part, Product
from armor.runtime.operator import Operands

__all__ = [
    "ASSUME_AMX",
    "LEVELS",
    "TYPES",
    "Joined",
    "Table",
    "available",
    "grouped",
    "has_tiles",
    "is_grouped",
    "level",
    "linear",
    "multiply",
    "runs_in_c",
    "supports",
    "unpack",
]

ASSUME_AMX = "ARMOR_ASSUME_AMX"
"""The environment's variable that, set to 1, sends products where they go on a processor with AMX."""
_SCRATCH_BYTES = 8 << 20  # of dense core at a time, where torch multiplies: it stays in the last-level cache
_TILE_ROWS = 32  # rows of x from which torch's products, on processors that multiply bf16 tiles, beat the C loops


_has_tiles = C_LIBRARY is not None and (os.environ.get(ASSUME_AMX) == "1" or bool(C_LIBRARY.armor_has_tiles()))


@cache
def _tell_once() -> None:
    log.warning(
        "the CPU kernel was not built, or by another release: linears run through torch; install a C compiler, then "
        "the package again"
    )


def available() -> bool:
    """Whether the C library was built and loads. The first time that it was not, says so in the log."""
    if C_LIBRARY is None:
        _tell_once()
    return C_LIBRARY is not None


def level() -> str:
    """The best instruction set that this processor has and the library uses: one of LEVELS."""
    return LEVELS[BEST]


def has_tiles() -> bool:
    """Whether torch multiplies many rows of bfloat16 faster here, by tiles (AMX)."""
    return _has_tiles


def supports(x: Tensor, values: Tensor | None, bits: Tensor, *others: Tensor | None) -> bool:
    """Whether `linear` can run on these tensors, given in its order. The library is there. All are on the CPU and (the
    mask aside) of one dtype, bfloat16 or float32. The factors are frozen."""
    if values is None or x.device.type != "cpu" or x.dtype not in TYPES or not available():
        return False
    return operator.fits(x, values, bits, *others)


def runs_in_c(x: Tensor) -> bool:
    """Whether `linear` multiplies x (..., in) in the C loops, where no number of threads changes a bit of the result.

    torch's products, which promise no bits, take many rows of bfloat16 on processors that multiply tiles of it.
    """
    return not (_has_tiles and x.dtype == torch.bfloat16 and x.numel() >= _TILE_ROWS * x.shape[-1])


def _run(x: Tensor, *operands: Any) -> Tensor:
    """x times a linear, the fields of its Operands, in C or, where that is faster, in torch."""
    own = Operands(*operands)
    if runs_in_c(x) or own.core_scales is not None:
        return multiply(x, own)
    operator.check_shapes(x, own)
    return _through_torch(x, *own[:5])


linear = operator.register("cpu", _run)


def multiply(x: Tensor, operands: Operands, level: int = BEST) -> Tensor:
    """x (..., in) times a linear: (..., out), by the C loops at `level`, an index into LEVELS.

    Ask `supports` first. Raises ValueError if the shapes do not fit each other.
    """
    operator.check_shapes(x, operands)
    x, own = x.contiguous(), operator.contiguous(operands)
    columns, out = x.shape[-1], own.values.shape[0]
    y = x.new_empty(*x.shape[:-1], out)
    _call(x, ctypes.byref(_part(own, columns, y, out)), 1, level)
    return y


def _call(x: Tensor, parts: Any, count: int, level: int) -> None:
    """The C loops on contiguous x and `count` parts, an array or one by reference."""
    assert C_LIBRARY is not None  # `supports` said so
    columns = x.shape[-1]
    error = C_LIBRARY.armor_linears(
        level,
        TYPES[x.dtype],
        x.data_ptr(),
        x.numel() // columns,
        columns,
        parts,
        count,
        PARALLEL,
        torch.get_num_threads(),
    )
    if error:
        raise MemoryError(os.strerror(error))


def _part(own: Operands, columns: int, y: Tensor | None, stride: int) -> Part:
    """Of contiguous operands for `columns` inputs, and the output, `stride` numbers from a row to the next.

    Without `y` its address is left for later.
    """
    (out, kept), integers = own.values.shape, None
    if own.core_scales is not None:
        core = operator.number_type(own.values)
        blocks = own.left_scales is not None or own.right_scales is not None
        scales = map(_address, own[6:9])
        integers = ctypes.pointer(Integers(NUMBERS.index(core) + 1, blocks, *scales, own.columns))
        kept = columns // 2 if core == "int4" else kept
    addresses = [None if t is None else t.data_ptr() for t in (*own[:5], y)]
    left_size, right_size = [0 if t is None else t.shape[-1] for t in own[2:4]]
    return Part(*addresses, integers, out, kept, own.group, left_size, right_size, stride)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def is_grouped(x: Tensor, counts: Sequence[int]) -> bool:
    """Whether `grouped` can multiply the rows of x, `counts` of them at a time, with linears that `supports` them."""
    return C_LIBRARY is not None and runs_in_c(x[: max(counts, default=0)])


class Table:
    """What C reads of linears with one input, made ready once: a call takes little more than the kernel's time.

    Some may hold floats and others integers. Linears with the same tensor B, and so its scales, share B x. Outputs are
    bit for bit those of `linear`. Whoever holds a table keeps the tensors, contiguous ones, where they are. No gradient
    goes through.
    """

    def __init__(self, operands: Sequence[Operands], columns: int) -> None:
        """`columns` are the input channels of each. Ask `supports` of each first.

        Raises ValueError if shapes do not fit each other.
        """
        for own in operands:
            operator.check_shapes(own.values.new_empty(0, columns), own)
        self.columns, self.sizes = columns, [len(own.values) for own in operands]
        self._type = Part * len(operands)
        self.parts = self._type(*(_part(own, columns, None, 0) for own in operands))

    def takes(self, x: Tensor) -> bool:
        """Whether x (..., in) goes through C. Raises ValueError for another `in`."""
        if x.shape[-1] != self.columns:
            raise ValueError(f"x of {x.shape[-1]} columns, expected {self.columns}")
        return runs_in_c(x) and len(self.sizes) <= PARTS and x.numel() > 0

    def side_by_side(self, x: Tensor, level: int = BEST) -> Tensor:
        """The outputs in one tensor (..., all their channels). Ask `takes` first."""
        width, starts = sum(self.sizes), itertools.accumulate(self.sizes, initial=0)
        y = x.new_empty(*x.shape[:-1], width)
        address, size = y.data_ptr(), y.element_size()
        self._multiply(x, [(address + start * size, width) for start in starts], level)
        return y

    def apart(self, x: Tensor, level: int = BEST) -> list[Tensor]:
        """Each output (..., out) in a tensor of its own. Ask `takes` first."""
        lead = x.shape[:-1]
        outputs = [x.new_empty(*lead, size) for size in self.sizes]
        self._multiply(x, [(y.data_ptr(), size) for y, size in zip(outputs, self.sizes, strict=True)], level)
        return outputs

    def part(self, y: Tensor) -> Part:
        """The first linear's, with its output in y (rows, out), rows one behind the other."""
        part = Part.from_buffer_copy(self.parts)
        part.y, part.y_stride = y.data_ptr(), self.sizes[0]
        return part

    def _multiply(self, x: Tensor, places: Sequence[tuple[int, int]], level: int) -> None:
        """`places` are the address of each output, and the numbers from a row of it to the next."""
        parts = self._type.from_buffer_copy(self.parts)
        for part, (address, stride) in zip(parts, places, strict=False):
            part.y, part.y_stride = address, stride
        _call(x.contiguous(), parts, len(parts), level)


class Joined:
    """Linears with one input whose tensors stay as they are: their outputs are side by side in one tensor."""

    def __init__(self, operands: Sequence[Operands], columns: int) -> None:
        """`columns` are the input channels of each. Ask `supports` of each first.

        Raises ValueError if shapes do not fit each other.
        """
        self._operands = [operator.contiguous(own) for own in operands]
        self._table = Table(self._operands, columns)
        self.out_features = sum(self._table.sizes)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), bit for bit what `linear` gives of each. Raises ValueError for another `in`."""
        if not self._table.takes(x):
            return torch.cat([_run(x, *own) for own in self._operands], dim=-1)
        return self._table.side_by_side(x)


def grouped(x: Tensor, counts: Sequence[int], tables: Sequence[Sequence[Table]], level: int = BEST) -> list[Tensor]:
    """x (rows, in) times other linears for each group of its rows, in one call into C.

    The first counts[0] rows are multiplied with each of tables[0], the next counts[1] with each of tables[1], and so
    on. A table is of one linear. All groups have as many, at most 8, of the same shapes; those of a group with the same
    tensor B share B x. Returns an output (rows, out) for the first linears of all groups, one for the second, and so
    on: bit for bit those of `linear`. Ask `is_grouped` first. Raises ValueError if shapes do not fit.
    """
    x = x.contiguous()
    if sum(counts) != len(x) or len(counts) != len(tables):
        raise ValueError(f"{len(x)} rows do not fit {len(tables)} groups of {list(counts)} rows")
    outputs = [x.new_empty(len(x), table.sizes[0]) for table in (tables[0] if tables else ())]
    parts, cuts, start = [], [], 0
    for count, group in zip(counts, tables, strict=True):
        for table, y in zip(group, outputs, strict=True):
            table.takes(x)
            if table.sizes[0] != y.shape[1]:
                raise ValueError(f"a linear of {table.sizes[0]} rows beside one of {y.shape[1]}")
        own = [table.part(y[start:]) for table, y in zip(group, outputs, strict=True)]
        cuts += [(start, count, len(parts) + first, last - first) for first, last in _sharing(own)]
        parts += own
        start += count
    table = (Part * len(parts))(*parts)
    place, columns = ctypes.addressof(table), x.shape[1]
    products = [
        Product(x[start:].data_ptr(), place + first * ctypes.sizeof(Part), rows, columns, number)
        for start, rows, first, number in cuts
    ]
    assert C_LIBRARY is not None  # there are tables
    error = C_LIBRARY.armor_products(
        level,
        TYPES[x.dtype],
        (Product * len(products))(*products),
        len(products),
        PARALLEL,
        torch.get_num_threads(),
    )
    if error:
        raise MemoryError(os.strerror(error))
    return outputs


def _sharing(parts: Sequence[Part]) -> list[tuple[int, int]]:
    """The linears that go together, first and end of each: those that share B, if all do; else each by itself."""
    right = parts[0].right
    shared = right is not None and all(part.right == right for part in parts)
    return [(0, len(parts))] if shared and len(parts) <= PARTS else [(i, i + 1) for i in range(len(parts))]


def unpack(values: Tensor, bits: Tensor, columns: int, level: int = BEST) -> Tensor:
    """The dense core (out, columns) of `values` (out, kept) and `bits` (out, ceil(columns/8))."""
    values, bits = values.contiguous(), bits.contiguous()
    out, kept = values.shape
    dense = values.new_empty(out, columns)
    assert C_LIBRARY is not None
    C_LIBRARY.armor_unpack(
        level,
        TYPES[values.dtype],
        *(t.data_ptr() for t in (values, bits, dense)),
        out,
        columns,
        kept,
        PARALLEL,
        torch.get_num_threads(),
    )
    return dense


def _through_torch(
    x: Tensor, values: Tensor, bits: Tensor, left: Tensor | None, right: Tensor | None, bias: Tensor | None
) -> Tensor:
    """For many rows where torch multiplies faster than the C loops: some unpacked rows of the core at a time."""
    columns, out = x.shape[-1], values.shape[0]
    u = x if right is None else blockdiag.multiply(right, x)
    z = x.new_empty(*x.shape[:-1], out)
    step = max(1, _SCRATCH_BYTES // (columns * x.element_size()))
    for start in range(0, out, step):
        some = slice(start, start + step)
        z[..., some] = F.linear(u, unpack(values[some], bits[some], columns))
    y = z if left is None else blockdiag.multiply(left, z)
    return y if bias is None else y + bias
