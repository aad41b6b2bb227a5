"""checksums.json: the SHA-256 of a checkpoint's files and tensors, and of itself, so that no flipped bit is loaded.

The hashes stand beside the checkpoint and not in it, so that the same input gives the same bytes. They are computed
while transformers makes the model: each file is mapped and hashed in one call that lets go of the interpreter's lock.
Where there are no hashes (transformers' save_pretrained writes none) the numbers themselves are looked at instead.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from armor.core.errors import ArmorError
from armor.execution.files import read_json
from armor.format.checkpoint import REMEDY, PackedLinear, check_headers, check_keys, check_tensor, modules_of
from armor.format.provenance import CHECKSUMS
from armor.format.records.base import File
from armor.format.shards import INDEX, Shards

__all__ = [
    "Checksums",
    "CHECKSUMS",
    "CHECKSUMS_VERSION",
    "Hashing",
    "check_contents",
    "loaded_files",
    "open_checkpoint",
    "read_checksums",
    "sealed",
    "tensor_sha256",
]

CHECKSUMS_VERSION = 1


@dataclass(frozen=True)
class Checksums:
    """What checksums.json lists: of every file bytes and sha256, as they stand there, and every tensor's SHA-256."""

    files: Mapping[str, Mapping]
    tensors: Mapping[str, str]


def check_contents(
    shards: Shards, modules: Mapping[str, PackedLinear], hashes: Mapping[str, str] | None = None
) -> None:
    """Check every tensor of a checkpoint, through mapped files, and its hash where `hashes` has any.

    Raises ArmorError for the first that is broken.
    """
    for file in shards.files:
        where = str(shards.folder / file)
        for name, tensor in shards.mapped(file):
            check_tensor(where, name, tensor, modules)
            if hashes and tensor_sha256(tensor) != hashes[name]:
                raise ArmorError(f"{where}: {name}: differs from its hash in {CHECKSUMS}; {REMEDY}")


class Hashing:
    """Files of a checkpoint that are held against their hashes beside the caller, until `wait` or `stop`.

    It takes as many threads as torch computes with, each file in one call that lets go of the interpreter's lock. As a
    context it waits at the end, and stops where an error comes out of it. No file is read after that: the process would
    be killed if another one were written in its place.
    """

    def __init__(self, shards: Shards, sums: Checksums | None, files: Iterable[str]) -> None:
        """Begin with `files`, by their hashes in `sums` (None: there are none, and nothing to do)."""
        self._pool = ThreadPoolExecutor(torch.get_num_threads())
        self._jobs = [] if sums is None else [self._pool.submit(_check_hash, shards, f, sums) for f in sorted(files)]
        self._pool.shutdown(wait=False)

    def wait(self) -> None:
        """Return when all are done. Raises ArmorError that names the file and, within a shard, the tensor."""
        try:
            for job in self._jobs:
                job.result()
        finally:
            self.stop()

    def stop(self) -> None:
        """Begin no other file, and return when those that were begun are done."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, error: type[BaseException] | None, *others: object) -> None:
        self.wait() if error is None else self.stop()


def loaded_files(shards: Shards) -> list[str]:
    """The files that a model is loaded from."""
    return [*shards.files, "config.json", *([INDEX] if (shards.folder / INDEX).exists() else [])]


def tensor_sha256(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's bytes as safetensors stores them (little-endian, row-major), in hexadecimal."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def open_checkpoint(folder: Path | str) -> tuple[dict, Shards, dict[str, PackedLinear]]:
    """config.json, the tensors and the compressed linears of a checkpoint, all but its contents checked.

    Raises ArmorError, one line, if `folder` is no checkpoint, or for the first thing that is wrong.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ArmorError(f"{folder}: holds no config.json; expected the folder of a checkpoint")
    config = read_json(folder / "config.json")
    found = config.get("quantization_config")
    # A recipe that leaves everything dense makes a checkpoint without packed linears, known by its checksums.
    dense = found is None and (folder / CHECKSUMS).is_file()
    modules = {} if dense else modules_of(found, f"{folder / 'config.json'}: quantization_config")
    shards = Shards(folder)
    sums = read_checksums(shards)
    Hashing(shards, sums, {*loaded_files(shards)} - {*shards.files}).wait()  # an edited config.json is blamed itself
    check_headers(shards, modules)
    return config, shards, modules


def sealed(files: Mapping[str, File], tensors: Mapping[str, str]) -> dict:
    """The content of checksums.json from sizes and hashes of files and hashes of tensors; its last entry is its own."""
    sums = {
        "format_version": CHECKSUMS_VERSION,
        "files": {name: file.model_dump() for name, file in files.items()},
        "tensors": dict(tensors),
    }
    return sums | {"sha256": _own_sha256(sums)}


def _own_sha256(sums: Mapping) -> str:
    text = json.dumps({key: sums[key] for key in sums if key != "sha256"}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_checksums(shards: Shards) -> Checksums | None:
    """The content of checksums.json, None if there is none. Raises ArmorError if it cannot be of this checkpoint."""
    path = shards.folder / CHECKSUMS
    if not path.is_file():  # transformers' save_pretrained writes none
        return None
    sums = read_json(path)
    check_keys(sums, ("format_version", "files", "tensors", "sha256"), str(path))
    if type(sums["format_version"]) is not int or sums["format_version"] != CHECKSUMS_VERSION:
        raise ArmorError(f"{path}: format_version {sums['format_version']!r}, expected {CHECKSUMS_VERSION}; {REMEDY}")
    for key in ("files", "tensors"):
        if not isinstance(sums[key], dict):
            raise ArmorError(f"{path}: {key}: found {type(sums[key]).__name__}, expected a table of hashes; {REMEDY}")
    for name in sums["files"]:
        if name != Path(name).name:
            raise ArmorError(f"{path}: files: {name}: not a file of this folder; {REMEDY}")
    if unlisted := sorted(set(loaded_files(shards)) - set(sums["files"])):
        raise ArmorError(f"{path}: does not list {unlisted[0]}; {REMEDY}")
    if wrong := sorted(set(shards.names()) ^ set(sums["tensors"])):
        there = f"in {shards.file_of(wrong[0])}, but not listed" if wrong[0] in shards else "listed, but in no shard"
        raise ArmorError(f"{path}: tensors: {wrong[0]}: {there}; {REMEDY}")
    if (own := _own_sha256(sums)) != sums["sha256"]:
        raise ArmorError(
            f"{path}: sha256: found {sums['sha256']!r}, expected {own} for what it holds; {REMEDY} (after an edit on "
            "purpose, delete it)"
        )
    return Checksums(sums["files"], sums["tensors"])


def _check_hash(shards: Shards, name: str, sums: Checksums) -> None:
    """Hold one file of a checkpoint against its hash. Raises ArmorError naming it and, within a shard, the tensor."""
    file = shards.folder / name
    if not file.is_file():
        raise ArmorError(f"{file}: missing, listed in {CHECKSUMS}; {REMEDY}")
    if _bytes_and_hash(file) == sums.files[name]:
        return
    place = f"{file}: "
    if name in shards.files:
        found = (tensor for tensor, data in shards.mapped(name) if tensor_sha256(data) != sums.tensors[tensor])
        place += "".join(f"{tensor}: " for tensor in itertools.islice(found, 1))
    raise ArmorError(
        f"{place}differs from its hash in {CHECKSUMS}; {REMEDY} (after an edit on purpose, delete {CHECKSUMS})"
    )


def _bytes_and_hash(file: Path) -> dict[str, int | str]:
    """The size and SHA-256 of a file as checksums.json lists them.

    The file is mapped and hashed in one call. Whoever reads it in pieces, beside a loader that is busy in Python, waits
    for the interpreter's lock after every piece.
    """
    size = file.stat().st_size
    if not size:  # cannot be mapped
        return {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return {"bytes": size, "sha256": hashlib.sha256(data).hexdigest()}
