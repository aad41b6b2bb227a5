"""Memory that a piece of work takes, and devices with too little: torch fails with its own errors there."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from armor.execution.machine import resident_memory_bytes
from tests.forks import fork

_FORGET = Path("/proc/self/clear_refs")
TOLD = pytest.mark.skipif(not _FORGET.exists(), reason="the peak is read from /proc")
"""For tests that ask what a piece of work took at its peak."""
_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE = 65536
"""What has this many bytes is given back to the system when it is freed."""


class _Heaps(ctypes.Structure):
    """What glibc's mallinfo2 says, in bytes; `fordblks` is free."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split())


class NoRoom(TorchDispatchMode):
    """While it lasts there is no room for operations in which `too_large(name, tensor)` is true of a tensor.

    They fail as on a GPU, or else as torch's own allocator does on the CPU. `failed` counts.
    """

    def __init__(self, too_large: Callable[[str, Tensor], bool], as_on_a_gpu: bool = True) -> None:
        super().__init__()
        self.too_large, self.as_on_a_gpu, self.failed = too_large, as_on_a_gpu, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if any(isinstance(each, Tensor) and self.too_large(name, each) for each in (*args, result)):
            self.failed += 1
            if self.as_on_a_gpu:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            torch.empty(2**60, dtype=torch.uint8)
        return result


def card_of(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let every CUDA device have `size` bytes: what the driver says stands in for a card."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=size, name="a card")
    )


def host_of(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    """Let the host have `size` bytes: what the kernel says stands in for a machine."""
    found = psutil.virtual_memory()._replace(total=int(size))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)


def forget_peak() -> None:
    """Set the kernel's high-water mark of this process's memory back to what it holds."""
    _FORGET.write_text("5")


def held_bytes() -> int:
    """The memory of this process, without what it no longer needs: the work to come must not have that for nothing."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_memory_bytes()


def _take_what_is_free() -> None:
    """Leave no room in this process's heaps for what is larger than `_LARGE`: that then comes from the system."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, _LARGE)
    libc.malloc_trim(0)  # gives nothing back of the end of a thread's heap
    libc.mallinfo2.restype = _Heaps
    for _ in range(libc.mallinfo2().fordblks // _LARGE + 1):
        libc.malloc(_LARGE - 16)


def printed_last(measure: Callable[[], object]) -> int:
    """The last number that `measure` prints, in a fork in which freed memory goes back to the system at once."""

    def work() -> None:
        _take_what_is_free()
        measure()

    done = fork(work, Path.cwd())
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])
