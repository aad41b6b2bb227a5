"""What a plan is held against: this machine, and a card by name, as its vendor's data sheet has it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from armor.core.errors import ArmorError
from armor.execution.devices import list_devices
from armor.execution.machine import host_memory_bytes

__all__ = ["CARDS", "COMPUTE_SHARE", "MEMORY_SHARE", "USUAL", "Card", "Host", "card_named"]


@dataclass(frozen=True)
class Card:
    """A GPU: memory in bytes, operations a second in bfloat16 (dense) and float32, bytes a second from its memory."""

    name: str
    memory: int
    bfloat16: float
    float32: float
    bandwidth: float


CARDS = {
    card.name: card
    for card in (
        Card("H200", 141 * 10**9, 989e12, 67e12, 4.8e12),
        Card("H100", 80 * 10**9, 989e12, 67e12, 3.35e12),
        Card("A100-80GB", 80 * 10**9, 312e12, 19.5e12, 2.04e12),
        Card("A100-40GB", 40 * 10**9, 312e12, 19.5e12, 1.56e12),
        Card("L40S", 48 * 10**9, 362e12, 91.6e12, 0.864e12),
        Card("RTX-4090", 24 * 10**9, 165e12, 82.6e12, 1.01e12),
    )
}
"""By name; the SXM modules where there are several."""
USUAL = "H100"
"""The card to plan for where none is named."""
COMPUTE_SHARE = 0.4
"""Of a card's peak that products of matrices are assumed to reach."""
MEMORY_SHARE = 0.6
"""Of a card's bandwidth that all else is assumed to reach."""


def card_named(name: str) -> Card:
    """The card `name`, in any case. Raises ArmorError, naming those that are known."""
    found = next((card for key, card in CARDS.items() if key.lower() == name.lower()), None)
    if found is None:
        raise ArmorError(f"--card: {name!r} is not known; expected one of {', '.join(CARDS)}")
    return found


@dataclass(frozen=True)
class Host:
    """This machine: memory and free disk in bytes, cores, and the memory of its smallest GPU; None without one."""

    memory: int
    disk: int
    cores: int
    gpu: int | None

    @classmethod
    def here(cls, folder: Path) -> Host:
        """The machine that this process runs on; the disk is that of `folder`, which may not be there yet."""
        place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        cards = [device.memory_bytes for device in list_devices() if device.memory_bytes]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(host_memory_bytes(), shutil.disk_usage(place).free, cores, min(cards, default=None))
