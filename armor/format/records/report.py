"""report/summary.json: the table of the report, and what it was made of."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from armor.core.typed import Typed
from armor.format.records.base import Machine, Origin

__all__ = ["ReportRecord", "Row", "Score"]


class Score(Typed):
    """The result of a recipe on a task; a gap has no value."""

    task: str
    """The task's name; of two evaluations on the same task, the second one's name and a dot precede it."""
    value: float | None = None
    """The metric's value; null is a gap."""
    standard_error: float | None = None
    """Null where lm-eval gives none."""
    higher_is_better: bool | None = None
    """Whether a higher value is better; null where lm-eval does not say."""


class Row(Typed):
    """What is known of a model under a recipe. Null is a gap. The fields are the columns of summary.csv, in order."""

    model: str
    """The model's name."""
    recipe: str
    """The recipe's name."""
    method: str
    """The method's name."""
    pattern: str | None = None
    """The pattern of the cores; 1:1 if every weight stays, as an integer; null for the dense model."""
    block_sizes: tuple[int, ...] | None = None
    """The sizes of the blocks around the cores, each once, the smallest first; null where there are none. In
    summary.csv a space is between them."""
    perplexity: float | None = None
    """The perplexity on the first evaluation."""
    perplexity_se: float | None = None
    """Its standard error."""
    relative_loss: float | None = None
    """The mean relative proxy loss over the linears: 0 is the dense weight, 1 no weight at all; no unit."""
    bits_per_weight: float | None = None
    """The mean bits that a weight of the decoder layers' linears takes, compressed or not."""
    compressed_share: float | None = None
    """The share of the decoder layers' weights that is compressed; null for the dense model."""
    checkpoint_bytes: int | None = None
    """The size of all files of the checkpoint, in bytes."""
    factorize_seconds: float | None = None
    """Seconds of factorize, refine, quantize and tune, summed over their jobs."""
    decode_tokens_per_second: float | None = None
    """Greedy decoding in the first benchmark at its smallest batch size, the median; all sequences together."""
    kl: float | None = None
    """KL(dense ‖ compressed) on the first evaluation, in nats."""
    kl_se: float | None = None
    """Its standard error."""
    top1_agreement: float | None = None
    """The share of positions at which both find the same token the most likely, on the first evaluation."""
    top1_agreement_se: float | None = None
    """Its standard error."""
    tasks: tuple[Score, ...] = ()
    """The tasks, the same ones in every row; in summary.csv the columns TASK and TASK_se of each."""

    def score(self, task: str) -> Score:
        """The result on `task`, which is one of `tasks`."""
        return next(score for score in self.tasks if score.task == task)

    def flat(self) -> dict[str, Any]:
        """The columns of summary.csv by name, in order."""
        found = {name: value for name, value in self if name != "tasks"}
        if self.block_sizes:
            found |= {"block_sizes": " ".join(map(str, self.block_sizes))}
        for score in self.tasks:
            found |= {score.task: score.value, f"{score.task}_se": score.standard_error}
        return found


class ReportRecord(Origin):
    """`report/summary.json`, by `armor report`: a row for each model and recipe."""

    AGAIN: ClassVar[str] = "run armor report again"

    format_version: Literal[3] = 3
    rows: tuple[Row, ...]
    """In the order of the configuration."""
    machine: Machine
    """What the job ran on."""
