"""layer_{k}.json: what became of the linears of one decoder layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from itertools import zip_longest
from typing import ClassVar, Literal

from armor.core.quantization import NumberType, Quantization
from armor.core.typed import Typed
from armor.format.records.base import BlockSizes, Made, MadeBy

__all__ = ["Integers", "LayerRecord", "LinearRecord", "Look", "Training", "trainings"]


class Integers(Typed):
    """What the factors of a linear are stored as, with bfloat16 scales."""

    core: NumberType
    """The type of S's numbers."""
    blocks: Literal["int8"] | None
    """The type of the numbers of A and B, which have a scale for each row; null: floats."""
    group: int
    """How many columns of S share a scale."""

    @classmethod
    def of(cls, quantization: Quantization | None) -> Integers | None:
        """What a record says of it; None of floats."""
        return cls(**asdict(quantization)) if quantization else None


class LinearRecord(Typed):
    """One linear's factors. Losses are proxy losses relative to that of a zero matrix."""

    method: str
    """The method that was used. If it is not the one that was asked for, `note` says why."""
    pattern: str | None
    """The pattern of the core; null if the linear stays dense."""
    block_sizes: BlockSizes | None
    """Null without blocks."""
    rank: int | None = None
    """Of the low-rank pair U·V beside the core; null without one."""
    start_loss: float
    """The relative proxy loss (zeros: 1; no unit) of plain NoWag-P pruning; where the factors are quantized, of its
    weights rounded alike."""
    loss: float
    """The relative proxy loss (zeros: 1; no unit) of the factors as they are stored."""
    condition: float | None = None
    """The worst condition number of the blocks of A and B, as stored. It says how far an error in one of their entries
    can grow. 1e16 for a singular block, null without blocks."""
    trace: tuple[tuple[int, float, float], ...]
    """Points (iteration, seconds, best relative proxy loss so far), at most 100. Linears that share B have those of all
    together."""
    seed: int
    """The seed of its random choices."""
    device: str
    """The torch device that it was computed on."""
    seconds: float
    """Seconds of its work."""
    peak_memory_bytes: int
    """The most memory of the process until this linear was done, in bytes."""
    note: str | None
    """What was done otherwise than asked."""
    quantization: Integers | None = None
    """Null where the factors are floats."""
    float_loss: float | None = None
    """The relative proxy loss (zeros: 1; no unit) of the factors before they were quantized; null where they were
    not."""
    right_of: str | None = None
    """The last part of the name of the linear beside it whose B it shares; null where it holds its own."""


class Look(Typed):
    """A look at the held-out sequences while something is trained."""

    step: int
    """The steps that were done."""
    train_loss: float | None
    """The mean loss on what was trained on since the look before; null at the start."""
    held_out_loss: float
    """The loss on the held-out sequences, of what would be stored."""


class Training(Typed):
    """What a training did, and its losses.

    The loss of refine is the error of a decoder layer's output: for each token its square divided by that of the dense
    output, the mean over tokens. The loss of tune is the KL divergence of the predictions from the dense model's, in
    nats.
    """

    stage: Literal["refine", "tune"]
    """The stage that trained: one decoder layer, or the whole model."""
    inputs: Literal["dense", "compressed"] | None = None
    """What went into the layer that was refined: what the dense model has there, or what the refined layers before make
    of the text. Null of tune."""
    start_loss: float
    """The loss on the held-out sequences before, in the unit of the stage."""
    loss: float
    """The same of what is stored; never above it."""
    kept: int
    """The step whose values are stored; 0: as they were."""
    steps: int
    """The steps that were done, of all tries."""
    diverged: bool
    """Whether it was stopped because the loss grew without bound, in the last try."""
    restarts: tuple[int, ...] = ()
    """The steps after which it began again from the best one, each time at a quarter of the rate."""
    looks: tuple[Look, ...]
    """Every look at the held-out sequences, the first before the first step."""
    sequences: int
    """Sequences to train on."""
    held_out: int
    """Held-out sequences."""
    length: int
    """Tokens in a sequence."""
    text: str = "an unnamed text"
    """What the sequences are of: a dataset, or names of files."""
    tokens: int
    """Tokens that were trained on, repetitions counted."""
    rate: float
    """The largest step of the first try, relative to the root mean square of each tensor."""
    parameters: int
    """How many numbers were trained."""
    core: bool = True
    """Whether the values of S were trained."""
    rounded: bool = False
    """Whether what was trained are integers or fp8, through their rounding."""
    norms_and_biases: tuple[str, ...]
    """The tensors that were trained beside the factors, by full name."""
    proxy_losses: dict[str, float]
    """The relative proxy loss of every linear before, by full name. That after is in the linear's record."""
    made_by: MadeBy
    """What made it."""


class LayerRecord(Made):
    """`{model}/{recipe}/layers/layer_{layer}.json`, by `armor factorize`: loss and size of each linear; factors beside.

    A group of experts has the same record, experts/layer_{layer}/{experts}.json. `armor refine` and `armor tune` write
    it with `training` into refined/ and tuned/, `armor quantize` with the `quantization` of linears into quantized/;
    trained integers have both. The factors are layer_{layer}.safetensors.
    """

    AGAIN: ClassVar[str] = "run armor factorize for this layer again"

    format_version: Literal[3] = 3
    layer: int
    """Its number, from 0."""
    fingerprint: str
    """That of the model."""
    sha256: str
    """That of the factors' file."""
    statistics_fingerprint: str | None
    """That of the statistics' file; null if there was none, because nothing needed it."""
    modules: dict[str, LinearRecord]
    """The linears by full name."""
    factorized: MadeBy | None = None
    """What made the factors that training or quantization started from; null where this record is that of the
    factorization."""
    training: tuple[Training, ...] = ()
    """What the factors were trained by, in order."""


def trainings(records: Iterable[LayerRecord]) -> list[list[Training]]:
    """What trained a model's factors, in order, each as the layers' own; a layer with nothing to train is not in it."""
    rounds = zip_longest(*(record.training for record in records))
    return [[done for done in found if done] for found in rounds]
