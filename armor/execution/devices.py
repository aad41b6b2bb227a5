"""The device lease: a job takes its CUDA devices before CUDA starts, and no other job gets them while it lives.

Snakemake's `--resources gpu=N` only counts; two jobs would both see every device. So a job locks one file per device
(flock) and sets CUDA_VISIBLE_DEVICES to what it got. The kernel drops the lock when the process dies, however it dies;
what the file says of its holder is for people. The lock folder is local to the node, and to the scheduler's job where
there is one. Under a scheduler the devices in CUDA_VISIBLE_DEVICES are this job's own. Device names are opaque:
indices, UUIDs or MIG identifiers; a lock bears the UUID where NVIDIA's driver knows it, for one device can have two
names.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from armor.core.errors import ArmorError
from armor.execution.files import try_lock
from armor.execution.log import log

if TYPE_CHECKING:
    from armor.execution.nvml import Unit

__all__ = ["Device", "lease", "list_devices", "visible_devices"]

SECONDS_BETWEEN_TRIES = 0.5
SECONDS_BETWEEN_LINES = 60.0
SCHEDULER_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
_held: list[int] = []  # open descriptors; closing one would drop its lock


@dataclass(frozen=True)
class Device:
    """A visible device: its name, its card and memory in bytes if the driver knows them, and who leased it, if any."""

    name: str
    model: str | None
    memory_bytes: int | None
    used_bytes: int | None
    holder: str | None


def visible_devices() -> list[str]:
    """The names of the CUDA devices that this process may use, from CUDA_VISIBLE_DEVICES or else from the driver."""
    return list(_visible().values())


def lease(count: int) -> str:
    """Take `count` devices, waiting until they are free, and return the torch device to compute on.

    With `count` 0, or where there is no CUDA device at all, that is "cpu". Raises ArmorError when more devices are
    asked for than are visible.
    """
    devices = _visible() if count else {}
    if not devices:
        if count:
            log.warning("no CUDA device is visible: computing on the CPU")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return "cpu"
    if count > len(devices):
        found = f"{len(devices)} visible ({', '.join(devices.values())})"
        raise ArmorError(f"{count} GPUs asked for, {found}; lower --gpus, or the rule's gpu resource")
    folder = _lock_folder(next((os.environ[key] for key in SCHEDULER_JOBS if os.environ.get(key)), "local"))
    folder.mkdir(mode=0o700, exist_ok=True)
    taken: dict[str, int] = {}
    start = last = time.monotonic()
    while True:
        for identity, name in devices.items():
            if len(taken) < count and (descriptor := try_lock(_lock(folder, identity))):
                taken[name] = descriptor
        if len(taken) == count:
            break
        # Holding some while waiting for others could lock two jobs against each other: let go and try again.
        while taken:
            os.close(taken.popitem()[1])
        now = time.monotonic()
        if start == last or now - last >= SECONDS_BETWEEN_LINES:
            waited, holders = now - start, sorted({holder for identity in devices if (holder := _holder(identity))})
            log.info("waiting for %d of %d GPUs, %.0f s so far; held by %s", count, len(devices), waited, holders)
            last = now
        time.sleep(SECONDS_BETWEEN_TRIES)
    for descriptor in taken.values():
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "work": _work(sys.argv[1:])}).encode())
    _held.extend(taken.values())
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # an index then means what the driver means by it
    log.info("computing on GPU %s", ", ".join(taken))
    return "cuda:0"


def list_devices() -> list[Device]:
    """The visible devices, their memory, and which of this user's processes leased them, in whatever job."""
    cards = _cards()
    known = {unit.uuid: (unit.model, unit.memory_bytes, unit.used_bytes) for card in cards for unit in card}
    return [
        Device(name, *known.get(identity, (None, None, None)), _holder(identity))
        for identity, name in _visible(cards).items()
    ]


def _cards() -> list[list[Unit]]:
    from armor.execution import nvml  # late: most commands ask for no device

    return nvml.cards()


def _visible(cards: list[list[Unit]] | None = None) -> dict[str, str]:
    """The devices that this process may use: what a lock is named by -> what CUDA_VISIBLE_DEVICES calls it."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names: list[str] = []
    for name in (part.strip() for part in (named or "").split(",")):
        if name in ("", "-1", "NoDevFiles"):  # CUDA reads no further; the last is some schedulers' word for none
            break
        names.append(name)
    if named is not None and not names:
        return {}
    uuids = [[unit.uuid for unit in card] for card in (_cards() if cards is None else cards)]
    every = [uuid for card in uuids for uuid in card]
    if named is None:
        return dict(zip(every, every, strict=True))
    found: dict[str, str] = {}
    for name in names:
        if name.isdecimal():  # of a card that is split CUDA takes the first instance
            matches = uuids[int(name)][:1] if int(name) < len(uuids) else []
        else:  # the beginning of a UUID is enough
            matches = [uuid for uuid in every if uuid.startswith(name)]
        found.setdefault(matches[0] if len(matches) == 1 else name, name)
    return found


def _lock_folder(scope: str) -> Path:
    return Path(tempfile.gettempdir()) / f"armor-devices-{os.getuid()}-{scope}"


def _lock(folder: Path, identity: str) -> Path:
    return folder / identity.replace("/", "_")


def _work(arguments: list[str]) -> str:
    """What a command line is about: the stage, and the file that it writes."""
    output = dict(zip(arguments, arguments[1:], strict=False)).get("--output")
    return " ".join([*arguments[:1], *(["->", output] if output else [])])


def _holder(identity: str) -> str | None:
    """Which process holds the lock of a device, or None. A file without a lock is that of a process that has ended."""
    pattern = _lock_folder("*")
    for path in sorted(_lock(folder, identity) for folder in pattern.parent.glob(pattern.name)):
        try:
            with open(path, encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not see each other
        except FileNotFoundError:
            continue
        except BlockingIOError:
            try:
                held = json.loads(path.read_text(encoding="utf-8"))
                return f"pid {held['pid']}, {held['work']}"
            except ValueError:  # it was leased a moment ago, and has not written yet
                return "a job that is starting"
    return None
