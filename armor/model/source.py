"""A model in a Hugging Face folder, as the stages find it: where it is, and what tells it from others.

Source.json names it. The fingerprint follows the content of config.json and the weights, so a model that was moved is
the same and one that was edited is not.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from armor.core.errors import ArmorError
from armor.format.records.base import File
from armor.format.records.source import SourceRecord
from armor.format.shards import Shards

__all__ = ["UNWANTED", "WANTED", "Source", "describe", "fingerprint", "open_source"]

# What belongs to a model: weights, configuration, tokenizer with its chat template.
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "vocab.*", "merges.txt", "*.tiktoken")
UNWANTED = ["*/*", "consolidated*", "training_args*", "trainer_state*", "optimizer*"]


@dataclass(frozen=True)
class Source:
    """A model in a Hugging Face folder: `path`, the fingerprint of its content, the dtype of most of its weights,
    and its name on the Hub if it came from there."""

    path: Path
    fingerprint: str
    dtype: str
    hub: str | None = None

    def check(self, inspected: str) -> None:
        """Raises ArmorError if `inspected`, the fingerprint of a topology, is that of another model."""
        if inspected != self.fingerprint:
            raise ArmorError(
                f"{self.path}: not the model that was inspected (its fingerprint differs); run armor inspect again"
            )


def open_source(path: Path | str) -> Source:
    """The model behind a source.json, or in a Hugging Face folder (whose files are hashed for its fingerprint).

    Raises ArmorError if it is not there, or no longer what source.json says.
    """
    path = Path(path)
    if path.is_dir():
        shards = Shards(path)
        return Source(path, fingerprint(describe(path)), shards.main_dtype())
    record = SourceRecord.read(path)
    source = Source(path.parent / record.path, record.fingerprint, record.dtype, record.hub)
    for name, expected in record.files.items():
        file = source.path / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected.bytes:
            found = "missing" if size is None else f"{size} bytes"
            raise ArmorError(f"{file}: {found}, expected {expected.bytes} bytes; run armor fetch again")
    return source


def describe(folder: Path) -> dict[str, File]:
    names = {path.name for pattern in WANTED for path in folder.glob(pattern) if path.is_file()}
    names -= {path.name for pattern in UNWANTED[1:] for path in folder.glob(pattern)}
    return {name: File.of(folder / name) for name in sorted(names)}


def fingerprint(files: dict[str, File]) -> str:
    """The SHA-256 over config.json and the weights."""
    content = {n: f.sha256 for n, f in files.items() if n == "config.json" or n.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
