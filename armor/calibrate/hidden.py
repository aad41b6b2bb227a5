"""Hidden states of all sequences between two decoder layers: in memory up to a limit, in a file beyond it.

The file is read and written, not mapped (mapped pages would count as the process's memory), and it has no name: the
system frees it when the process ends, however it ends.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from armor.errors import ArmorError

__all__ = ["HiddenStates"]


class HiddenStates:
    """`count` tensors of one shape and dtype, of which at most `limit` bytes are in memory; use it with `with`.

    The rest is in an unnamed file in `folder`. Raises ArmorError if that disk is full.
    """

    def __init__(self, count: int, shape: tuple[int, ...], dtype: torch.dtype, limit: float, folder: Path) -> None:
        self._each = torch.empty(shape, dtype=dtype, device="meta").nbytes
        self._in_memory = min(count, int(limit // self._each))
        self._memory = torch.empty((self._in_memory, *shape), dtype=dtype)
        self.dtype, self._shape, self._folder = dtype, shape, folder
        self.bytes = count * self._each
        self.spilled_bytes = (count - self._in_memory) * self._each
        free = shutil.disk_usage(folder).free if self.spilled_bytes else 0
        if self.spilled_bytes > free:
            raise self._full(f"{free / 1e9:.3g} GB are free")
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0) if self.spilled_bytes else None

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, index: int) -> Tensor:
        """Tensor number `index`; it may share memory with what is kept, so don't write to it."""
        if index < self._in_memory:
            return self._memory[index]
        tensor = torch.empty(self._shape, dtype=self.dtype)
        self._transfer("readinto", index, tensor)
        return tensor

    def write(self, index: int, tensor: Tensor) -> None:
        """Keep `tensor` as number `index`."""
        if index < self._in_memory:
            self._memory[index].copy_(tensor)
        else:
            self._transfer("write", index, tensor.to("cpu", self.dtype).contiguous())

    def _transfer(self, what: str, index: int, tensor: Tensor) -> None:
        view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        try:
            self._file.seek((index - self._in_memory) * self._each)
            while view:
                view = view[getattr(self._file, what)(view) :]
        except OSError as error:
            raise self._full(str(error.strerror)) from None

    def _full(self, reason: str) -> ArmorError:
        return ArmorError(
            f"{self._folder}: hidden states need {self.spilled_bytes / 1e9:.3g} GB on this disk: {reason}; free it, "
            "raise hidden_states_memory_gb, or use fewer sequences"
        )
