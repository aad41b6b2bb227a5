"""Resume: what a stage has finished outlives it, and the next run of the same work goes on from there.

A stage is a loop over steps: decoder layers, linears, shards, blocks of text. `resumable` gives it a folder beside its
output, `.{output}.part/`, to leave in it what a step made. A step is finished once its record is there, a small JSON
file that is written last. The folder belongs to one piece of work. It holds a fingerprint of all that can change a byte
of the result: what the stage says, its code, the threads, the device, the versions of the libraries. A folder of other
work is emptied. So a resumed result is that of an undisturbed run. The folder vanishes when the stage succeeds, or
fails before its first step is finished. A lock in it, which the kernel drops when the process dies, keeps a second
process from the same work. Snakemake deletes the declared outputs of a job that failed; this name it does not know.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from armor.core.errors import ArmorError
from armor.core.typed import Typed
from armor.execution.files import LOCK, part_of, read_json, try_lock, write_json
from armor.execution.fingerprint import code_hash
from armor.execution.log import log
from armor.execution.machine import current_machine

__all__ = ["Done", "Steps", "identity", "resumable"]

WORK = "work"


def identity(folder: Path) -> list:
    """What tells this model from another in the same place, without reading it: every file's name, size and time."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.iterdir())]


T = TypeVar("T", bound=Typed)


class Done(Typed):
    """What is remembered of a step that has left a file in the folder, and nothing else to know."""


class _Step(Typed):
    """The file that says that a step is finished."""

    value: dict[str, Any]
    seconds: float
    """Spent on this work until then."""


class _Work(Typed):
    """The file that says what work the folder is of."""

    fingerprint: str


class Steps:
    """The finished steps of one piece of work, and `folder` for the files they made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._start = time.monotonic()
        self._records: dict[str, _Step] = {}
        for file in folder.glob("*.json"):
            with contextlib.suppress(ArmorError, ValidationError):  # lost in a power cut: the step is done again
                self._records[file.stem] = _Step.model_validate(read_json(file))
        self._before = max((record.seconds for record in self._records.values()), default=0.0)

    def __len__(self) -> int:
        return len(self._records)

    def get(self, step: str, kind: type[T]) -> T | None:
        """What was recorded of `step`, which is of this `kind`; None if it is not finished."""
        return kind.model_validate(self._records[step].value) if step in self._records else None

    def put(self, step: str, value: Typed) -> None:
        """Record that `step` is finished, with something to remember. Its files must be on disk by now."""
        self._records[step] = _Step(value=value.model_dump(mode="json"), seconds=self.seconds())
        write_json(self.folder / f"{step}.json", self._records[step].model_dump(mode="json"))

    def seconds(self) -> float:
        """The seconds spent on this work, those of the runs before included as far as their steps are kept."""
        return self._before + time.monotonic() - self._start


@contextlib.contextmanager
def resumable(output: Path | str, stage: str, device: str, also: Iterable[str] = (), **work: object) -> Iterator[Steps]:
    """The steps toward `output` that are finished already; `stage` and `also` are the modules whose code they run.

    `work` is JSON: whatever else decides the result, as settings and hashes. Raises ArmorError if another process is
    doing the same work.
    """
    folder = part_of(output)
    folder.mkdir(parents=True, exist_ok=True)
    lock = try_lock(folder / LOCK)
    if lock is None:
        raise ArmorError(f"{output}: another process is at work on it; wait for its end, or end it, and run again")
    steps = None
    try:
        fingerprint = _fingerprint({"code": code_hash(stage, *also), "machine": _machine(device), **work})
        if _read(folder / WORK) != fingerprint:
            _empty(folder)
            write_json(folder / WORK, _Work(fingerprint=fingerprint).model_dump())
        steps = Steps(folder)
        if len(steps):
            log.info("going on after %d finished steps (%s)", len(steps), folder)
        yield steps
    except BaseException:
        if not steps and not any(folder.glob(part_of("*").name)):  # nor steps of work that is part of this one
            shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _fingerprint(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _machine(device: str) -> dict:
    """What of the machine decides about bytes: on a GPU, the processor does not."""
    found = current_machine(device)
    decides = {"threads": found.threads, "device": found.device, "versions": found.versions}
    return decides | ({"processor": found.processor} if device == "cpu" else {})


def _read(file: Path) -> str | None:
    with contextlib.suppress(ArmorError, ValidationError):
        return _Work.model_validate(read_json(file)).fingerprint
    return None


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
