"""The logits of a model on blocks of text in one safetensors file, written and read block by block.

Tensor `logits.{k}` (length, vocabulary) is block k. All sizes are known before the first block. So the header is
written first and the file grows behind it. No more than one block is in memory, and a run that was killed goes on after
the last whole block.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from armor.core.errors import ArmorError
from armor.execution.files import open_safetensors
from armor.format.checksums import tensor_sha256

__all__ = ["LOGITS_VERSION", "LogitsFile", "read_logits"]

LOGITS_VERSION = 1
"""Of the file, in its metadata."""
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""safetensors' names."""


@dataclass(frozen=True)
class LogitsFile:
    """A file of logits in the making, at `path`: `blocks` times (`length`, `vocabulary`) in `dtype`."""

    path: Path
    blocks: int
    length: int
    vocabulary: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        return self.length * self.vocabulary * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """The logits' bytes, without the header."""
        return self.blocks * self.block_bytes

    def header(self) -> bytes:
        """The first bytes of the file, up to those of the first block."""
        entries: dict[str, object] = {"__metadata__": {"format_version": str(LOGITS_VERSION)}}
        for index in range(self.blocks):
            begin = index * self.block_bytes
            entries[f"logits.{index}"] = {
                "dtype": TYPES[self.dtype],
                "shape": [self.length, self.vocabulary],
                "data_offsets": [begin, begin + self.block_bytes],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def whole_blocks(self) -> int:
        """The blocks that are in the file from its beginning; 0 without a file."""
        head = self.header()
        size = self.path.stat().st_size if self.path.is_file() else 0
        return max(0, size - len(head)) // self.block_bytes

    def append(self, index: int, logits: Tensor) -> str:
        """Write block `index`, all before which are written; on disk when this returns. The SHA-256 of its tensor.

        Raises ArmorError for other logits than the file is for, and where the disk is full.
        """
        logits = logits.detach().cpu().contiguous()
        if (logits.shape, logits.dtype) != ((self.length, self.vocabulary), self.dtype):
            raise ArmorError(
                f"{self.path}: found logits {tuple(logits.shape)} in {logits.dtype}, expected "
                f"({self.length}, {self.vocabulary}) in {self.dtype}, as config.json says; set predictions_gb: 0"
            )
        head = self.header()
        try:
            with open(self.path, "r+b" if index else "wb") as file:
                if not index:
                    file.write(head)
                file.seek(len(head) + index * self.block_bytes)
                file.write(logits.view(torch.uint8).numpy().data)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ArmorError(f"{self.path}: cannot be written ({error.strerror}); make room and run again") from error
        return tensor_sha256(logits)


def read_logits(path: Path, hashes: Sequence[str], wanted: Iterable[int]) -> Iterator[Tensor]:
    """The logits (length, vocabulary) of the blocks `wanted`, one by one, each held against its hash.

    The file is opened for each, so that no more than two blocks are mapped. Raises ArmorError if the file is
    missing or broken, of another version, or a block is not what was written.
    """
    for index in wanted:
        with open_safetensors(path) as file:
            version = (file.metadata() or {}).get("format_version")
            if version != str(LOGITS_VERSION):
                raise ArmorError(f"{path}: format {version!r}, expected {LOGITS_VERSION}; run armor predict again")
            if f"logits.{index}" not in file.keys():
                raise ArmorError(f"{path}: holds no block {index}; run armor predict again")
            logits = file.get_tensor(f"logits.{index}")
        if tensor_sha256(logits) != hashes[index]:
            raise ArmorError(f"{path}: block {index}: not what was written; run armor predict again")
        yield logits
        del logits
