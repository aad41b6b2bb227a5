"""Safetensors files whose header is real and whose data are a hole: as long as the real ones, they take no room.

Whoever reads headers (shapes, dtypes, sizes of files) cannot tell them from a model. Whoever reads a tensor gets zeros.
So what a stage estimates of a model can be asked before the model is there.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Hole", "write_holes"]


class Hole(NamedTuple):
    """A tensor without data: its dtype by safetensors' name, its shape, its bytes."""

    dtype: str
    shape: Sequence[int]
    bytes: int


def write_holes(path: Path, tensors: Mapping[str, Hole], metadata: Mapping[str, str] | None = None) -> None:
    """Write the header of `tensors`, in their order, and make the file as long as their data. Needs a file system with
    sparse files. `metadata` unset: those of a model."""
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    for name, hole in tensors.items():
        begin, end = end, end + hole.bytes
        header[name] = {"dtype": hole.dtype, "shape": [*hole.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
