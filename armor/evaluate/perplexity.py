"""Perplexity on blocks of text: how many tokens, on average, the model is still choosing between.

The text is cut into n blocks of L tokens that do not overlap. In each block the model predicts tokens 2 to L from those
before them, and perplexity = exp(m), where m is the mean negative log-likelihood over all n·(L−1) predictions. Tokens
of one block depend on each other and blocks hardly do, so the standard error comes from the block means: that of m is
s/√n with s their standard deviation, and the delta method makes it perplexity·s/√n. The log-softmax is float32 whatever
the model computes in; it runs over a few tokens at a time, because the logits of one block are already the largest
tensor here (1,024 × 49,152 float32 are 200 MB) and a copy of all of them would double that. A run that was killed
goes on at the block where it was (`armor.execution.resume`).
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from armor.config import EvaluationSettings
from armor.errors import ArmorError
from armor.execution.files import write_json
from armor.execution.log import progress
from armor.execution.machine import peak_memory_bytes
from armor.execution.provenance import made_by
from armor.execution.resume import Steps, resumable
from armor.runtime.load import context_length, load_model, load_tokenizer
from armor.text import token_blocks

__all__ = ["evaluate", "perplexity", "token_losses"]

TOKENS_AT_A_TIME = 128


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """The negative log-likelihood in nats of each token but the first, (L−1,) float32.

    logits (L, vocabulary), any float dtype; tokens (L,) int64.
    """
    pieces = zip(logits[:-1].split(TOKENS_AT_A_TIME), tokens[1:].split(TOKENS_AT_A_TIME), strict=True)
    return torch.cat([F.cross_entropy(piece.float(), target, reduction="none") for piece, target in pieces])


def perplexity(block_means: Tensor) -> tuple[float, float | None]:
    """Perplexity and its standard error (None for a single block) from the mean loss of each block, (n,) in nats."""
    means = block_means.double()
    value = math.exp(means.mean().item())
    if len(means) == 1:
        return value, None
    return value, value * means.std().item() / math.sqrt(len(means))


@torch.inference_mode()
def _block_means(model: PreTrainedModel, blocks: Tensor, steps: Steps) -> Tensor:
    """The mean loss of each block, (n,) float64 in nats, from tokens (n, L). Raises ArmorError on NaN logits."""
    means = []
    for index, block in enumerate(progress(blocks, "perplexity", unit="block")):
        if known := steps.get(str(index)):
            means.append(known["mean"])
            continue
        tokens = block.to(model.device)
        # No cache: each block is read once, and keys and values of long blocks take room.
        losses = token_losses(model(input_ids=tokens[None], use_cache=False).logits[0], tokens)
        mean = losses.double().mean().item()
        if not math.isfinite(mean):
            position = (~losses.isfinite()).nonzero()[0].item()
            raise ArmorError(
                f"{model.name_or_path}: the logits are not finite (block {index}, token {position}), computed in "
                f"{str(model.dtype).removeprefix('torch.')}; check it with armor verify, or set the dtype to float32"
            )
        steps.put(str(index), {"mean": mean})
        means.append(mean)
    return torch.tensor(means, dtype=torch.float64)


def evaluate(
    folder: Path | str,
    settings: EvaluationSettings,
    output: Path | str,
    device: str = "cpu",
    fingerprint: str | None = None,
) -> dict:
    """Measure the perplexity of the model in `folder` (dense or ARMOR) and write it to `output`, {task}.json.

    `tokens` counts predictions, n·(L−1); `block_means` (nats) let models be compared block by block; `seconds` includes
    loading; `fingerprint`, the model's, is noted. Raises ArmorError for a folder that is not a model, a text too short,
    and logits that are not finite.
    """
    folder, output = Path(folder), Path(output)
    # The tokenizer and the text come first: a text too short should not wait for 70 billion weights.
    tokenizer = load_tokenizer(folder)
    longest = context_length(folder)
    length = settings.sequence_length or longest
    if length is None:
        raise ArmorError(f"{folder / 'config.json'}: names no context length; set sequence_length")
    if longest is not None and length > longest:
        raise ArmorError(f"sequence_length: found {length}, but the context length of {folder} is {longest}; lower it")
    blocks = token_blocks(settings.text, tokenizer, settings.sequences, length)  # (n, L)
    asked = settings.model_dump(mode="json", exclude_none=True)
    text = hashlib.sha256(blocks.numpy().tobytes()).hexdigest()
    work = {"model": _identity(folder), "text": text, "settings": asked}
    with resumable(output, __name__, device, **work) as steps:
        model = load_model(folder, settings.dtype, device)
        means = _block_means(model, blocks, steps)
        value, error = perplexity(means)
        result = {
            "format_version": 1,
            "task": output.stem,
            "metric": "perplexity",
            "value": value,
            "standard_error": error,
            "tokens": blocks.shape[0] * (blocks.shape[1] - 1),
            "blocks": blocks.shape[0],
            "length": blocks.shape[1],
            "block_means": means.tolist(),
            "seconds": steps.seconds(),
            "peak_memory_bytes": peak_memory_bytes(device),
            **made_by(__name__, asked, {"model": fingerprint, "text": text}, device),
        }
        write_json(output, result)
    return result


def _identity(folder: Path) -> list:
    """What tells this model from another in the same place, without reading it: every file's name, size and time."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.iterdir())]
