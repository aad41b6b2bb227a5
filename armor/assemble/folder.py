"""A model folder in the making: it grows under another name and gets its own when it is complete.

So an interrupted run leaves no folder, never half a one. Tensors come one by one from a function and go to disk shard
by shard. So no more than one shard is in memory. Sizes alone say which tensor goes where. The room for all of them is
looked for first. The same tensors give the same bytes. Where the steps of the work are kept (`armor.execution.resume`),
a run that was interrupted keeps the shards that are finished, and the next one goes on.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from armor.core.errors import ArmorError
from armor.core.typed import Typed
from armor.execution.files import part_of, save_safetensors, write_json
from armor.execution.log import progress
from armor.execution.resume import Steps
from armor.format.checksums import CHECKSUMS, sealed, tensor_sha256
from armor.format.records.base import File
from armor.format.shards import INDEX, SINGLE

__all__ = ["MAX_SHARD_BYTES", "copy_others", "growing", "natural", "seal", "write_tensors"]

MAX_SHARD_BYTES = 5_000_000_000
# What a model is made of besides config.json and weights: tokenizer, chat template, generation config, licence, code.
COPIED = ("*.json", "*.jinja", "*.model", "vocab.*", "merges.txt", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
NOT_COPIED = ("config.json", "*.index.json", CHECKSUMS, "training_args*", "trainer_state*", "optimizer*")


class _Shard(Typed):
    """A shard that is finished: the SHA-256 of its tensors by name."""

    tensors: dict[str, str]


@contextlib.contextmanager
def growing(target: Path, steps: Steps | None = None) -> Iterator[Path]:
    """A folder to fill that becomes `target`, which must be absent or empty then, or vanishes if the block raises.

    With `steps` it is kept among them until it is complete. Raises ArmorError where the disk, or a file that is read,
    does not let it.
    """
    part = part_of(target) if steps is None else steps.folder / target.name
    if steps is None:
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    try:
        part.mkdir(parents=True, exist_ok=True)
        for path in part.iterdir():  # what is not a finished step: halves among it
            if steps is not None and steps.get(path.name, _Shard) is None:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield part
        os.replace(part, target)
    except (OSError, SafetensorError) as error:
        raise ArmorError(f"{target}: cannot be written: {error}; make room or choose another folder") from error
    finally:
        if steps is None:
            shutil.rmtree(part, ignore_errors=True)


def natural(name: str) -> list[int | str]:
    """A sort key by which layer 2 comes before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def write_tensors(
    folder: Path,
    sizes: Mapping[str, int],
    read: Callable[[str], Tensor],
    max_shard_bytes: int,
    description: str,
    steps: Steps | None = None,
) -> dict[str, str]:
    """Write the tensors that `sizes` names (in bytes), in its order, as shards, and the index if there are several.

    Shards that `steps` knows are not written again. Returns the SHA-256 of every tensor. Raises ArmorError if the disk
    has no room for all.
    """
    plan = _split(sizes, max_shard_bytes)
    finished: dict[str, dict[str, str]] = {}
    for file in plan:
        if steps is not None and (folder / file).is_file() and (known := steps.get(file, _Shard)):
            finished[file] = known.tensors
    free = shutil.disk_usage(folder).free
    needed = sum(sizes[name] for file, names in plan.items() if file not in finished for name in names)
    if free < needed:
        raise ArmorError(f"{folder.parent}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed; make room there")
    sums: dict[str, str] = {}
    for file, names in progress(plan.items(), description, total=len(plan), unit="shard"):
        if file not in finished:
            tensors = {name: read(name) for name in names}
            finished[file] = {name: tensor_sha256(tensor) for name, tensor in tensors.items()}
            save_safetensors(folder / file, tensors, {"format": "pt"})  # one entry: several come in random order
            del tensors
            if steps is not None:
                steps.put(file, _Shard(tensors=finished[file]))
        sums |= finished[file]
    if len(plan) > 1:
        weight_map = {name: file for file, names in plan.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    return sums


def _split(sizes: Mapping[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    """The names of the tensors by file; a tensor larger than a shard has one for itself."""
    pieces: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if pieces[-1] and filled + size > max_shard_bytes:
            pieces.append([])
            filled = 0
        pieces[-1].append(name)
        filled += size
    if len(pieces) == 1:
        return {SINGLE: pieces[0]}
    return {f"model-{i:05}-of-{len(pieces):05}.safetensors": piece for i, piece in enumerate(pieces, 1)}


def copy_others(source: Path, folder: Path) -> None:
    """Copy what is to stay as it is in `source`: all but weights, config.json, hashes and the model card."""
    files = {file for pattern in COPIED for file in source.glob(pattern) if file.is_file()}
    for file in sorted(files - {file for pattern in NOT_COPIED for file in source.glob(pattern)}):
        shutil.copyfile(file, folder / file.name)


def seal(folder: Path, sums: Mapping[str, str]) -> dict[str, File]:
    """Write checksums.json over the files there and the tensors' hashes; returns size and hash of all files."""
    files = {file.name: File.of(file) for file in sorted(folder.iterdir())}
    write_json(folder / CHECKSUMS, sealed(files, sums))
    return files | {CHECKSUMS: File.of(folder / CHECKSUMS)}
