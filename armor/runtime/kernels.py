"""The Triton kernels of the CUDA backend: a linear on packed weights in two launches, for few rows; one factor of
integers, for many; and the core made dense.

The kept values of a byte of the mask lie side by side. So a lane takes a byte, and one look-up tells to which of its 8
columns each value belongs. Only kept values are multiplied, and every group that divides a byte goes the same way. Sums
are in float32, in an order that depends on the tile sizes alone.

Numbers with scales go through the same loops. What a kernel reads is seen from its tensors: int8, int4 (two in a byte,
uint8), fp8 (float8_e4m3fn), or floats without scales. In registers a number meets its scale in float32, which is exact.

With many rows (`product`) tensor cores multiply a tile of x by a tile of the weight, which exists in registers alone,
zeros and all. Its stored numbers are exact in any float type, and a step along the columns stays within a group, so the
sums meet the scales and no weight is rounded.

Each value of S needs a whole block of B x, and each block of A the rows of S of that block. B x is small but needed by
all programs, hence a launch of its own. To compute it again in each would read all of B as often as there are programs.
Waiting for it inside one launch hangs where not all programs fit on the card at once. One program for all rows of a
block of A would leave most of the card idle (4096 rows in blocks of 128 are 32 programs). So programs take a few rows
each, and the one that is last to finish in its block of A multiplies by it: nobody waits. The first launch needs no
such care; both are tuned for each shape when it first comes.

Linears with one input, such as q, k and v, are parts of one: their outputs lie side by side, and the programs of all
are those of one launch. Tensors that each part has of its own come as tuples. A program picks those of its part by
comparing numbers, which no memory is read for.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["blocks", "core", "product", "unpack"]

_BLOCK_CONFIGS = [
    triton.Config({"TILE": tile, "STEP": step}, num_warps=warps) for tile, step, warps in [(16, 64, 4), (32, 32, 4)]
]
_CORE_CONFIGS = [
    triton.Config({"TILE": tile, "STEP": step}, num_warps=warps)
    for tile, step, warps in [(4, 128, 4), (8, 32, 2), (8, 64, 4), (16, 64, 4), (16, 128, 8)]
]
_PRODUCT_CONFIGS = [triton.Config({"TILE": tile}, num_warps=warps) for tile, warps in [(32, 4), (64, 4), (128, 8)]]


@triton.jit
def _numbers(values, row, kept, k, there):
    """Of each `row` of `values` the numbers k, of `kept`; 0 where not `there`."""
    if values.dtype.element_ty == tl.uint8:
        byte = tl.load(values + row * tl.cdiv(kept, 2) + k // 2, mask=there, other=0).to(tl.int32)
        return ((byte >> (k % 2 * 4) & 15) ^ 8) - 8
    elif values.dtype.element_ty == tl.float8e4nv:  # by its bits, for the interpreter cannot convert it
        byte = tl.load(values.to(tl.pointer_type(tl.uint8), bitcast=True) + row * kept + k, mask=there, other=0)
        size = byte.to(tl.int32) & 127
        normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        number = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
        return tl.where(byte > 127, -number, number)
    else:
        return tl.load(values + row * kept + k, mask=there, other=0)


@triton.jit
def _weights(values, bits, row, column, columns, kept, inside, KEPT: tl.constexpr):
    """The entries at `row` and `column` of a packed core, or of `values` (·, kept = columns) where `bits` is None; 0
    where nothing is kept or not `inside`."""
    if bits is None:
        return _numbers(values, row, kept, column, inside)
    else:
        byte = tl.load(bits + row * tl.cdiv(columns, 8) + column // 8, mask=inside, other=0).to(tl.int32)
        place = column % 8
        before = byte & ((1 << place) - 1)  # the bits below this column's, counted pairwise
        before = before - ((before >> 1) & 0x55)
        before = (before & 0x33) + ((before >> 2) & 0x33)
        k = column // 8 * KEPT + (before & 7) + (before >> 4)
        return _numbers(values, row, kept, k, inside & ((byte >> place & 1) == 1) & (k < kept))


@triton.jit
def _of(part, parts):
    """Of a tuple with an entry for each part that of `part`; None where they are None."""
    found = parts[0]
    if found is not None:
        for i in tl.static_range(1, len(parts)):  # pyright: ignore[reportGeneralTypeIssues]  Triton's own loop
            found = tl.where(part == i, parts[i], found)
    return found


@triton.jit
def _block_rows(
    x, matrices, scales, block, first, rows, dimension, size,
    ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """(ROWS, TILE): rows first, ... of one matrix of `matrices` (dimension/size, size, size), times its part of x.

    `scales` (dimension,) of the rows, or None.
    """
    row, o = tl.arange(0, ROWS), first + tl.arange(0, TILE)
    total = tl.zeros((ROWS, TILE, STEP), tl.float32)
    for start in range(0, size, STEP):
        i = start + tl.arange(0, STEP)
        inside = i < size
        weights = tl.load(
            matrices + (block * size + o)[:, None] * size + i[None, :],
            mask=(o < size)[:, None] & inside[None, :],
            other=0,
        )
        vectors = tl.load(
            x + row[:, None] * dimension + (block * size + i)[None, :],
            mask=(row < rows)[:, None] & inside[None, :],
            other=0.0,
        )
        total += weights.to(tl.float32)[None, :, :] * vectors.to(tl.float32)[:, None, :]
    product = tl.sum(total, 2)
    if scales is not None:
        product *= tl.load(scales + block * size + o, mask=o < size, other=0.0).to(tl.float32)[None, :]
    return product


@triton.autotune(_BLOCK_CONFIGS, key=["dimension", "size", "FORM", "ROWS"])
@triton.jit
def blocks(
    x, matrices, scales, y, rows, dimension, size,
    FORM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """y (parts, rows, dimension) = D x of each part, for x (rows, dimension) and D block diagonal.

    Of each part: `matrices` (dimension/size, size, size), `scales` (dimension,) or None. FORM is for the tuner, which
    does not look into tuples. Grid: parts · dimension/size · ceil(size/TILE).
    """
    tiles = tl.cdiv(size, TILE)
    block, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * TILE
    part, block = block // (dimension // size), block % (dimension // size)
    own, own_scales = _of(part, matrices), _of(part, scales)
    total = _block_rows(x, own, own_scales, block, first, rows, dimension, size, ROWS, TILE, STEP)
    row, o = tl.arange(0, ROWS)[:, None], (first + tl.arange(0, TILE))[None, :]
    where = (part * rows + row) * dimension + block * size + o
    tl.store(y + where, total.to(y.dtype.element_ty), mask=(row < rows) & (o < size))


@triton.autotune(_CORE_CONFIGS, key=["columns", "out", "size", "FORM", "ROWS"], reset_to_zero=["finished"])
@triton.jit
def core(
    x, inputs, starts, values, bits, places, scales, left, left_scales, bias, z, y, finished,
    rows, columns, out, kept, size, group,
    FORM: tl.constexpr, KEPT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """y (rows, out) = A (S u) + bias of each part, side by side. Grid: out/size · ceil(size/TILE).

    Of each part, of o outputs: which of x (·, rows, columns) its u is (`inputs`), and the first column of y that is its
    own (`starts`, ascending multiples of `size`). S is `values` (o, kept) and `bits` (o, ceil(columns/8)), KEPT values
    to a full byte; `places` (256,) int32 has three bits for each of them, its column. `scales` (o, ceil(columns/group))
    or None; a byte's columns share one. `left` (o/size, size, size) or None, and size is then any divisor of o;
    `left_scales` (o,) or None; `bias` (o,) or None. `z` (rows, out) is scratch, `finished` (out/size,) int32 zero.
    FORM is for the tuner, which does not look into tuples.
    """
    tiles = tl.cdiv(size, TILE)
    block, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * TILE
    finished += block
    part = 0
    for i in tl.static_range(1, len(starts)):  # pyright: ignore[reportGeneralTypeIssues]  Triton's own loop
        part += (block * size >= starts[i]).to(tl.int32)
    start = _of(part, starts)
    block -= start // size
    x += _of(part, inputs) * rows * columns
    y += start
    z += start
    values, bits, scales, bias = _of(part, values), _of(part, bits), _of(part, scales), _of(part, bias)
    left, left_scales = _of(part, left), _of(part, left_scales)
    row, local = tl.arange(0, ROWS), first + tl.arange(0, TILE)
    o = block * size + local
    per_row = tl.cdiv(columns, 8)
    total = tl.zeros((ROWS, TILE, STEP), tl.float32)
    for start in range(0, per_row, STEP):
        j = start + tl.arange(0, STEP)
        inside = (local < size)[:, None] & (j < per_row)[None, :]
        byte = tl.load(bits + o.to(tl.int64)[:, None] * per_row + j[None, :], mask=inside, other=0)
        entry = tl.load(places + byte.to(tl.int32))
        if scales is not None:
            at = o.to(tl.int64)[:, None] * tl.cdiv(columns, group) + (j * 8 // group)[None, :]
            scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
        for r in tl.static_range(KEPT):  # pyright: ignore[reportGeneralTypeIssues]  Triton's own loop
            k = j * KEPT + r
            column = j[None, :] * 8 + ((entry >> 3 * r) & 7)
            there = inside & (k < kept)[None, :] & (column < columns)
            weights = _numbers(values, o.to(tl.int64)[:, None], kept, k[None, :], there).to(tl.float32)
            if scales is not None:
                weights *= scale
            vectors = tl.load(
                x + row[:, None, None] * columns + column[None, :, :],
                mask=(row < rows)[:, None, None] & there[None, :, :],
                other=0.0,
            )
            total += weights[None, :, :] * vectors.to(tl.float32)
    product = tl.sum(total, 2)
    where = row[:, None] * out + o[None, :]
    inside = (row < rows)[:, None] & (local < size)[None, :]
    if left is None:
        if bias is not None:
            product += tl.load(bias + o, mask=local < size, other=0.0).to(tl.float32)[None, :]
        tl.store(y + where, product.to(y.dtype.element_ty), mask=inside)
    else:
        tl.store(z + where, product.to(z.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # all threads have stored; the counter's release and acquire carry that to the last program
        if tl.atomic_add(finished, 1, sem="acq_rel") == tiles - 1:
            for first_row in range(0, size, TILE):
                y_local = first_row + tl.arange(0, TILE)
                y_column = block * size + y_local
                y_tile = _block_rows(z, left, left_scales, block, first_row, rows, out, size, ROWS, TILE, STEP)
                if bias is not None:
                    y_tile += tl.load(bias + y_column, mask=y_local < size, other=0.0).to(tl.float32)[None, :]
                y_inside = (row < rows)[:, None] & (y_local < size)[None, :]
                tl.store(y + row[:, None] * out + y_column[None, :], y_tile.to(y.dtype.element_ty), mask=y_inside)


@triton.autotune(_PRODUCT_CONFIGS, key=["size", "width", "ROWS", "STEP"])
@triton.jit
def product(
    x, values, bits, scales, bias, y,
    rows, out, size, width, kept, group,
    KEPT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """y = M x + bias for x (rows, out/size · width), M block diagonal of out/size blocks (size, width).

    M is a core of one block, with `bits`; or `values` (out, width) and no `bits`, each block below the other. `scales`
    (out, ceil(width/group)) or None; STEP divides group, or group is no less than width. Grid:
    out/size · ceil(size/TILE), ceil(rows/ROWS).
    """
    tiles = tl.cdiv(size, TILE)
    block, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * TILE
    row, local = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64), first + tl.arange(0, TILE)
    o = (block * size + local).to(tl.int64)
    columns = out // size * width
    total = tl.zeros((ROWS, TILE), tl.float32)
    for start in range(0, width, STEP):
        i = start + tl.arange(0, STEP)
        inside = (i < width)[:, None] & (local < size)[None, :]
        weights = _weights(values, bits, o[None, :], i[:, None], width, kept, inside, KEPT)
        vectors = tl.load(
            x + row[:, None] * columns + (block * width + i)[None, :],
            mask=(row < rows)[:, None] & (i < width)[None, :],
            other=0.0,
        )
        part = tl.dot(vectors, weights.to(tl.float32).to(vectors.dtype), input_precision="ieee")
        if scales is not None:
            at = o * tl.cdiv(width, group) + start // group
            part *= tl.load(scales + at, mask=local < size, other=0.0).to(tl.float32)[None, :]
        total += part
    if bias is not None:
        total += tl.load(bias + o, mask=local < size, other=0.0).to(tl.float32)[None, :]
    inside = (row < rows)[:, None] & (local < size)[None, :]
    tl.store(y + row[:, None] * out + o[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def unpack(values, bits, dense, columns, kept, KEPT: tl.constexpr, STEP: tl.constexpr):
    """dense (out, columns) = S. Grid: out, ceil(columns/STEP)."""
    o = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * STEP + tl.arange(0, STEP)
    inside = column < columns
    tl.store(dense + o * columns + column, _weights(values, bits, o, column, columns, kept, inside, KEPT), mask=inside)
