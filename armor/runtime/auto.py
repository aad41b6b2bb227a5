"""Which of transformers' Auto classes a model is read with: text alone, images and text, or more kinds of input.

A checkpoint names its class in config.json. A wrapper (Qwen2.5-VL, Gemma 3, Mistral 3) stays one: its text
model is run and compressed within it, and whatever else it has is kept.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)

__all__ = ["auto_class"]

MAPPINGS = (
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
)


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class that makes the class which `config` names, else the first one that takes such a `config`.

    AutoModelForCausalLM where none does; what it raises then names what it takes.
    """
    taking = [(auto, mapping[type(config)]) for auto, mapping in MAPPINGS if type(config) in mapping]
    named = [auto for auto, kind in taking if getattr(kind, "__name__", None) in (config.architectures or ())]
    return (named or [auto for auto, _ in taking] or [AutoModelForCausalLM])[0]
