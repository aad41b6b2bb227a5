"""report/summary.json: the table of the report, and what it was made of."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from armor.format.records.base import Machine, MadeBy, Record
from armor.typed import Typed

__all__ = ["ReportRecord", "Row", "Score"]


class Score(Typed):
    """The result of a recipe on a task; a gap has no value."""

    task: str
    """The task's name; of two evaluations on the same task, the second one's name and a dot precede it."""
    value: float | None = None
    standard_error: float | None = None
    higher_is_better: bool | None = None
    """Null where lm-eval does not say."""


class Row(Typed):
    """What is known of a model under a recipe; null is a gap. Its fields are the columns of summary.csv, in order.

    What ends in `_se` is the standard error of the field before it.
    """

    model: str
    recipe: str
    method: str
    pattern: str | None = None
    """Null for the dense model."""
    block_size: int | str | None = None
    """The size of the blocks around the cores, or "32 to 48"; null where there are none."""
    perplexity: float | None = None
    """Of the first evaluation."""
    perplexity_se: float | None = None
    relative_loss: float | None = None
    """The mean over the linears: 0 is the dense weight, 1 no weight at all."""
    bits_per_weight: float | None = None
    """In the decoder's linears."""
    checkpoint_bytes: int | None = None
    """All files of the checkpoint."""
    factorize_seconds: float | None = None
    """Summed over decoder layers."""
    decode_tokens_per_second: float | None = None
    """Greedy decoding in the first benchmark at its smallest batch size, the median; all sequences together."""
    kl: float | None = None
    """KL(dense ‖ compressed) on the first evaluation, in nats."""
    kl_se: float | None = None
    top1_agreement: float | None = None
    """The share of positions at which both find the same token the most likely, on the first evaluation."""
    top1_agreement_se: float | None = None
    tasks: tuple[Score, ...] = ()
    """The tasks, the same ones in every row; in summary.csv the columns TASK and TASK_se of each."""

    def score(self, task: str) -> Score:
        """The result on `task`, which is one of `tasks`."""
        return next(score for score in self.tasks if score.task == task)

    def flat(self) -> dict[str, Any]:
        """The columns of summary.csv by name, in order."""
        found = {name: value for name, value in self if name != "tasks"}
        for score in self.tasks:
            found |= {score.task: score.value, f"{score.task}_se": score.standard_error}
        return found


class ReportRecord(Record):
    """`report/summary.json`, by `armor report`: a row for each model and recipe."""

    AGAIN: ClassVar[str] = "run the report again"

    format_version: Literal[2] = 2
    rows: tuple[Row, ...]
    """In the order of the configuration."""
    made_by: MadeBy
    machine: Machine
