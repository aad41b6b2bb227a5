"""Perplexity on blocks of text: how many tokens, on average, the model is still choosing between.

The text is cut into n blocks of L tokens that do not overlap. In each block the model predicts tokens 2 to L from those
before them, and perplexity = exp(m), where m is the mean negative log-likelihood over all n·(L−1) predictions. Tokens
of one block depend on each other and blocks hardly do, so the standard error comes from the block means: that of m is
s/√n with s their standard deviation, and the delta method makes it perplexity·s/√n. The log-softmax is float32 whatever
the model computes in; it runs over a few tokens at a time, because the logits of one block are already the largest
tensor here (1,024 × 49,152 float32 are 200 MB) and a copy of all of them would double that. A run that was killed
goes on at the block where it was (`armor.execution.resume`).

Beside its dense model, run on each block in turn, a compressed one is also compared to it at every prediction:
KL(dense ‖ compressed) in nats, and whether both find the same token the most likely. These see every change of the
predictions, also one that helps as often as it hurts, and so show a loss long before perplexity does. The price is two
models in memory and the dense model's time; to keep its logits instead would take gigabytes.

Where these do not fit into the memory, of the GPU or else of the host, one decoder layer at a time is there
(`armor.runtime.streamed`), of one model and then of the other: as many blocks as have room for their hidden states go
through all layers, and then the logits of both models come block by block, the same numbers as of loaded models. A run
that was killed goes on with the blocks that had not come, through all layers again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from armor.config.measures import EvaluationSettings
from armor.core.errors import ArmorError
from armor.execution.files import write_json
from armor.execution.log import log, progress
from armor.execution.machine import device_memory_bytes, host_memory_bytes, peak_memory_bytes
from armor.execution.resume import Steps, identity, resumable
from armor.format.provenance import made_by
from armor.runtime.load import (
    context_length,
    load_model,
    load_tokenizer,
    loaded_dtype,
    read_config,
    weights_bytes,
)
from armor.runtime.streamed import USABLE, StreamedModel
from armor.text.blocks import token_blocks

__all__ = ["comparison", "evaluate", "mean", "peak_bytes", "perplexity", "token_losses"]

Model = PreTrainedModel | StreamedModel

TOKENS_AT_A_TIME = 128


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """The negative log-likelihood in nats of each token but the first, (L−1,) float32.

    logits (L, vocabulary), any float dtype; tokens (L,) int64.
    """
    pieces = zip(logits[:-1].split(TOKENS_AT_A_TIME), tokens[1:].split(TOKENS_AT_A_TIME), strict=True)
    return torch.cat([F.cross_entropy(piece.float(), target, reduction="none") for piece, target in pieces])


def comparison(logits: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """KL(dense ‖ compressed) in nats, and whether both models' most likely token is the same, at all predictions.

    logits and dense (L, vocabulary), any float dtype; both results (L−1,), float32 and bool: the last logits predict a
    token that is not there.
    """
    divergences, same = [], []
    for own, other in zip(logits[:-1].split(TOKENS_AT_A_TIME), dense[:-1].split(TOKENS_AT_A_TIME), strict=True):
        own, other = own.float(), other.float()
        pair = own.log_softmax(-1), other.log_softmax(-1)
        divergences.append(F.kl_div(*pair, reduction="none", log_target=True).sum(-1))
        same.append(own.argmax(-1) == other.argmax(-1))
    return torch.cat(divergences), torch.cat(same)


def mean(block_means: Tensor) -> tuple[float, float | None]:
    """The mean over blocks and its standard error (None for a single block), from the mean of each block, (n,)."""
    means = block_means.double()
    return means.mean().item(), means.std().item() / math.sqrt(len(means)) if len(means) > 1 else None


def perplexity(block_means: Tensor) -> tuple[float, float | None]:
    """Perplexity and its standard error (None for a single block) from the mean loss of each block, (n,) in nats."""
    loss, error = mean(block_means)
    return math.exp(loss), None if error is None else math.exp(loss) * error


def peak_bytes(folders: Sequence[Path], dtype: str, length: int) -> int:
    """The memory that the models in `folders` take at their peak, in `dtype`, with one block of `length` tokens.

    From headers and config.json alone: all weights, the logits of the block, and float32 pieces of these. A decoder
    layer's own tensors are gone when the logits come.
    """
    total = 0
    for folder in folders:
        vocabulary = read_config(folder).get_text_config().vocab_size
        logits = vocabulary * (length * loaded_dtype(folder, dtype).itemsize + TOKENS_AT_A_TIME * 3 * 4)
        total += weights_bytes(folder, dtype) + logits
    return total


@torch.inference_mode()
def _measure(model: Model, dense: Model | None = None, *, blocks: Tensor, steps: Steps) -> dict[str, Tensor]:
    """The means of each block, (n,) float64, from tokens (n, L): the `loss` and, beside a dense model, `kl` and `top1`.

    Raises ArmorError on NaN logits.
    """
    todo = [block.to(model.device) for index, block in enumerate(blocks) if steps.get(str(index)) is None]
    own, other = _logits(model, todo), dense and _logits(dense, todo)
    left, found = iter(todo), []
    for index in progress(range(len(blocks)), "perplexity", unit="block"):
        if (known := steps.get(str(index))) is None:
            tokens, logits = next(left), next(own)
            values = {"loss": _finite(token_losses(logits, tokens), model, index)}
            if dense is not None:
                divergences, values["top1"] = comparison(logits, next(other))
                values["kl"] = _finite(divergences, dense, index)
            known = {name: value.double().mean().item() for name, value in values.items()}
            steps.put(str(index), known)
        found.append(known)
    return {name: torch.tensor([means[name] for means in found], dtype=torch.float64) for name in found[0]}


def _logits(model: Model, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The logits (L, vocabulary) of each block (L,), in order, when they are asked for."""
    batches = (tokens[None] for tokens in blocks)
    if isinstance(model, StreamedModel):
        return (logits[0] for logits in model.logits(batches))
    # No cache: each block is read once, and keys and values of long blocks take room.
    return (model(input_ids=tokens, use_cache=False).logits[0] for tokens in batches)


def _finite(values: Tensor, model: Model, block: int) -> Tensor:
    """`values` (L−1,), computed from the logits of `model`, if they are finite."""
    if not values.isfinite().all():
        position = (~values.isfinite()).nonzero()[0].item()
        raise ArmorError(
            f"{model.name_or_path}: the logits are not finite (block {block}, token {position}), computed in "
            f"{str(model.dtype).removeprefix('torch.')}; check it with armor verify, or set the dtype to float32"
        )
    return values


def evaluate(
    folder: Path | str,
    settings: EvaluationSettings,
    output: Path | str,
    device: str = "cpu",
    dense: Path | str | None = None,
    fingerprints: dict[str, str | None] | None = None,
) -> dict:
    """Measure the perplexity of the model in `folder` (dense or ARMOR) and write it to `output`, {task}.json.

    `tokens` counts predictions, n·(L−1); `block_means` (nats) let models be compared block by block; `seconds` includes
    loading; `against_dense` is the comparison to the model in the folder `dense`, None without one; `fingerprints`, of
    model and dense, are noted. Raises ArmorError for a folder that is not a model, a dense one of other tokens, a text
    too short, a device with too little memory, and logits that are not finite.
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
    if dense is not None:
        _check_same_tokens(folder, Path(dense))
    models = [folder, Path(dense)] if dense is not None else [folder]
    blocks = token_blocks(settings.text, tokenizer, settings.sequences, length)  # (n, L)
    asked = settings.model_dump(mode="json")
    text = hashlib.sha256(blocks.numpy().tobytes()).hexdigest()
    work = {"model": identity(folder), "dense": dense and identity(Path(dense)), "text": text, "settings": asked}
    with resumable(output, __name__, device, **work) as steps:
        means = _measured(models, settings.dtype, blocks, device, steps)
        value, error = perplexity(means["loss"])
        result = {
            "format_version": 1,
            "task": output.stem,
            "metric": "perplexity",
            "value": value,
            "standard_error": error,
            "tokens": blocks.shape[0] * (blocks.shape[1] - 1),
            "blocks": blocks.shape[0],
            "length": blocks.shape[1],
            "block_means": means["loss"].tolist(),
            "against_dense": dense and {name: _summary(means[name]) for name in ("kl", "top1")},
            "seconds": steps.seconds(),
            "peak_memory_bytes": peak_memory_bytes(device),
            **made_by(__name__, asked, {**(fingerprints or {}), "text": text}, device),
        }
        write_json(output, result)
    return result


def _measured(folders: Sequence[Path], dtype: str, blocks: Tensor, device: str, steps: Steps) -> dict[str, Tensor]:
    """`_measure` of the first of `folders`, beside the second; streamed if both do not fit together with one block.

    Memory may run out all the same, for headers do not tell all: then the blocks that are left are streamed too.
    """
    names, length = " and ".join(map(str, folders)), blocks.shape[1]
    needed, available = peak_bytes(folders, dtype, length), device_memory_bytes(device) or host_memory_bytes()
    sizes = f"about {needed / 1e9:.3g} GB with one block of {length} tokens, {device} has {available / 1e9:.3g} GB"
    if needed <= USABLE * available:
        try:
            return _measure(*(load_model(folder, dtype, device) for folder in folders), blocks=blocks, steps=steps)
        except torch.OutOfMemoryError:
            sizes += ", and it ran out"
    log.info("%s: %s, so one decoder layer at a time is read", names, sizes)
    try:
        return _measure(*(StreamedModel(folder, dtype, device) for folder in folders), blocks=blocks, steps=steps)
    except torch.OutOfMemoryError as error:  # one block and one layer: there is no smaller way to the same number
        raise ArmorError(
            f"{names}: out of memory on {device} with one decoder layer and one block of {length} tokens; lower "
            "sequence_length, take a larger GPU, or evaluate with --gpus 0 (gpu=0)"
        ) from error


def _summary(block_means: Tensor) -> dict:
    value, error = mean(block_means)
    return {"value": value, "standard_error": error, "block_means": block_means.tolist()}


def _check_same_tokens(folder: Path, dense: Path) -> None:
    """Raise ArmorError unless both models predict the same tokens: else their predictions do not compare."""
    own, other = (load_tokenizer(path).get_vocab() for path in (folder, dense))
    sizes = [read_config(path).get_text_config().vocab_size for path in (folder, dense)]
    if own != other or sizes[0] != sizes[1]:
        raise ArmorError(
            f"{folder}: its vocabulary ({len(own)} tokens, {sizes[0]} logits) is not that of the dense model {dense} "
            f"({len(other)} tokens, {sizes[1]} logits), so they do not compare; name the model that it was made from"
        )
