"""Which of transformers' Auto classes a model is read with: text alone, images and text, or more kinds of input.

A checkpoint names its class in config.json. A wrapper (Qwen2.5-VL, Gemma 3, Mistral 3) stays one: its text
model is run and compressed within it, and whatever else it has is kept. The text models of some wrappers (Emu3, Mllama)
have a class that no Auto class makes: it is then taken by its name.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

__all__ = ["auto_class", "from_config"]

MAPPINGS = (
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
)


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class that makes the class which `config` names, else the first one that takes such a `config`.

    Where none does, the class itself, if it is one of transformers' that write text; else AutoModelForCausalLM, which
    then raises.
    """
    taking = [(auto, mapping[type(config)]) for auto, mapping in MAPPINGS if type(config) in mapping]
    named = [auto for auto, kind in taking if getattr(kind, "__name__", None) in (config.architectures or ())]
    return (named or [auto for auto, _ in taking] or _writing(config) or [AutoModelForCausalLM])[0]


def _writing(config: PreTrainedConfig) -> list[Any]:
    """The classes of transformers that `config` names, has the configuration of, and that write text."""
    kinds = [getattr(transformers, name, None) for name in config.architectures or ()]
    return [
        kind
        for kind in kinds
        if isinstance(kind, type)
        and issubclass(kind, PreTrainedModel)
        and issubclass(kind, GenerationMixin)
        and kind.config_class is type(config)
    ]


def from_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config` without what its checkpoint holds, in `dtype`. Raises what transformers does."""
    kind = auto_class(config)
    make = kind._from_config if issubclass(kind, PreTrainedModel) else kind.from_config
    return make(config, dtype=dtype)
