"""Settings of what is trained after the factorization: single decoder layers (refine), the whole model (tune)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, count
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from armor.config.common import Name
from armor.config.sample import Sample
from armor.config.sources import same_beginning
from armor.core.errors import ArmorError
from armor.core.typed import Typed

__all__ = [
    "RefineJob",
    "RefineSettings",
    "TrainingStage",
    "TrainingSettings",
    "TuneJob",
    "TuneSettings",
    "check_held_out",
]


class TrainingSettings(Typed):
    """What both kinds of training share: Adam with a warm-up and a cosine to zero, on sequences of a text."""

    steps: int = Field(default=64, ge=1)
    """Steps of the optimiser."""
    batch: int = Field(default=2, ge=1)
    """Sequences in a step."""
    sequences: int = Field(default=128, ge=1)
    """How many token sequences there are to train on."""
    held_out: int = Field(default=8, ge=1)
    """How many sequences after them are held out. The loss on these decides which step is kept, if any. A training
    before, of the same recipe or its bases, may not have learned from them."""
    sequence_length: int | None = Field(default=None, ge=2)
    """Tokens in each; unset: as the calibration says, or else the model's context length."""
    calibration: Name | None = None
    """The calibration whose text serves; unset: the recipe's."""
    rate: float = Field(default=3e-3, gt=0)
    """The largest step of the optimiser, relative to the root mean square of each tensor. Where it is too high, a
    quarter of it is tried, and then a sixteenth."""
    norm_rate: float = Field(default=0.2, ge=0)
    """The rate of norms and biases, as a share of `rate`."""
    warm_up: int = Field(default=8, ge=0)
    """Steps in which the rate rises from zero."""
    core: bool = True
    """Whether the values of S are trained too."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many looks at the held-out sequences without a better one. After the first there are eight at most.
    Unset: never."""

    @model_validator(mode="after")
    def _check(self) -> TrainingSettings:
        if self.batch > self.sequences:
            raise ValueError(f"batch: found {self.batch}, but there are {self.sequences} sequences; lower it")
        return self


class RefineSettings(TrainingSettings):
    """Train each compressed decoder layer until its output is close to the dense one's."""

    steps: int = Field(default=160, ge=1)
    """Steps of the optimiser."""
    inputs: Literal["dense", "compressed"] = "dense"
    """What goes into a layer. dense: what the dense model has there; layers do not wait for each other. compressed:
    what the compressed layers before make of the text; a layer mends what they lost, and waits for them."""


class TuneSettings(TrainingSettings):
    """Train the whole compressed model until its predictions are close to the dense one's, by KL divergence."""

    steps: int = Field(default=96, ge=1)
    """Steps of the optimiser."""
    sequences: int = Field(default=192, ge=1)
    """How many token sequences there are to train on."""
    rate: float = Field(default=1.5e-4, gt=0)
    """The largest step of the optimiser, relative to the root mean square of each tensor."""


class RefineJob(Typed):
    """Refinement as a job has it: the settings, the sequences with the held-out ones at the end, the seed."""

    refine: RefineSettings
    sample: Sample
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> RefineJob:
        _check_count(self.sample, self.refine)
        return self


class TuneJob(Typed):
    """Tuning as a job has it: the settings, the sequences with the held-out ones at the end, the seed."""

    tune: TuneSettings
    sample: Sample
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> TuneJob:
        _check_count(self.sample, self.tune)
        return self


def _check_count(sample: Sample, settings: TrainingSettings) -> None:
    wanted = settings.sequences + settings.held_out
    if sample.sequences != wanted:
        raise ValueError(
            f"sample.sequences: found {sample.sequences}, expected {wanted}: {settings.sequences} to train on, then "
            f"{settings.held_out} that are held out"
        )


class TrainingStage(NamedTuple):
    """A stage of training: what it is called, its settings and its sequences."""

    name: str
    settings: TrainingSettings
    sample: Sample


def check_held_out(trainings: Sequence[TrainingStage]) -> None:
    """Raise ArmorError where one of `trainings` holds out what one before it has learned from.

    What cannot be told here passes: where one length is the model's context and the other a number, and where two texts
    share documents, but not their first.
    """
    for earlier, later in combinations(trainings, 2):
        if (earlier.sample.sequence_length is None) == (later.sample.sequence_length is None):
            found, wanted = later.settings.sequences, _first_unseen(later, earlier)
            if found < wanted:
                raise ArmorError(
                    f"{later.name}.sequences: found {found}, expected at least {wanted}: what is held out after them, "
                    f"{earlier.name} has learned from"
                )


def _first_unseen(later: TrainingStage, earlier: TrainingStage) -> int:
    """The fewest sequences of `later`, its own or more, behind which it holds out none that `earlier` learned from."""
    text, learned = later.sample.text, earlier.sample.text
    length = later.sample.sequence_length or 1
    counts = [n * (earlier.sample.sequence_length or 1) for n in learned.shares(earlier.settings.sequences)]
    known = list(zip(learned.parts(), counts, strict=True))
    ends = [max((n for other, n in known if same_beginning(part, other)), default=0) for part in text.parts()]

    def is_unseen(first: int) -> bool:
        """Whether, of each part, none of the sequences held out behind the first `first` begins before its end."""
        before, behind = text.shares(first), text.shares(first + later.settings.held_out)
        return all(a == b or a * length >= end for a, b, end in zip(before, behind, ends, strict=True))

    return next(first for first in count(later.settings.sequences) if is_unseen(first))
