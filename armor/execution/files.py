"""Atomic files: a reader sees the old content, the new content or nothing, never a half.

Every write goes to a temporary folder beside the target, for writers like safetensors' have temporary files of their
own. It is renamed over the target once it is on disk. Two processes that write the same file do no harm: the last
rename wins. The folder holds a lock (flock), which the kernel drops however the process dies. So the next write of the
same file knows what a killed one left, and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from armor.core.errors import ArmorError

__all__ = [
    "atomic_path",
    "open_safetensors",
    "part_of",
    "read_json",
    "room_for",
    "save_safetensors",
    "sha256",
    "try_lock",
    "write_json",
]

LOCK = "lock"


def room_for(needed: int, folder: Path, what: str, remedy: str) -> None:
    """Raise ArmorError if the disk of `folder` has no room for `needed` bytes; `what` needs them, `remedy` is less."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ArmorError(
            f"{folder}: {what} need {needed / 1e9:.3g} GB on this disk, {free / 1e9:.3g} GB are free; make room, or "
            f"{remedy}"
        )


def part_of(output: Path | str) -> Path:
    """The folder that keeps what is finished toward `output`, a file or a folder."""
    output = Path(output)
    return output.with_name(f".{output.name}.part")


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path near `path`, to write to, that becomes `path` at the end, or vanishes if the block raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    try:
        with _temporary_folder(path) as folder:
            temporary = folder / path.name
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ArmorError(f"{path}: cannot be written ({error.strerror}); make room and run again") from error
        raise


def try_lock(path: Path | str) -> int | None:
    """Lock the file `path`, made if need be, until this process ends; a descriptor, or None if another one holds it.

    Closing the descriptor drops the lock too. Whoever holds it may delete the file. Where the file system has no locks,
    nobody is kept out.
    """
    # Not filelock: without locks it fails or leaves a file that outlives a killed holder, and it is slower to import
    # than all that a job does before its stage (docs/TRIED.md).
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # no locks here
            return descriptor
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # its holder deleted it between the two calls


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, locked, that is gone at the end."""
    lock = None
    while lock is None:  # until no other process sweeps it before it is locked
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            with contextlib.suppress(FileNotFoundError):
                lock = try_lock(folder / LOCK)
            if lock is not None:
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def _sweep(path: Path) -> None:
    """Remove the temporary folders of `path` that belong to nobody any more."""
    for name in os.listdir(path.parent):
        if name.startswith(f".{path.name}.") and name.endswith(".tmp"):
            folder = path.parent / name
            with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
                if (lock := try_lock(folder / LOCK)) is not None:
                    shutil.rmtree(folder)
                    os.close(lock)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path | str, value: object) -> None:
    """Write `value` as indented JSON with sorted keys, atomically. Raises ValueError for NaN and infinity."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n")


def read_json(path: Path | str) -> dict:
    """The JSON object in `path`. Raises ArmorError if it is missing, not JSON, or another value than an object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArmorError(f"{path}: no such file; run the stage that writes it first") from None
    except ValueError as error:  # broken JSON or broken UTF-8
        raise ArmorError(f"{path}: not valid JSON ({error}); get it again, or run the stage that writes it") from None
    if not isinstance(value, dict):
        raise ArmorError(f"{path}: holds a {type(value).__name__}, expected a JSON object; get or write it again")
    return value


def save_safetensors(path: Path | str, tensors: dict, metadata: dict[str, str] | None = None) -> None:
    """Write tensors atomically, in sorted order, so that the same tensors give the same bytes."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # a full disk, as a rule
            raise ArmorError(f"{path}: cannot be written ({error}); make room and run again") from None


@contextlib.contextmanager
def open_safetensors(path: Path | str) -> Iterator:
    """A safetensors file opened for lazy reading. Raises ArmorError if it is missing, truncated or corrupt."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "pt")
    except FileNotFoundError:
        raise ArmorError(f"{path}: no such file; run the stage that writes it first") from None
    except (SafetensorError, OSError) as error:
        raise ArmorError(f"{path}: not a readable safetensors file ({error}); fetch or make it again") from None
    with file:
        yield file


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
