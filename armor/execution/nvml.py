"""What NVIDIA's driver knows of its cards, through its own library (NVML), which starts no CUDA.

Imported only where a device is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pynvml

__all__ = ["Unit", "cards"]


@dataclass(frozen=True)
class Unit:
    """What can be computed on by itself: a card, or an instance of a card that is split. Memory in bytes."""

    uuid: str
    model: str | None
    memory_bytes: int | None
    used_bytes: int | None


def cards() -> list[list[Unit]]:
    """Of every card, in the driver's order, what to compute on: its MIG instances if it is split, or else itself.

    A card that the driver has lost keeps its place, with nothing in it. Without a driver there are no cards.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # the library is not installed, or there is no driver behind it
        return []
    try:
        return [_known(_units, index) or [] for index in range(_known(pynvml.nvmlDeviceGetCount) or 0)]
    finally:
        pynvml.nvmlShutdown()


def _units(index: int) -> list[Unit]:
    card = pynvml.nvmlDeviceGetHandleByIndex(index)
    split, _ = _known(pynvml.nvmlDeviceGetMigMode, card) or (pynvml.NVML_DEVICE_MIG_DISABLE, None)
    count = pynvml.nvmlDeviceGetMaxMigDeviceCount(card) if split == pynvml.NVML_DEVICE_MIG_ENABLE else 0
    instances = [_known(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, card, number) for number in range(count)]
    return [_unit(handle) for handle in instances if handle] or [_unit(card)]


def _unit(handle: Any) -> Unit:
    memory = _known(pynvml.nvmlDeviceGetMemoryInfo, handle)
    sizes = (int(memory.total), int(memory.used)) if memory else (None, None)
    return Unit(pynvml.nvmlDeviceGetUUID(handle), _known(pynvml.nvmlDeviceGetName, handle), *sizes)


def _known(ask: Callable[..., Any], *arguments: Any) -> Any:
    """The driver's answer, or None where it has none: an instance that is not there, a size that it does not tell."""
    try:
        return ask(*arguments)
    except pynvml.NVMLError:
        return None
