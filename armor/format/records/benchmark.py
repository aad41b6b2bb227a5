"""benchmark/{name}.json: size, memory and speed of a model and its compressed forms, timed in turn in one process."""

from __future__ import annotations

from typing import ClassVar, Literal

from armor.core.typed import Typed
from armor.format.records.base import BlockSizes, Made

__all__ = ["BenchmarkRecord", "CoreSide", "LinearSpeed", "Phases", "Runs", "Continuation", "Side"]


class Runs(Typed):
    """A quantity that was measured in several rounds."""

    median: float
    """The median of the rounds."""
    quartiles: tuple[float, float]
    """The first and the third."""
    runs: tuple[float, ...]
    """Each round's."""


class Phases(Typed):
    """One quantity of reading a prompt and of writing after it."""

    prefill: Runs
    """Of the prompt, until the first new token."""
    decode: Runs
    """Of the new tokens after the first."""


class CoreSide(Typed):
    """A packed model without its A and B, timed to see what the blocks cost. Nobody could load it."""

    bytes_on_disk: int
    """Bytes, computed from the format."""
    bits_per_weight: float | None
    """Of the decoder layers' linears."""
    bytes_per_token: int
    """Bytes of the weights that are read for a token."""
    tokens_per_second: dict[str, Phases]
    """All sequences together, by batch size."""
    speedup: dict[str, Phases]
    """Over the dense model, round by round."""
    theoretical_speedup: float
    """The dense model's bytes for a token divided by its own."""


class LinearSpeed(Typed):
    """The time of one row through the linears of one shape: dense, packed, and packed without blocks."""

    out_features: int
    """The rows of the weight."""
    in_features: int
    """The columns of the weight."""
    pattern: str
    """The pattern of the core."""
    block_sizes: BlockSizes | None
    """Null without blocks."""
    count: int
    """Linears of this shape."""
    dense_milliseconds: Runs
    """Milliseconds for one dense linear."""
    milliseconds: Runs
    """Milliseconds for one packed linear."""
    speedup: Runs
    """Dense by packed, round by round."""
    theoretical_speedup: float
    """The dense weight's bytes divided by those of the packed one."""
    core_milliseconds: Runs | None
    """Milliseconds for one packed linear without blocks; null where there are none."""
    core_speedup: Runs | None
    """Dense by packed without blocks, round by round; null where there are none."""


class Side(Typed):
    """One model of a benchmark."""

    bytes_on_disk: int
    """The size of the safetensors files, in bytes."""
    bits_per_weight: float | None
    """Of the decoder layers' linears; null where no record of the checkpoint says it."""
    resident_bytes: int
    """The bytes that the loaded model alone takes, on the host or on the card."""
    peak_bytes: int
    """The most bytes that it took while it was loaded, read a prompt in the largest batch and wrote a token."""
    load_seconds: float
    """Seconds until the model could compute."""
    bytes_per_token: int
    """Bytes of the weights that are read for a token."""
    expanded: bool
    """Whether numbers with scales become floats before each product, for want of a kernel."""
    tokens_per_second: dict[str, Phases]
    """All sequences together, by batch size."""
    speedup: dict[str, Phases] | None
    """Over the dense model, round by round; null for itself."""
    theoretical_speedup: float | None
    """The dense model's bytes for a token divided by its own; null for itself."""
    core: CoreSide | None
    """Null where there are no blocks."""
    linears: tuple[LinearSpeed, ...]
    """The speed by shape."""


class Continuation(Typed):
    """What the models write after a prompt, greedily."""

    prompt: str
    """The text that the models go on with."""
    texts: dict[str, str]
    """By recipe."""


class BenchmarkRecord(Made):
    """`{model}/benchmark/{benchmark}.json`, by `armor benchmark`: speed and memory of all recipes, timed in turn."""

    AGAIN: ClassVar[str] = "run armor benchmark again"

    format_version: Literal[5] = 5
    benchmark: str
    """The benchmark's name."""
    dense: Side
    """The dense model."""
    recipes: dict[str, Side]
    """The compressed models by recipe."""
    turns: tuple[tuple[str, ...], ...]
    """The recipes that were timed in turn with the dense model; several groups if memory does not hold all of them."""
    samples: tuple[Continuation, ...]
    """The dense model's text is under the name dense."""
