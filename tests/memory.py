"""Devices with too little memory: torch fails with its own errors where a test says that there is no room."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NoRoom", "card_of", "host_of"]


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
