"""The hidden states of token sequences before one decoder layer, layer_{k}.safetensors: a tensor, read by sequence.

It is (sequences, 1, length, hidden); some families have more of them. Where layers take more of earlier ones, that is
in the file too, as carried_1 and so on. It is written row by row: all of it need not fit into memory. The tokens lie
beside, in tokens.safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from armor.core.errors import ArmorError
from armor.execution.files import atomic_path, open_safetensors
from armor.format.names import layer_file
from armor.format.shards import DTYPES, dtype_name

__all__ = ["FEWER", "STATES_VERSION", "StatesReader", "StatesWriter", "open_states", "states_file", "write_states"]

STATES_VERSION = 2
NAME = "states"
FEWER = "use fewer or shorter sequences"
"""What takes less room."""


def states_file(folder: Path, layer: int) -> Path:
    """The file of what goes into decoder layer `layer`; that of the number of layers is what comes out of the last."""
    return layer_file(folder, layer)


class StatesWriter:
    """Takes the states of one sequence after the other."""

    def __init__(self, file: BinaryIO, start: int, like: Sequence[Tensor], count: int) -> None:
        self._file, self._like = file, like
        self._places = [start + count * before for before in accumulate((one.nbytes for one in like), initial=0)]

    def add(self, states: Sequence[Tensor]) -> None:
        """Add the states of the next sequence, on any device: hidden states, and what is carried with them."""
        for number, (tensor, like) in enumerate(zip(states, self._like, strict=True)):
            row = tensor.detach().to("cpu", like.dtype).reshape(like.shape).contiguous()
            self._file.seek(self._places[number])
            self._places[number] += self._file.write(row.view(-1).view(torch.uint8).numpy().data)


@contextmanager
def write_states(path: Path, like: Sequence[Tensor], count: int, about: str = "") -> Iterator[StatesWriter]:
    """Write the states of `count` sequences atomically; `about` says which, for who reads them.

    `like` are those of one sequence, on any device, hidden states (1, length, hidden) first: shapes and dtypes count.
    """
    header: dict[str, Any] = {"__metadata__": {"about": about, "format_version": str(STATES_VERSION)}}
    end = 0
    for number, tensor in enumerate(like):
        dtype = next(key for key, (torch_name, _) in DTYPES.items() if torch_name == dtype_name(tensor.dtype))
        offsets = [end, end := end + count * tensor.nbytes]
        header[_name(number)] = {"dtype": dtype, "shape": (count, *tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        yield StatesWriter(file, file.tell(), like, count)


def _name(number: int) -> str:
    """What the file calls one of the tensors that make a state."""
    return f"carried_{number}" if number else NAME


class StatesReader:
    """The states of a file by sequence, and `about` as it was written.

    Each sequence is mapped on its own: the memory of a job does not grow with those that it has read.
    """

    def __init__(self, path: Path, count: int, about: str) -> None:
        self._path, self._names = path, [_name(number) for number in range(count)]
        self.about = about

    def row(self, index: int) -> tuple[Tensor, ...]:
        """The states of one sequence: hidden states (1, length, hidden), and what is carried with them."""
        with open_safetensors(self._path) as file:
            return tuple(file.get_slice(name)[index] for name in self._names)


def open_states(path: Path) -> StatesReader:
    """The states in a file. Raises ArmorError if it is missing, broken or of another version."""
    with open_safetensors(path) as file:
        metadata, names = file.metadata() or {}, file.keys()
        version = metadata.get("format_version")
        if version != str(STATES_VERSION):
            raise ArmorError(f"{path}: format {version!r}, expected {STATES_VERSION}; run armor states again")
        if NAME not in names:
            raise ArmorError(f"{path}: holds no hidden states; run armor states again")
    return StatesReader(path, len(names), metadata.get("about", ""))
