"""The names of files within a folder that a stage is given, and beside a record; `armor.format.layout` has the folders.

Stages import this and not the layout. So a path that is added or moved there runs none of them again.
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "MODEL",
    "beside",
    "factors_beside",
    "layer_file",
    "layer_files",
    "layer_name",
    "logits_beside",
    "record_beside",
    "record_of_folder",
    "samples_beside",
    "task_beside",
]

MODEL = "model.json"


def layer_name(index: int | str) -> str:
    """The name of a file of decoder layer `index`, without its suffix."""
    return f"layer_{index}"


def layer_file(folder: Path, index: int | str) -> Path:
    """The safetensors of decoder layer `index` in `folder`; its record has the same name, with .json."""
    return folder / f"{layer_name(index)}.safetensors"


def layer_files(folder: Path, suffix: str = ".safetensors") -> list[Path]:
    """The files of all decoder layers in `folder`, by number: the safetensors, or with ".json" their records."""
    return sorted(folder.glob(layer_name("*") + suffix), key=lambda file: (len(file.name), file.name))


def beside(record: Path | str) -> Path:
    """The folder that a record speaks of: its name without .json, beside it."""
    return Path(record).with_suffix("")


def factors_beside(record: Path | str) -> Path:
    """The tensors that a record speaks of: factors of a layer, numbers of a sensitivity."""
    return Path(record).with_suffix(".safetensors")


def record_beside(tensors: Path | str) -> Path:
    """The record that speaks of a file of tensors: the other way round."""
    return Path(tensors).with_suffix(".json")


def record_of_folder(folder: Path) -> Path:
    """The record that speaks of `folder`: the other way round."""
    return folder.with_name(f"{folder.name}.json")


def logits_beside(predictions: Path | str) -> Path:
    """The file with the logits that the record `predictions` speaks of."""
    return Path(predictions).with_suffix(".safetensors")


def task_beside(evaluation: Path | str, task: str) -> Path:
    """The record of one of the tasks that the record `evaluation` sums up."""
    return beside(evaluation) / f"{task}.json"


def samples_beside(evaluation: Path | str, task: str) -> Path:
    """The file with every item of one of the tasks, and what the model said to it."""
    return beside(evaluation) / f"{task}.samples.jsonl"
