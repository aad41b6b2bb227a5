"""The hidden states of token sequences before one decoder layer, layer_{k}.safetensors: one tensor, read by sequence.

It is written row by row: all of it need not fit into memory. The tokens lie beside, in tokens.safetensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from armor.core.errors import ArmorError
from armor.execution.files import atomic_path, open_safetensors
from armor.format.names import layer_file
from armor.format.shards import DTYPES, dtype_name

__all__ = ["STATES_VERSION", "StatesReader", "StatesWriter", "open_states", "room_for", "states_file", "write_states"]

STATES_VERSION = 1
NAME = "states"


def states_file(folder: Path, layer: int) -> Path:
    """The file of what goes into decoder layer `layer`; that of the number of layers is what comes out of the last."""
    return layer_file(folder, layer)


def room_for(needed: int, folder: Path) -> None:
    """Raise ArmorError if the disk of `folder` has no room for `needed` bytes of states."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ArmorError(
            f"{folder}: hidden states need {needed / 1e9:.3g} GB on this disk, {free / 1e9:.3g} GB are free; make "
            "room, or use fewer or shorter sequences"
        )


class StatesWriter:
    """Takes the states of one sequence after the other, (length, hidden) each."""

    def __init__(self, file: BinaryIO, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self._file, self._shape, self._dtype = file, shape, dtype

    def add(self, states: Tensor) -> None:
        """Add the states (length, hidden) of the next sequence, on any device."""
        row = states.detach().to("cpu", self._dtype).reshape(self._shape[1:]).contiguous()
        self._file.write(row.view(-1).view(torch.uint8).numpy().data)


@contextmanager
def write_states(
    path: Path, shape: tuple[int, int, int], dtype: torch.dtype, about: str = ""
) -> Iterator[StatesWriter]:
    """Write states of `shape` (sequences, length, hidden) atomically; `about` says which, for who reads them."""
    size = torch.empty(shape, dtype=dtype, device="meta").nbytes
    name = next(key for key, (torch_name, _) in DTYPES.items() if torch_name == dtype_name(dtype))
    about_it = {"about": about, "format_version": str(STATES_VERSION)}
    header = {"__metadata__": about_it, NAME: {"dtype": name, "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        yield StatesWriter(file, shape, dtype)


class StatesReader:
    """The states of a file: `shape` (sequences, length, hidden), `about` as it was written."""

    def __init__(self, file) -> None:
        self._slice = file.get_slice(NAME)
        self.shape: tuple[int, int, int] = tuple(self._slice.get_shape())
        self.about: str = (file.metadata() or {}).get("about", "")

    def __len__(self) -> int:
        return self.shape[0]

    def row(self, index: int) -> Tensor:
        """The states (1, length, hidden) of one sequence."""
        return self._slice[index : index + 1]


@contextmanager
def open_states(path: Path) -> Iterator[StatesReader]:
    """The states in a file. Raises ArmorError if it is missing, broken or of another version."""
    with open_safetensors(path) as file:
        version = (file.metadata() or {}).get("format_version")
        if version != str(STATES_VERSION):
            raise ArmorError(f"{path}: format {version!r}, expected {STATES_VERSION}; run armor states again")
        if NAME not in file.keys():  # noqa: SIM118  not a dictionary
            raise ArmorError(f"{path}: holds no hidden states; run armor states again")
        yield StatesReader(file)
