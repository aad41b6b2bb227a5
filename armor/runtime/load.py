"""One way to load a model for measuring it: dense or ARMOR, complete, in evaluation mode, or one clear error.

transformers fills what a checkpoint lacks with random numbers and a warning. A perplexity or a speed of such a model
would be a number about nothing. So a missing tensor is refused here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import armor.runtime.quantizer  # noqa: F401  teaches transformers the ARMOR format
from armor.core.errors import ArmorError, DoesNotFit, one_line
from armor.execution.quiet import quiet_transformers
from armor.format.shards import Shards
from armor.runtime.auto import auto_class
from armor.runtime.folder import model_folder, read_config

__all__ = ["check_names", "load_model", "loaded_dtype", "weights_bytes"]


def load_model(folder: Path | str, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """The causal language model in a Hugging Face folder, in `dtype` (auto: the checkpoint's own), on `device`.

    Raises ArmorError if the folder is not a model or lacks tensors, or if the device has too little memory for it.
    """
    folder = model_folder(folder)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    placement = {} if device == "cpu" else {"device_map": device}
    model, loading = _load(auto_class(read_config(folder)), folder, dtype=wanted, **placement)
    if missing := sorted(loading["missing_keys"]):
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise ArmorError(f"{folder}: {missing[0]}{more} not in the checkpoint; fetch or assemble the model again")
    return model.eval().requires_grad_(False)


def loaded_dtype(folder: Path | str, dtype: str = "auto") -> torch.dtype:
    """The dtype that `load_model` loads in; "auto" is that of config.json, and of the weights where it has none."""
    found: torch.dtype | str = dtype
    if dtype == "auto":
        config = read_config(folder)
        found = config.dtype or config.get_text_config().dtype or Shards(folder).main_dtype()
    return getattr(torch, found) if isinstance(found, str) else found


def weights_bytes(folder: Path | str, dtype: str = "auto", shards: Shards | None = None) -> int:
    """The memory that `load_model` fills with weights, from headers and config.json alone.

    `shards` are the folder's, if they are open.
    """
    shards, own, total = shards or Shards(folder), loaded_dtype(folder, dtype), 0
    is_tied = read_config(folder).get_text_config().tie_word_embeddings
    for name in shards.names():
        if not (name == "lm_head.weight" and is_tied):
            stored = getattr(torch, shards.dtype(name))
            is_float = stored.is_floating_point and stored.itemsize > 1  # fp8 stays what it is
            total += math.prod(shards.shape(name)) * (own if is_float else stored).itemsize
    return total


def check_names(folder: Path | str) -> None:
    """Hold the names and shapes of a checkpoint's tensors against the model that its config.json describes.

    The model is loaded as ever, but onto the meta device: no number is read. Raises ArmorError for a config.json that
    transformers cannot make a model of, and for a tensor that is missing, of another shape, or one too many.
    """
    folder = model_folder(folder)
    config = read_config(folder)
    if not config.architectures:
        raise ArmorError(f"{folder / 'config.json'}: architectures: names no class; was it edited?")
    kind = getattr(transformers, str(config.architectures[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        kind = auto_class(config)  # some were published under a name that transformers does not have
    with quiet_transformers():
        _, loading = _load(kind, folder, device_map="meta")
    for what in ("missing", "unexpected", "mismatched"):
        for name in sorted(map(str, loading[f"{what}_keys"]))[:1]:
            raise ArmorError(f"{folder}: {name}: {what}, by the model of config.json; assemble or copy it again")


def _load(kind: Any, folder: Path, **options: Any) -> tuple[PreTrainedModel, dict]:
    """`kind.from_pretrained(folder)` and what transformers says of the tensors. Raises ArmorError where it cannot."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    except ArmorError:
        raise
    except torch.OutOfMemoryError as error:
        place = options.get("device_map") or "the host"
        raise DoesNotFit(
            f"{folder}: the model does not fit into the memory of {place}: {one_line(error)}; "
            "take a larger GPU, or compute on the CPU with --gpus 0 (gpu=0)"
        ) from error
    except Exception as error:  # of every kind, where config.json was edited
        raise ArmorError(f"{folder}: transformers cannot load this model: {one_line(error)}") from error
