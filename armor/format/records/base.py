"""What all records share: a version, reading and writing, and what made the result that they speak of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

from pydantic import ValidationError

from armor.core.errors import ArmorError
from armor.core.typed import Typed
from armor.execution.files import read_json, sha256, write_json
from armor.execution.machine import Machine

__all__ = ["BlockSizes", "File", "Input", "Made", "MadeBy", "Machine", "Origin", "Record"]


class Record(Typed):
    """A JSON file between two stages. A subclass sets `format_version: Literal[N] = N`, and AGAIN."""

    AGAIN: ClassVar[str]
    """What to do where the file is of another version, or broken."""

    @classmethod
    def version(cls) -> int:
        """The version that this release reads and writes."""
        return get_args(cls.model_fields["format_version"].annotation)[0]

    @classmethod
    def again(cls, record: Path | str = "it") -> str:
        """The same, also in the workflow: that sees whether `record` is there, and nothing of what lies beside it."""
        return f"{cls.AGAIN}, or delete {record} and run the workflow"

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """The record in `path`. Raises ArmorError, one line, if it is missing, broken or of another version."""
        value = read_json(path)
        found = value.get("format_version")
        if type(found) is not int or found != cls.version():  # True == 1
            raise ArmorError(f"{path}: format {found!r}, expected {cls.version()}; {cls.again()}")
        try:
            # JSON has no tuples: reading as JSON lets a list stand for one, and takes no text for a number.
            return cls.model_validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            what = {"missing": "is missing", "extra_forbidden": "is unknown"}.get(first["type"], first["msg"])
            raise ArmorError(f"{path}: {where}: {what}; no record of this release; {cls.again()}") from None

    @classmethod
    def within(cls, path: Path | str) -> Self | None:
        """The fields of this type in the record at `path`, whatever its stage and version; None unless all are there.

        Raises ArmorError if the file is missing or broken.
        """
        value = read_json(path)
        own = {name: value[name] for name in cls.model_fields if name in value}
        try:
            return cls.model_validate_json(json.dumps(own), strict=True)
        except ValidationError:
            return None

    @classmethod
    def read_if_there(cls, path: Path | str) -> Self | None:
        """As `read`; None where there is no such file."""
        return cls.read(path) if Path(path).is_file() else None

    def write(self, path: Path | str) -> None:
        """Write it as indented JSON with sorted keys, atomically. Raises ValueError for NaN and infinity."""
        write_json(path, self.as_json())

    def as_json(self) -> dict[str, Any]:
        """Its content as JSON has it."""
        return self.model_dump(mode="json")


class File(Typed):
    """A file by its content."""

    bytes: int
    """Its size in bytes."""
    sha256: str
    """Its SHA-256, in hexadecimal."""

    @classmethod
    def of(cls, path: Path) -> File:
        """The file at `path`, which is read whole."""
        return cls(bytes=path.stat().st_size, sha256=sha256(path))


class BlockSizes(Typed):
    """The sizes of the blocks around a core; null where a side has none."""

    left: int | None = None
    """A's: it divides the linear's outputs."""
    right: int | None = None
    """B's: it divides the linear's inputs."""

    @classmethod
    def of(cls, left: int | None, right: int | None) -> BlockSizes | None:
        """What a record says of the two; None without blocks."""
        return None if left is right is None else cls(left=left, right=right)


class Input:
    """The names of what a job read, in `MadeBy.inputs`. A report names records by path, a benchmark each recipe."""

    MODEL = "model"
    """The model: that of a source, or a checkpoint."""
    DENSE = "dense"
    """The source, where it stands beside a compressed model."""
    TEXT = "text"
    """The tokens."""
    TEXT_FILES = "text files"
    """The local files that the text is read from."""
    FILES = "files"
    """The files of the tasks that were built."""
    STATISTICS = "statistics"
    """The file of a decoder layer's statistics; of all layers, where a stage reads all."""
    STATES = "states"
    """The text of the hidden states."""
    SENSITIVITY = "sensitivity"
    """The file of the sensitivities."""
    PRICES = "prices"
    """The prices of all decoder layers."""
    BUDGET = "budget"
    """The choices of a budget."""
    BEFORE = "before"
    """The refined factors of all decoder layers before."""
    LAYER = "layer {}"
    """The file of a decoder layer's factors, by its number."""
    EXPERTS = "experts {}"
    """The file of the factors of a group of experts, by their numbers."""


class MadeBy(Typed):
    """What made a result: nothing in it names a path or a time."""

    stage: str
    """The module that the stage's code starts from."""
    code: str
    """The hash of the code that it executed."""
    settings: dict[str, Any]
    """The settings of the stage, resolved, the seed among them."""
    inputs: dict[str, str | None]
    """Fingerprints of what it read, by name; null for one that has none."""

    def layers(self) -> list[str]:
        """The names of those inputs that are factors of a decoder layer."""
        return [name for name in self.inputs if name.startswith(Input.LAYER.format(""))]

    def experts(self) -> list[str]:
        """The names of those inputs that are factors of a group of experts."""
        return [name for name in self.inputs if name.startswith(Input.EXPERTS.format(""))]


class Origin(Record):
    """A record that says what made a result."""

    made_by: MadeBy
    """What made the result."""


class Made(Origin):
    """A record of a result that a job computed."""

    machine: Machine
    """What the job ran on."""
    seconds: float
    """Seconds of the work. Interrupted runs count as far as their steps were kept."""
    peak_memory_bytes: int
    """The most memory that the process held, in bytes: resident on the host, or allocated on the card."""
