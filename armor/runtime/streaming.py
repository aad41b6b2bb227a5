"""To stream a model from its folder, dense or packed; and when that is better than to load it.

Apart from `armor.runtime.streamed`, so that tune, which streams the dense model, does not depend on the kernels. And
apart from `armor.runtime.load`, so that benchmarks do not depend on streaming.
"""

from __future__ import annotations

from pathlib import Path

import torch

from armor.format.scaled import is_scaled
from armor.format.shards import Shards
from armor.runtime.experts import Experts
from armor.runtime.folder import read_config
from armor.runtime.load import loaded_dtype
from armor.runtime.quantizer import swap_skeleton
from armor.runtime.skeleton import open_skeleton
from armor.runtime.streamed import StreamedModel

__all__ = ["stacks_experts", "stream_model"]


def stream_model(folder: Path | str, dtype: str = "auto", device: str = "cpu") -> StreamedModel:
    """The model that `load_model` loads, of which one decoder layer at a time is in memory. Raises ArmorError like it;
    what is wrong with a dense layer shows when it is read."""
    found = loaded_dtype(folder, dtype)
    skeleton = open_skeleton(Path(folder), found)
    swap_skeleton(skeleton.model, Shards(folder))
    return StreamedModel(skeleton, folder, found, device)


def stacks_experts(folder: Path | str) -> bool:
    """Whether transformers stacks experts when it loads the model in `folder`, and meanwhile holds them twice.

    It does so with dense experts that are stored one by one. Raises ArmorError where `open_skeleton` does.
    """
    quantization = getattr(read_config(folder), "quantization_config", None)
    if quantization is not None and not is_scaled(quantization):
        return False
    modules = open_skeleton(Path(folder), torch.float32).model.modules()
    return any(isinstance(module, Experts) and not module.is_stored_fused for module in modules)
