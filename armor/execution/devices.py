"""The device lease: a job takes its CUDA devices before CUDA starts, and no other job gets them while it lives.

Snakemake's `--resources gpu=N` only counts; two jobs would both see every device. So a job locks one file per device
(flock) and sets CUDA_VISIBLE_DEVICES to what it got. The kernel drops the lock when the process dies, however it dies.
The lock folder is local to the node, and to the scheduler's job where there is one: under a scheduler the devices in
CUDA_VISIBLE_DEVICES are this job's own. Device names are opaque: indices, UUIDs or MIG identifiers.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

from armor.errors import ArmorError
from armor.execution.files import try_lock
from armor.execution.log import log

__all__ = ["lease", "visible_devices"]

SECONDS_BETWEEN_TRIES = 0.5
_held: list[int] = []  # open descriptors; closing one would drop its lock


def visible_devices() -> list[str]:
    """The names of the CUDA devices that this process may use, from CUDA_VISIBLE_DEVICES or else from nvidia-smi."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.split(":")[0].removeprefix("GPU ") for line in listed.stdout.splitlines() if line.startswith("GPU ")]


def lease(count: int) -> str:
    """Take `count` devices, waiting until they are free, and return the torch device to compute on.

    With `count` 0, or where there is no CUDA device at all, that is "cpu". Raises ArmorError when more devices are
    asked for than are visible.
    """
    names = visible_devices()
    if count == 0 or not names:
        if count:
            log.warning("no CUDA device is visible: computing on the CPU")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return "cpu"
    if count > len(names):
        found = f"{len(names)} visible ({', '.join(names)})"
        raise ArmorError(f"{count} GPUs asked for, {found}; lower --gpus, or the rule's gpu resource")
    scope = os.environ.get("SLURM_JOB_ID", "local")
    folder = Path(tempfile.gettempdir()) / f"armor-devices-{os.getuid()}-{scope}"
    folder.mkdir(mode=0o700, exist_ok=True)
    taken: list[str] = []
    waiting = False
    while True:
        for name in names:
            if len(taken) < count and name not in taken and (descriptor := try_lock(folder / name.replace("/", "_"))):
                _held.append(descriptor)
                taken.append(name)
        if len(taken) == count:
            break
        # Holding some while waiting for others could lock two jobs against each other: let go and try again.
        while taken:
            taken.pop()
            os.close(_held.pop())
        if not waiting:
            log.info("waiting for %d of %d GPUs", count, len(names))
            waiting = True
        time.sleep(SECONDS_BETWEEN_TRIES)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
    log.info("computing on GPU %s", ", ".join(taken))
    return "cuda:0"
