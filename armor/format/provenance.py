"""Provenance: what made a result, in its record: stage, hash of its code, settings, inputs, machine.

`made_by` is the one place that decides what a record says of its origin, and `armor explain` reads it back. Inputs are
named by fingerprints of their content, never by path or time, so that a result made elsewhere from the same things says
the same. It goes into the JSON beside a result, not into tensor files: these stay equal on any machine that computes
the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from armor.core.typed import Typed
from armor.execution.files import read_json, sha256
from armor.execution.fingerprint import code_hash
from armor.format.records.base import Input, MadeBy
from armor.format.records.checkpoint import CheckpointRecord
from armor.format.records.source import SourceRecord

__all__ = ["CHECKSUMS", "PROVENANCE", "combined", "made_by", "model_fingerprint", "ranges", "text_files"]

CHECKSUMS = "checksums.json"
"""The file in a packed checkpoint with the hashes of all the others."""
PROVENANCE = "provenance.json"
"""The file in a packed checkpoint that says what made it, wherever it is copied to."""


def made_by(stage: str, settings: Typed | None, inputs: Mapping[str, str | None], also: Iterable[str] = ()) -> MadeBy:
    """What made a result; the local files of its text are added to its inputs.

    `stage` is the module that the rule's code hash starts from, `also` those beside it; `settings` the resolved ones,
    the seed among them; `inputs` are fingerprints by name, None for one that has none.
    """
    said = settings.model_dump(mode="json") if settings else {}
    read = {Input.TEXT_FILES: files} if (files := text_files(settings)) else {}
    return MadeBy(stage=stage, code=code_hash(stage, *also), settings=said, inputs={**inputs, **read})


def text_files(settings: Typed | None) -> str | None:
    """The fingerprint of the local files of the text in a job's settings; None without any, or if one is not there."""
    files = [Path(file) for file in settings.local_files()] if settings else []
    if not files or not all(file.is_file() for file in files):
        return None
    return combined(_sha256(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@cache
def _sha256(file: Path, size: int, time: int) -> str:
    """The hash of a file, once for each state that it is seen in."""
    return sha256(file)


def combined(hashes: Iterable[str | None]) -> str:
    """One fingerprint for several, in their order."""
    return hashlib.sha256("\n".join(map(str, hashes)).encode()).hexdigest()


def model_fingerprint(path: Path) -> str | None:
    """What tells the model of a source's or a checkpoint's record, or of a folder, from others; no weight is read.

    None for a folder without checksums.json. Raises ArmorError if a file is missing or no such record.
    """
    if path.is_dir():
        return sha256(path / CHECKSUMS) if (path / CHECKSUMS).is_file() else None
    if read_json(path).keys() & (CheckpointRecord.model_fields.keys() - SourceRecord.model_fields.keys()):
        return CheckpointRecord.read(path).files[CHECKSUMS].sha256
    return SourceRecord.read(path).fingerprint


def ranges(numbers: Iterable[int]) -> str:
    """Numbers that rise, as people write them: 0 to 3, 5, 7 to 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
