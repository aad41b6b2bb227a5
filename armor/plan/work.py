"""What there is to compute, in units that can be timed on this machine or counted for a card.

A kind of work is timed once, on one decoder layer of the model (`armor.plan.measure`), and multiplied. For a card the
operations are counted, and the bytes that go through its memory, and whichever takes longer counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from armor.config.layers import ModuleSettings
from armor.core.blocksizes import sizes
from armor.core.pattern import Pattern
from armor.plan.machine import COMPUTE_SHARE, MEMORY_SHARE, Card

__all__ = ["Forward", "Head", "Kind", "Read", "Solve", "Start", "Step", "Train", "Work", "solving"]

SECONDS_TO_START = 15.0
FIT = 141  # products of an (out, in) matrix with the Gram matrix, by armor.methods.solver.output
"""Of a job on a card: Python, its libraries, CUDA. Assumed."""


@dataclass(frozen=True)
class Start:
    """The start of a job, `whole` where it imports its libraries itself instead of in a fork. In jobs."""

    whole: bool = False


@dataclass(frozen=True)
class Read:
    """Bytes that are read from disk and hashed, or written."""


@dataclass(frozen=True)
class Forward:
    """Tokens through a decoder layer of `model`, in sequences of `length`, in `dtype`; packed by `recipe`, or dense."""

    model: str
    dtype: str
    length: int
    recipe: str | None = None


@dataclass(frozen=True)
class Step:
    """Single rows through a decoder layer of `model`, as in decoding; packed by `recipe`, or dense."""

    model: str
    dtype: str
    recipe: str | None = None


@dataclass(frozen=True)
class Head:
    """Tokens through the output head of `model`, and the losses; `compared` to other logits or not."""

    model: str
    dtype: str
    compared: bool


@dataclass(frozen=True)
class Train:
    """Tokens through a decoder layer of `model` and back, in sequences of `length`, in float32."""

    model: str
    length: int


@dataclass(frozen=True)
class Solve:
    """Weights that are compressed with these settings, from the start to the end."""

    settings: ModuleSettings


Kind = Start | Read | Forward | Step | Head | Train | Solve


class Work(NamedTuple):
    """An amount of one kind of work; its floating-point operations, whether they are float32, and the bytes moved."""

    kind: Kind
    amount: float
    operations: float = 0.0
    precise: bool = False
    moved: float = 0.0

    def seconds_on(self, card: Card) -> float:
        """On a card: of the operations and of the bytes whichever takes longer, at the shares that are assumed."""
        if isinstance(self.kind, Start):
            return self.amount * SECONDS_TO_START
        peak = card.float32 if self.precise else card.bfloat16
        return max(self.operations / (COMPUTE_SHARE * peak), self.moved / (MEMORY_SHARE * card.bandwidth))


def solving(settings: ModuleSettings, shape: tuple[int, int]) -> Work:
    """The compression of a weight of `shape` (out, in) as `settings` say.

    An iteration of the fast solver is eight products with A and B, half of five more for the mask, and every fifth time
    three for the curvatures. Each product reads and writes a matrix; so do some thirty operations on single entries. A
    Gram matrix is inverted, and multiplied once; by the fit behind the solver FIT times.
    """
    entries = float(shape[0] * shape[1])
    kind = Solve(settings)
    columns = float(shape[1]) if settings.takes("gram") else 0.0
    inverted = 3 * columns**3
    if not settings.takes("solver"):
        return Work(kind, entries, 2 * entries * columns + inverted, True, 40 * entries)
    left, right = sizes(shape, Pattern.parse(settings.pattern), settings.block_size)
    products = 11.0 if settings.solver.algorithm == "fast" else 6.0
    iterations = settings.solver.iterations
    operations = products * (left + right) * entries * iterations + 2 * FIT * entries * columns + inverted
    return Work(kind, entries, operations, True, 250 * entries * iterations)
