"""The tensors of a Hugging Face folder, read one at a time.

The headers of all shards are read first, by safetensors, and held against the files' sizes and the index. So a shard
that is truncated or of another model is found before any work starts. A tensor's bytes are read here, straight into the
memory that it will live in. A weight that is stored as FP8 or MXFP4, with scales, is one dense tensor here
(`armor.format.scaled`). Format: https://huggingface.co/docs/safetensors. Torch is imported when a tensor is read.
"""

from __future__ import annotations

import copy
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from armor.core.errors import ArmorError
from armor.execution.files import read_json
from armor.format.scaled import DTYPE, fp8, mxfp4, scaled_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["DTYPES", "INDEX", "PIECE", "SINGLE", "WIDTHS", "Part", "Shards", "dtype_name"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {  # safetensors' name: (torch's name, bytes)
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
WIDTHS = dict(DTYPES.values())
"""Bytes of a number by torch's name of its dtype."""
PIECE = 16 << 20
"""Bytes that are read at a time where they do not go straight into a tensor."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as a configuration and a record have it: bfloat16, not torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class _Entry:
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int
    part: Part | None = None
    block: tuple[int, ...] = ()  # what is read for a part
    joined: tuple[_Entry, ...] = ()  # what it is made of, one behind the other in the axis `axis`
    axis: int = 0
    scaled: tuple[_Entry, _Entry] | None = None  # numbers and scales, where the files hold those
    scales_block: tuple[int, int] | None = None
    stored: int = 0  # bytes on disk, where these are others

    def expert(self, number: int) -> _Entry:
        """The place of one expert's own in a tensor that has those of all in its first axis."""
        each = self.bytes // self.shape[0]
        return replace(self, shape=self.shape[1:], start=self.start + number * each, bytes=each)


@dataclass(frozen=True)
class Part:
    """Rows of `tensor`, a matrix (out, in) or bias (out,), or of one expert's, if it has all in its first axis.

    A matrix is stored as (in, out) where `transposed`.
    """

    tensor: str
    expert: int | None
    rows: slice
    transposed: bool

    def of(self, block: Tensor) -> Tensor:
        """The part of an expert's `block` of the tensor."""
        return self._view(block).contiguous()

    def put(self, block: Tensor, tensor: Tensor) -> None:
        """Write `tensor` to its place in an expert's block."""
        self._view(block).copy_(tensor)

    def _view(self, block: Tensor) -> Tensor:
        return (block.T if self.transposed else block)[self.rows]


class Shards:
    """The tensors of `folder` (a Hugging Face model, one safetensors file or several with an index).

    Opening reads the headers only. Raises ArmorError if a shard is missing, truncated or not safetensors, if a tensor
    is in two shards, or if index and shards disagree.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        index = self.folder / INDEX
        if index.is_file():
            weight_map = _read_index(index)
            self.files = sorted(set(weight_map.values()))
        elif (self.folder / SINGLE).is_file():
            weight_map, self.files = None, [SINGLE]
        else:
            raise ArmorError(f"{self.folder}: holds neither {SINGLE} nor {INDEX}; expected a model in safetensors")
        self._entries: dict[str, _Entry] = {}
        for file in self.files:
            for name, entry in _read_header(self.folder / file).items():
                if name in self._entries:
                    raise ArmorError(
                        f"{self.folder / file}: {name} is also in {self._entries[name].file}; save the model again"
                    )
                self._entries[name] = entry
        if weight_map is not None:
            for name, file in weight_map.items():
                if name not in self._entries or self._entries[name].file != file:
                    raise ArmorError(
                        f"{index}: says that {name} is in {file}, which does not hold it; fetch both again"
                    )
        self._join_scaled()

    def _join_scaled(self) -> None:
        """Put dense tensors in the place of numbers and their scales."""
        tensors = {name: (entry.dtype, entry.shape) for name, entry in self._entries.items()}
        if not any(name.endswith("_blocks") or dtype == "float8_e4m3fn" for name, (dtype, _) in tensors.items()):
            return
        config = self.folder / "config.json"
        quantization = read_json(config).get("quantization_config") if config.is_file() else None
        for name, own in scaled_tensors(tensors, quantization, self.folder).items():
            numbers, scales = self._entries.pop(own.numbers), self._entries.pop(own.scales)
            self._entries[name] = replace(
                numbers,
                dtype=DTYPE,
                shape=own.shape,
                bytes=2 * math.prod(own.shape),
                scaled=(numbers, scales),
                scales_block=own.block,
                stored=numbers.bytes + scales.bytes,
            )

    @property
    def place(self) -> Path:
        """The file to name where a tensor is missing: the only one, or the index of several."""
        return self.folder / (self.files[0] if self.files == [SINGLE] else INDEX)

    def where(self, tensor: str) -> str:
        """File and tensor, as error messages begin."""
        return f"{self.folder}/{self.file_of(tensor)}: {tensor}"

    def renamed(self, name: Callable[[str], str]) -> Shards:
        """The same tensors under the names that `name` gives them."""
        other = copy.copy(self)
        other._entries = {name(old): entry for old, entry in self._entries.items()}
        return other

    def split(self, parts: Mapping[str, Part]) -> Shards:
        """The same tensors, with `parts` by name in the place of those that they are of; all of a tensor, or none."""
        other = copy.copy(self)
        whole = {part.tensor for part in parts.values()} & self._entries.keys()
        other._entries = {name: entry for name, entry in self._entries.items() if name not in whole}
        for name, part in parts.items():
            if part.tensor in whole:
                entry = self._entries[part.tensor]
                own = entry if part.expert is None else entry.expert(part.expert)
                block = own.shape
                shape = block[::-1] if part.transposed else block
                rows = len(range(*part.rows.indices(shape[0])))
                other._entries[name] = replace(
                    own,
                    shape=(rows, *shape[1:]),
                    bytes=own.bytes // shape[0] * rows,
                    part=part,
                    block=block,
                    stored=entry.stored * own.bytes // entry.bytes // shape[0] * rows,
                )
        return other

    def turned(self, names: Iterable[str]) -> Shards:
        """The same tensors, with the matrices `names` transposed."""
        other, turn = copy.copy(self), Part("", 0, slice(None), transposed=True)
        shapes = {name: self.shape(name) for name in names}
        turned = {n: replace(self._entries[n], shape=s[::-1], part=turn, block=s) for n, s in shapes.items()}
        other._entries = self._entries | turned
        return other

    def joined(self, groups: Mapping[str, Sequence[str]], axis: int, keep: bool = True) -> Shards:
        """The same tensors, and those of `groups` by name: each is made of others, one behind the other in `axis`.

        Those others stay too, unless `keep` is false.
        """
        other = copy.copy(self)
        other._entries = dict(self._entries)
        for name, parts in groups.items():
            entries = tuple(self._entry(part) for part in parts)
            shape = list(entries[0].shape)
            shape[axis] = sum(entry.shape[axis] for entry in entries)
            size, stored = sum(entry.bytes for entry in entries), sum(entry.stored for entry in entries)
            other._entries[name] = replace(
                entries[0], shape=tuple(shape), bytes=size, joined=entries, axis=axis, stored=stored
            )
        if not keep:
            for part in {part for parts in groups.values() for part in parts}:
                del other._entries[part]
        return other

    def also(self, names: Mapping[str, str]) -> Shards:
        """The same tensors, and some of them under a second name: `names` has the first by the second."""
        other = copy.copy(self)
        other._entries = self._entries | {second: self._entry(first) for second, first in names.items()}
        return other

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise ArmorError(f"{self.folder}: has no tensor {name}; is this the model that was inspected?") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises ArmorError if there is none of that name, as the other methods do."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """The dtype of a tensor by torch's name, like bfloat16."""
        return self._entry(name).dtype

    def file_of(self, name: str) -> str:
        """The name, within the folder, of the file that holds a tensor."""
        return self._entry(name).file

    def bytes_of(self, name: str) -> int:
        """The size of a tensor in its dtype."""
        return self._entry(name).bytes

    def stored_bytes(self, name: str) -> int:
        """The size of a tensor on disk, with its scales; less than in its dtype if it is stored as FP8 or MXFP4."""
        entry = self._entry(name)
        return entry.stored or entry.bytes

    def main_bits(self) -> float:
        """The bits on disk of a number of `main_dtype`; of a weight with its scales where some are stored so."""
        scaled = [entry for entry in self._entries.values() if entry.scaled]
        if scaled:
            return 8 * sum(entry.stored for entry in scaled) / sum(math.prod(entry.shape) for entry in scaled)
        return 8.0 * WIDTHS[self.main_dtype()]

    def main_dtype(self) -> str:
        """The floating-point dtype that most of the model's bytes have."""
        total: dict[str, int] = {}
        for entry in self._entries.values():
            if "float" in entry.dtype and WIDTHS[entry.dtype] > 1:  # fp8 has scales, and is no dtype of a model
                total[entry.dtype] = total.get(entry.dtype, 0) + entry.bytes
        if not total:
            raise ArmorError(f"{self.folder}: its safetensors files hold no floating-point tensor; not a model")
        return max(total, key=lambda dtype: total[dtype])

    def mapped(self, file: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one shard in the order of their bytes, as views of the mapped file.

        They count as the process's memory while the mapping is open, but the system may take them back at any time.
        """
        import torch

        entries = [(name, entry) for name, entry in self._entries.items() if entry.file == file and entry.bytes]
        if not entries:
            return
        with open(self.folder / file, "rb") as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants a buffer it could write to
        for name, entry in sorted(entries, key=lambda pair: pair[1].start):
            dtype: torch.dtype = getattr(torch, entry.dtype)
            begin, stop = entry.start, entry.start + entry.bytes
            # Other writers than safetensors' own may not align the data.
            source, offset = (data, begin) if begin % dtype.itemsize == 0 else (bytearray(data[begin:stop]), 0)
            flat = torch.frombuffer(source, dtype=dtype, offset=offset, count=entry.bytes // dtype.itemsize)
            yield name, flat.view(entry.shape)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor on the CPU, in its own dtype or converted to `dtype`. Raises ArmorError if it cannot be read."""
        return self._read_any(self._entry(name), dtype)

    def _read_any(self, entry: _Entry, dtype: torch.dtype | None) -> Tensor:
        if entry.joined:
            import torch

            return torch.cat([self._read_any(part, dtype) for part in entry.joined], entry.axis)
        if entry.scaled is not None:
            dense = self._dense(entry)
            return dense if dtype is None else dense.to(dtype)
        return self._read(entry, dtype)

    def _dense(self, entry: _Entry) -> Tensor:
        """A weight of its numbers and scales, an expert at a time."""
        import torch

        numbers, scales = entry.scaled or (entry, entry)
        if entry.scales_block is not None:
            dense = fp8(self._read(numbers), self._read(scales), entry.scales_block).to(getattr(torch, DTYPE))
            return dense if entry.part is None else entry.part.of(dense)
        if entry.part is not None and (number := entry.part.expert) is not None:
            dense = mxfp4(self._read(numbers.expert(number)), self._read(scales.expert(number)))
            return entry.part.of(dense.to(getattr(torch, DTYPE)))
        whole = torch.empty(entry.shape, dtype=getattr(torch, DTYPE))
        for number, block in enumerate(whole):
            block.copy_(mxfp4(self._read(numbers.expert(number)), self._read(scales.expert(number))))
        return whole

    def _read(self, entry: _Entry, dtype: torch.dtype | None = None) -> Tensor:
        import torch

        # Not by safetensors' own get_tensor: it maps the file, whose pages then count as the process's memory, and it
        # converts no dtype, so that a tensor would take its room once more (docs/TRIED.md).
        stored: torch.dtype = getattr(torch, entry.dtype)
        out = torch.empty(entry.shape if entry.part is None else entry.block, dtype=dtype or stored)
        flat = out.view(-1)
        path = self.folder / entry.file
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(entry.start)
                if out.dtype == stored:
                    _fill(file, flat, path)
                else:
                    step = PIECE // stored.itemsize
                    piece = torch.empty(min(step, flat.numel()), dtype=stored)
                    for begin in range(0, flat.numel(), step):
                        part = piece[: flat.numel() - begin]
                        _fill(file, part, path)
                        flat[begin : begin + step] = part
        except OSError as error:
            raise ArmorError(f"{path}: {error.strerror}; fetch the model again") from None
        return out if entry.part is None else entry.part.of(out)


def _read_index(path: Path) -> dict[str, str]:
    """Which file of the folder holds which tensor, as the index at `path` says."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArmorError(f"{path}: its weight_map is no table of tensors and files; fetch or copy it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or file != Path(file).name:
            raise ArmorError(
                f"{path}: {name}: says it is in {file!r}, expected a safetensors file of this folder; fetch it again"
            )
    return weight_map


def _fill(file, flat: Tensor, path: Path) -> None:
    """Fill `flat` (n,) with the next bytes of `file`."""
    import torch

    target = memoryview(flat.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]  numpy has a buffer
    while target:
        count = file.readinto(target)
        if not count:
            raise ArmorError(f"{path}: truncated, {len(target)} bytes are missing; fetch or copy it again")
        target = target[count:]


def _read_header(path: Path) -> dict[str, _Entry]:
    """The entries of a safetensors file. Safetensors itself holds them against each other and the file's size."""
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size if path.is_file() else 0
    try:
        with safe_open(path, "numpy") as file:  # "pt" would import torch
            parts = [(name, file.get_slice(name)) for name in file.offset_keys()]
            header = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in parts]
    except FileNotFoundError:
        raise ArmorError(f"{path}: this shard is missing; fetch or copy the model again") from None
    except SafetensorError as error:
        raise ArmorError(
            f"{path}: truncated, damaged or not safetensors ({size} bytes; {' '.join(str(error).split())}); fetch or "
            "copy it again"
        ) from None
    except OSError as error:
        raise ArmorError(f"{path}: {error.strerror or error}; expected a safetensors file") from None
    if unknown := [(name, dtype) for name, dtype, _ in header if dtype not in DTYPES]:
        raise ArmorError(f"{path}: {unknown[0][0]}: dtype {unknown[0][1]}, expected one of {', '.join(DTYPES)}")
    places = [(name, *DTYPES[dtype], shape) for name, dtype, shape in header]
    start = size - sum(math.prod(shape) * width for *_, width, shape in places)  # they fill the file to its end
    entries = {}
    for name, dtype, width, shape in places:
        entries[name] = _Entry(path.name, dtype, shape, start, math.prod(shape) * width)
        start += entries[name].bytes
    return entries
