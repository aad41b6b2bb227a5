"""Hidden states of all sequences between two decoder layers: on disk, and up to a limit in memory as well.

What goes into a layer and what comes out of it are two files, `hidden_{k}` and `hidden_{k+1}`. So a run that is killed
in layer k finds its input whole. The one is deleted when the other is on disk and the layer's statistics are. Memory
only saves reading: what fits below the limit is not read back. The price is disk, twice all hidden states, and the time
to write them once a layer (docs/log/workflow.md has it for 70 billion parameters). Keeping them in memory alone would
save both, and after a kill every layer up to that point would have to be run again.

The files are read and written, not mapped: mapped pages would count as the process's memory.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from armor.core.errors import ArmorError

__all__ = ["HiddenStates", "states_file"]


def states_file(folder: Path, layer: int) -> Path:
    """The file of what goes into decoder layer `layer`."""
    return folder / f"hidden_{layer}"


class HiddenStates:
    """`count` tensors of one shape and dtype that go into a decoder layer, at most `limit` bytes of them in memory too.

    With `layer` 0 they are written first, for a later one they are in `folder` from a run before; use it with `with`.
    Raises ArmorError if the disk is full.
    """

    def __init__(
        self, count: int, shape: tuple[int, ...], dtype: torch.dtype, limit: float, folder: Path, layer: int = 0
    ) -> None:
        self._each = torch.empty(shape, dtype=dtype, device="meta").nbytes
        self._in_memory = min(count, int(limit // self._each))
        self.dtype, self._shape, self._folder, self._layer = dtype, shape, folder, layer
        self.bytes = count * self._each
        self.spilled_bytes = (count - self._in_memory) * self._each
        for old in folder.glob("hidden_*"):
            if not layer or old != states_file(folder, layer):
                old.unlink()
        needed, free = (1 if layer else 2) * self.bytes, shutil.disk_usage(folder).free
        if needed > free:
            raise self._full(f"{free / 1e9:.3g} GB are free")
        self._memory = torch.empty((self._in_memory, *shape), dtype=dtype)
        self._read: BinaryIO | None = None
        self._written: BinaryIO | None = None
        if layer:
            self._read = open(states_file(folder, layer), "rb", buffering=0)
            for index in range(self._in_memory):
                self._transfer(self._read, "readinto", index, self._memory[index])

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._read, self._written):
            if file is not None:
                file.close()

    def read(self, index: int) -> Tensor:
        """Tensor number `index` of the layer's input; it may share memory with what is kept, so don't write to it."""
        if index < self._in_memory:
            return self._memory[index]
        tensor = torch.empty(self._shape, dtype=self.dtype)
        self._transfer(self._read, "readinto", index, tensor)
        return tensor

    def write(self, index: int, tensor: Tensor) -> None:
        """Keep `tensor` as number `index` of the next layer's input; this layer's may not be read any more."""
        if self._written is None:
            self._written = open(states_file(self._folder, self._layer + (self._read is not None)), "wb", buffering=0)
        tensor = tensor.to("cpu", self.dtype).contiguous()
        if index < self._in_memory:
            self._memory[index].copy_(tensor)
        self._transfer(self._written, "write", index, tensor)

    def turn(self) -> None:
        """What was written is the next layer's input, whole and on disk: from now on it is read."""
        assert self._written is not None  # all of them were written
        os.fsync(self._written.fileno())
        self._written.close()
        if self._read is not None:
            self._read.close()
            self._layer += 1
        self._written, self._read = None, open(states_file(self._folder, self._layer), "rb", buffering=0)

    def forget(self) -> None:
        """Delete what went into the layer before."""
        states_file(self._folder, self._layer - 1).unlink(missing_ok=True)

    def _transfer(self, file: BinaryIO | None, what: str, index: int, tensor: Tensor) -> None:
        view: Any = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        assert file is not None
        try:
            file.seek(index * self._each)
            while view:
                view = view[getattr(file, what)(view) :]
        except OSError as error:
            raise self._full(str(error.strerror)) from None

    def _full(self, reason: str) -> ArmorError:
        return ArmorError(
            f"{self._folder}: hidden states need {2 * self.bytes / 1e9:.3g} GB on this disk: {reason}; free it, "
            "or use fewer or shorter sequences"
        )
