"""Hidden states of all sequences between two decoder layers: on disk, and up to a limit in memory as well.

What goes into a layer and what comes out of it are two files, `hidden_{k}` and `hidden_{k+1}`. So a run that is killed
in layer k finds its input whole. The one is deleted when the other is on disk and the layer's statistics are. Memory
only saves reading: what fits below the limit is not read back. The price is disk, twice all hidden states, and the time
to write them once a layer (docs/RESULTS.md has it for 70 billion parameters). Keeping them in memory alone would
save both, and after a kill every layer up to that point would have to be run again.

The files are read and written, not mapped: mapped pages would count as the process's memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from armor.core.errors import ArmorError
from armor.runtime.calls import State

__all__ = ["HiddenStates", "states_file"]


def states_file(folder: Path, layer: int) -> Path:
    """The file of what goes into decoder layer `layer`."""
    return folder / f"hidden_{layer}"


class HiddenStates:
    """`count` states that go into a decoder layer, about `limit` bytes of them at most in memory too.

    `likes` are those of one sequence before each layer and after the last: shapes and dtypes count. With `layer` 0 they
    are written first, for a later one they are in `folder` from a run before; use it with `with`. Raises
    ArmorError if the disk is full.
    """

    def __init__(self, count: int, likes: Sequence[State], limit: float, folder: Path, layer: int = 0) -> None:
        largest = max(map(_bytes, likes))
        self._in_memory = min(count, int(limit // largest))
        self._likes, self._folder, self._layer = likes, folder, layer
        self.dtype = likes[0][0].dtype
        self.bytes = count * largest
        self.spilled_bytes = (count - self._in_memory) * largest
        for old in folder.glob("hidden_*"):
            if not layer or old != states_file(folder, layer):
                old.unlink()
        needed, free = (1 if layer else 2) * self.bytes, shutil.disk_usage(folder).free
        if needed > free:
            raise self._full(f"{free / 1e9:.3g} GB are free")
        self._memory: dict[int, State] = {}
        self._read: BinaryIO | None = None
        self._written: BinaryIO | None = None
        if layer:
            self._read = open(states_file(folder, layer), "rb", buffering=0)
            for index in range(self._in_memory):
                self._memory[index] = self._from_disk(index)

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._read, self._written):
            if file is not None:
                file.close()

    def read(self, index: int) -> State:
        """State number `index` of the layer's input; it may share memory with what is kept, so don't write to it."""
        return self._memory[index] if index < self._in_memory else self._from_disk(index)

    def write(self, index: int, state: State) -> None:
        """Keep `state` as number `index` of the next layer's input; this layer's may not be read any more."""
        number = self._layer + (self._read is not None)
        if self._written is None:
            self._written = open(states_file(self._folder, number), "wb", buffering=0)
        like = self._likes[number]
        state = tuple(mine.to("cpu", its.dtype).contiguous() for mine, its in zip(state, like, strict=True))
        if index < self._in_memory:
            self._memory[index] = state
        self._transfer(self._written, "write", index * _bytes(like), state)

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

    def _from_disk(self, index: int) -> State:
        like = self._likes[self._layer]
        state = tuple(torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in like)
        self._transfer(self._read, "readinto", index * _bytes(like), state)
        return state

    def _transfer(self, file: BinaryIO | None, what: str, start: int, state: State) -> None:
        assert file is not None
        try:
            file.seek(start)
            for tensor in state:
                view: Any = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]  numpy has a buffer
                while view:
                    if not (count := getattr(file, what)(view)):
                        raise ArmorError(f"{file.name}: is too short; delete {self._folder} and calibrate again")
                    view = view[count:]
        except OSError as error:
            raise self._full(str(error.strerror)) from None

    def _full(self, reason: str) -> ArmorError:
        return ArmorError(
            f"{self._folder}: hidden states need {2 * self.bytes / 1e9:.3g} GB on this disk: {reason}; free it, "
            "or use fewer or shorter sequences"
        )


def _bytes(state: State) -> int:
    return sum(tensor.nbytes for tensor in state)
