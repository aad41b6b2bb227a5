"""What a Hugging Face folder has beside its weights: the configuration and the tokenizer."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from armor.core.errors import ArmorError, one_line

__all__ = ["context_length", "load_tokenizer", "model_folder", "read_config"]


def model_folder(folder: Path | str) -> Path:
    """`folder`. Raises ArmorError if it holds no config.json."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ArmorError(f"{folder}: no config.json here; expected a Hugging Face model folder")
    return folder


def read_config(folder: Path | str) -> PreTrainedConfig:
    """The configuration of the model in a Hugging Face folder. Raises ArmorError if transformers cannot read it."""
    folder = model_folder(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of every kind, where config.json was edited
        raise ArmorError(f"{folder}/config.json: transformers cannot read it: {one_line(error)}") from error


def context_length(config: PreTrainedConfig) -> int | None:
    """The number of tokens that a model was made for; None if it does not say, or says that any number will do."""
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if length is not None and length > 0 else None


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer in a Hugging Face folder. Raises ArmorError if it has none."""
    folder = model_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ArmorError(f"{folder}: no tokenizer that transformers can load: {one_line(error)}") from error
