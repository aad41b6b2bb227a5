"""The families of models that vLLM serves packed: those that were tested. Others are refused before work starts.

vLLM has a loader for each family. Some reorder what they read, or look at a linear's weight instead of multiplying with
it. With packed weights that ends in a traceback, or in wrong answers without one. So a family counts once a test has
compared its answers, not because vLLM knows it.
"""

from __future__ import annotations

from pathlib import Path

from armor.core.errors import ArmorError

__all__ = ["SERVED", "check_family", "check_type"]

SERVED = (
    "cohere",
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5_moe",
    "exaone4",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "glm4",
    "glm4_moe",
    "gpt2",
    "granite",
    "granitemoe",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
)
"""Their `model_type` in config.json. tests/vllm/served.py has a model of each, docs/SERVING.md the list for users."""
INSTEAD = "serve the dense model that armor export makes, or leave vLLM out: transformers' server takes every type"


def check_type(model_type: str, place: str) -> None:
    """Raises ArmorError, which names `place`, where vLLM was not tested with packed models of this type."""
    if model_type not in SERVED:
        raise ArmorError(
            f"{place}: model_type {model_type}: not tested packed in vLLM, expected a type of docs/SERVING.md; "
            f"{INSTEAD}"
        )


def check_family(folder: Path | str) -> None:
    """Raises ArmorError where vLLM was not tested with packed models of the kind that `folder`'s config.json names."""
    from armor.runtime.folder import read_config  # not where a workflow is only planned

    config, file = read_config(folder), Path(folder) / "config.json"
    check_type(config.model_type, str(file))
    if config.model_type == "falcon" and (config.new_decoder_architecture or not config.multi_query):
        raise ArmorError(
            f"{file}: model_type falcon: found q, k and v of several heads in turn in query_key_value, which vLLM "
            f"takes apart only if dense; expected multi_query without new_decoder_architecture; {INSTEAD}"
        )
