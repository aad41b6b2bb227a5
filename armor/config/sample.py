"""Token sequences of a text, as the jobs that train or measure on them have them."""

from __future__ import annotations

from pydantic import Field

from armor.config.sources import TextSettings
from armor.core.typed import Typed

__all__ = ["Sample", "SensitivityJob"]


class Sample(Typed):
    """Token sequences of a text."""

    text: TextSettings
    sequences: int = Field(ge=1)
    sequence_length: int | None = Field(default=None, ge=2)
    """Tokens in each; unset: the model's context length."""


class SensitivityJob(Typed):
    """The measurement of sensitivities as a job has it: the sequences, and the seed of the tokens that are drawn."""

    sample: Sample
    seed: int = 0
