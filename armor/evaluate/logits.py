"""A model's logits on blocks of text, loaded or streamed, and what is computed from them, prediction by prediction.

The text is cut into n blocks of L tokens that do not overlap. In each block a model predicts tokens 2 to L from those
before them. The log-softmax is float32 whatever the model computes in. It runs over a few tokens at a time. The logits
of one block (L × vocabulary) are already the largest tensor here, and a copy of all of them would double that.

Models may not fit into the memory, of the GPU or else of the host. Then one decoder layer at a time is there
(`armor.runtime.streamed`), of one model and then of the other. As many blocks as have room for their hidden states go
through all layers. Then the logits come block by block, the same numbers as of loaded models. On the CPU a dense
mixture of experts is run so too: loading would hold its experts twice, and this takes little more time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from armor.config.measures import EvaluationSettings
from armor.core.errors import ArmorError, DoesNotFit
from armor.execution.log import log
from armor.execution.machine import USABLE, device_memory_bytes, host_memory_bytes
from armor.runtime.folder import read_config
from armor.runtime.load import load_model, loaded_dtype, weights_bytes
from armor.runtime.streamed import StreamedModel
from armor.runtime.streaming import stacks_experts, stream_model
from armor.text.reading import Blocks, read_blocks

__all__ = [
    "Model",
    "block_bytes",
    "blocks_of",
    "comparison",
    "finite",
    "logits_of",
    "peak_bytes",
    "token_losses",
    "vocabulary_of",
    "with_models",
]

Model = PreTrainedModel | StreamedModel
T = TypeVar("T")

TOKENS_AT_A_TIME = 128


def blocks_of(folder: Path, settings: EvaluationSettings) -> Blocks:
    """The text as the model in `folder` reads it. It comes before any weight: a mistake should not wait for those.

    Raises ArmorError where `read_blocks` does.
    """
    if settings.text is None:
        raise ArmorError("text: not given; a perplexity needs one")
    return read_blocks(folder, settings.text, settings.sequences, settings.sequence_length)


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


def vocabulary_of(folder: Path | str) -> int:
    """The logits that the model in `folder` gives for a token, by its config.json."""
    return read_config(folder).get_text_config().vocab_size


def peak_bytes(folders: Sequence[Path], dtype: str, length: int) -> int:
    """The memory that the models in `folders` take at their peak, in `dtype`, with one block of `length` tokens.

    From headers and config.json alone: all weights, the logits of the block, and float32 pieces of these. A decoder
    layer's own tensors are gone when the logits come.
    """
    return sum(weights_bytes(folder, dtype) + block_bytes(folder, dtype, length) for folder in folders)


def block_bytes(folder: Path, dtype: str, length: int) -> int:
    """Of these, the logits of one block and the pieces."""
    return vocabulary_of(folder) * (length * loaded_dtype(folder, dtype).itemsize + TOKENS_AT_A_TIME * 3 * 4)


def with_models(
    folders: Sequence[Path], dtype: str, length: int, device: str, work: Callable[[list[Model]], T], more: int = 0
) -> T:
    """`work` of the models in `folders`; streamed if they do not fit together with one block of `length` tokens.

    `more` bytes are needed beside them. On the CPU a dense mixture, whose experts would be held twice while it is
    loaded, is streamed too. Memory may run out all the same, for headers do not tell all. Then `work` is called again,
    with streamed models. What it had finished is for it to know. Raises ArmorError if the device has too little memory
    for one decoder layer and one block.
    """
    names = " and ".join(map(str, folders))
    needed, available = peak_bytes(folders, dtype, length) + more, device_memory_bytes(device) or host_memory_bytes()
    why = f"about {needed / 1e9:.3g} GB with one block of {length} tokens, {device} has {available / 1e9:.3g} GB"
    if needed <= USABLE * available:
        if device == "cpu" and any(map(stacks_experts, folders)):
            why = "loading holds its experts twice"
        else:
            try:
                return work([load_model(folder, dtype, device) for folder in folders])
            except (torch.OutOfMemoryError, DoesNotFit):
                why += ", and it ran out"
    log.info("%s: %s, so one decoder layer at a time is read", names, why)
    try:
        return work([stream_model(folder, dtype, device) for folder in folders])
    except torch.OutOfMemoryError as error:  # the estimate was too low, and no smaller way gives the same number
        raise ArmorError(
            f"{names}: out of memory on {device} with one decoder layer and one block of {length} tokens; lower "
            "sequence_length, take a larger GPU, or evaluate with --gpus 0 (gpu=0)"
        ) from error


def logits_of(model: Model, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The logits (L, vocabulary) of each block (L,), in order, when they are asked for."""
    batches = (tokens.to(model.device)[None] for tokens in blocks)
    if isinstance(model, StreamedModel):
        return map(itemgetter(0), model.logits(batches))  # a generator would hold a block's logits beside the next
    # No cache: each block is read once, and keys and values of long blocks take room.
    return (model(input_ids=tokens, use_cache=False).logits[0] for tokens in batches)


def finite(values: Tensor, model: Model, block: int) -> Tensor:
    """`values` (L−1,), computed from the logits of `model`, if they are finite. Raises ArmorError."""
    if not values.isfinite().all():
        position = (~values.isfinite()).nonzero()[0].item()
        raise ArmorError(
            f"{model.name_or_path}: the logits are not finite (block {block}, token {position}), computed in "
            f"{str(model.dtype).removeprefix('torch.')}; check it with armor verify, or set the dtype to float32"
        )
    return values
