"""What there is to compute, in units that can be timed on this machine or counted for a card.

A kind of work is timed once, on one decoder layer of the model (`armor.plan.measure`), and multiplied. For a card the
operations are counted, and the bytes that go through its memory, and whichever takes longer counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from armor.config.layers import ModuleSettings
from armor.core.blocksizes import sizes
from armor.core.pattern import Pattern
from armor.core.quantization import NumberType
from armor.format.checkpoint import PackedLinear
from armor.plan.machine import COMPUTE_SHARE, MEMORY_SHARE, Card

__all__ = [
    "Forward",
    "Gram",
    "Head",
    "Kind",
    "Read",
    "Round",
    "Solve",
    "Start",
    "Step",
    "Train",
    "Work",
    "rounding",
    "solving",
]

SECONDS_TO_START = 15.0
"""Of a job on a card: Python, its libraries, CUDA. Assumed."""
FIT = 141
"""Products of an (out, in) matrix with the Gram matrix, by armor.methods.solver.output."""
SEARCH = 104
"""Products of an (out, in) matrix with the Gram matrix, by armor.methods.solver.integers."""
WIDEST = 2048
"""Columns at most of a Gram matrix that is timed; a wider one takes as much more."""


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
    """Tokens through a decoder layer of `model` and back, in sequences of `length`, as in training."""

    model: str
    length: int


@dataclass(frozen=True)
class Solve:
    """Weights that are compressed with these settings; with a Gram matrix, the iterations of the solver alone."""

    settings: ModuleSettings


@dataclass(frozen=True)
class Gram:
    """Weights that are compressed with a Gram matrix of so many columns, in one iteration of the solver if it has one.

    What they take grows with the columns: the Gram matrix is inverted, and multiplied with weights.
    """

    settings: ModuleSettings
    columns: int


@dataclass(frozen=True)
class Round:
    """Weights whose factors become integers of type `core`, with so many columns and such blocks, if any.

    With a Gram matrix what they take grows with the columns.
    """

    core: NumberType
    pattern: Pattern
    blocks: tuple[int, int] | None
    columns: int
    gram: bool


Kind = Start | Read | Forward | Step | Head | Train | Solve | Gram | Round


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


def solving(settings: ModuleSettings, shape: tuple[int, int]) -> Iterator[Work]:
    """The compression of a weight of `shape` (out, in) as `settings` say.

    An iteration of the fast solver is eight products with A and B, half of five more for the mask, and every fifth time
    three for the curvatures. Each product reads and writes a matrix; so do some thirty operations on single entries. A
    Gram matrix is inverted, and multiplied once; by the fit behind the solver FIT times.
    """
    entries, columns = float(shape[0] * shape[1]), shape[1]
    if settings.takes("gram"):
        timed, once = min(columns, WIDEST), settings.solver.replace(iterations=1)
        multiplied = 2 * entries * columns * (FIT if settings.takes("solver") else 1)
        kind = Gram(settings.replace(solver=once), timed)
        yield Work(kind, entries * columns / timed, multiplied + 3.0 * columns**3, True, 40 * entries)
    elif not settings.takes("solver"):
        yield Work(Solve(settings), entries, 0.0, True, 40 * entries)
    if not settings.takes("solver"):
        return
    left, right = sizes(shape, Pattern.parse(settings.pattern), settings.block_size)
    products = 11.0 if settings.solver.algorithm == "fast" else 6.0
    iterations = settings.solver.iterations
    operations = products * (left + right) * entries * iterations
    yield Work(Solve(settings), entries, operations, True, 250 * entries * iterations)


def rounding(core: NumberType, layout: PackedLinear, gram: bool) -> Work:
    """The rounding of a linear's factors in floats. Without a Gram matrix its products are by block.

    A card's time to start the steps of the search, some hundreds for each column, is not in the operations.
    """
    entries, columns = float(layout.out_features * layout.in_features), layout.in_features
    left, right = layout.left_block_size, layout.right_block_size
    blocks = (left, right) if left is not None and right is not None else None
    unit = right or layout.pattern.m or 1
    timed = columns if columns <= WIDEST else WIDEST // unit * unit
    kind = Round(core, layout.pattern, blocks, timed, gram)
    operations = 2 * entries * SEARCH * (columns if gram else 2 * sum(blocks or ()))
    return Work(kind, entries * (columns / timed if gram else 1), operations, True, 1000 * entries)
