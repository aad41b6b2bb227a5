"""Kills at named points, counted and never timed, and ways to tell whether a result is that of an undisturbed run.

A run is disturbed only by what it finds on disk, and there it changes something where it writes. So it dies in the
middle of a write, between a write and its rename, or after it, at the n-th such point: a loaded machine comes to the
same one. A run that dies a point later each time comes to its end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tests.forks import fork

REPOSITORY = Path(__file__).resolve().parents[1]
HALF, WRITTEN, SAVED = POINTS = ("in the middle of a write", "between write and replace", "after the save")

OF_THE_RUN = ("seconds", "peak_memory_bytes", "tokens_per_second")
"""Keys of records that say how it went, and so differ between two runs."""


def die_at(point: str, number: int, counter: Path | str, where: str = "") -> None:
    """Kill this process and its group when they come to `point`, one of POINTS, for the `number`-th time (0: never).

    Only files whose path has `where` in it count. Processes that share the file `counter` count together; see `passed`.
    A test's own process must not be in the group.
    """
    fsync, replace = os.fsync, os.replace

    def is_now(here: str, path: os.PathLike | str) -> bool:
        if here != point or where not in os.fspath(path):
            return False
        with open(counter, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(b".")
            return file.tell() == number

    def dying_fsync(descriptor: int) -> None:
        file = f"/proc/self/fd/{descriptor}"
        if is_now(HALF, os.path.realpath(file)):
            os.truncate(file, os.fstat(descriptor).st_size // 2)
            _die()
        fsync(descriptor)

    def dying_replace(source: os.PathLike, target: os.PathLike, **options: int) -> None:
        if is_now(WRITTEN, target):
            _die()
        replace(source, target, **options)
        if is_now(SAVED, target):
            _die()

    os.fsync, os.replace = dying_fsync, dying_replace


def _die() -> NoReturn:
    os.killpg(0, signal.SIGKILL)
    raise AssertionError


def forked(work: Callable[[], object], counter: Path, point: str = SAVED, number: int = 0) -> bool:
    """Do `work` in a process of its own that dies at `point` for the `number`-th time; whether it came to its end.

    How often it came to `point` is in `counter` then.
    """
    counter.unlink(missing_ok=True)
    import torch  # sitecustomize.py needs none of it

    def dying() -> None:
        os.setsid()
        signal.alarm(3600)  # only if it hangs
        torch.set_num_threads(1)  # OpenMP's other threads, if a test before had some, did not come along
        die_at(point, number, counter)
        work()

    done = fork(dying, Path.cwd())
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode == 0


def passed(counter: Path) -> int:
    """How often processes came to their point."""
    return counter.stat().st_size if counter.exists() else 0


def killed_everywhere(work: Callable[[Path], object], folder: Path, point: str, kills: int | None = None) -> int:
    """Do `work` in a folder, killed at `point` later and later until it ends; the result must be the undisturbed one.

    `kills`: about how many, unset one at every passing of the point. Returns how many there were after which some of
    the work was kept.
    """
    counter, whole, killed = folder / "counter", folder / "whole", folder / "killed"
    assert forked(lambda: work(whole), counter, point)
    stride = max(1, passed(counter) // kills) if kills else 1
    number, most, gone_on = stride, passed(counter) + 1, 0
    while not forked(lambda: work(killed), counter, point, number):  # each run comes further than the one before
        number += stride
        gone_on += any(killed.glob(".*.part/*.json"))
        assert number <= most + stride
    assert results_of(killed) == results_of(whole) != {}
    assert left_over(killed) == []
    return gone_on


def sitecustomize(folder: Path, point: str, number: int, where: str = "") -> None:
    """Make `folder` one that a Python which has it on its path first does `die_at` by."""
    folder.mkdir()
    counter = folder / "counter"
    call = f"die_at({point!r}, {number}, {str(counter)!r}, {where!r})"
    (folder / "sitecustomize.py").write_text(f"from tests.killed import die_at\n\n{call}\n")


def _settled(value: object) -> object:
    """A record without what differs between two runs; of a trace's (iteration, seconds, loss) the seconds go."""
    if isinstance(value, dict):
        kept = {key: _settled(inner) for key, inner in value.items() if key not in OF_THE_RUN}
        if isinstance(kept.get("trace"), list):  # in a tokenizer it is a word
            kept["trace"] = [[iteration, loss] for iteration, _, loss in kept["trace"]]
        return kept
    return [_settled(inner) for inner in value] if isinstance(value, list) else value


def results_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of everything below `folder` that a stage computes, by path; records without times and memory."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if name.split("/")[0] in ("logs", "benchmarks", "report", "run.json") or "/benchmark/" in name:
            continue
        content = file.read_bytes()
        if file.suffix == ".json" and "checkpoint/" not in name:
            content = json.dumps(_settled(json.loads(content)), sort_keys=True).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def left_over(folder: Path) -> list[str]:
    """What no finished run may leave below `folder`: temporary files, kept steps, locks."""
    return sorted(str(path) for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp")
