"""What the sub-commands share: the app, their options, and what is settled before torch is imported."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from armor.core.errors import ArmorError
from armor.execution import devices, machine
from armor.format import layout, names

__all__ = [
    "CalibrationFile",
    "Gpus",
    "Output",
    "Settings",
    "SourceFile",
    "StartFolder",
    "Threads",
    "TopologyFile",
    "app",
    "folder_of",
    "prepare",
]

app = typer.Typer(
    name="armor",
    help="Compress a large language model by ARMOR: 2:4 sparse cores between block-diagonal matrices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _writable(path: Path) -> Path:
    """`path`, if a file can be written there: better said now than after hours of work."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        reason = "is a folder" if path.is_dir() else f"{folder} is not a folder that you may write to"
        raise ArmorError(f"{path}: {reason}; expected the name of a file to write")
    return path


SourceFile = Annotated[Path, typer.Option(help=f"{layout.SOURCE}, or a folder with a Hugging Face model.")]
TopologyFile = Annotated[Path, typer.Option(help=f"{names.MODEL}, as `armor inspect` writes it.")]
CalibrationFile = Annotated[
    Path,
    typer.Option(
        help=f"{layout.CALIBRATION}, or its folder; the layers' statistics lie beside it.",
        callback=lambda path: path / layout.CALIBRATION if path.is_dir() else path,
    ),
]
StartFolder = Annotated[Path, typer.Option(help="The folder with the factors to start from.")]
Output = Annotated[Path, typer.Option(help="The file to write.", callback=_writable)]
Settings = Annotated[str, typer.Option(help="The stage's settings: inline YAML or JSON, or a file's path.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads to compute with; unset: as many as torch chooses.")]
Gpus = Annotated[int, typer.Option(min=0, help="GPUs to lease; 0, or no GPU visible: compute on the CPU.")]


@app.callback()
def _root(debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "huggingface_hub", "transformers", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    app.debug = debug  # pyright: ignore[reportAttributeAccessIssue]  a mark of ours on typer's object
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # progress bars of libraries would fill log files
        os.environ.setdefault("TQDM_DISABLE", "1")


def prepare(threads: int | None, gpus: int = 0) -> str:
    """Settle threads and device before torch starts; returns the torch device."""
    if threads is not None:
        machine.set_threads(threads)
    return devices.lease(gpus)


def folder_of(path: Path) -> Path:
    """The model folder behind a source's or a checkpoint's record, or the folder itself."""
    if path.name == layout.CHECKPOINT:
        return names.beside(path)
    if path.is_dir():  # no need of a fingerprint, for which every byte would be read
        from armor.format.shards import Shards

        return Shards(path).folder
    from armor.model.source import open_source

    return open_source(path).path
