"""evaluation/{name}.json: a perplexity, or accuracies on tasks."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from armor.core.typed import Typed
from armor.format.records.base import Made, Record

__all__ = ["AgainstDense", "EvaluationRecord", "Mean", "Metric", "TaskRecord", "TaskResult", "TasksRecord"]


class Mean(Typed):
    """A mean over blocks of text."""

    value: float
    """The mean."""
    standard_error: float | None
    """Null for a single block."""
    block_means: tuple[float, ...]
    """The mean of each block."""


class AgainstDense(Typed):
    """The comparison of a compressed model to its dense one, at every prediction."""

    kl: Mean
    """KL(dense ‖ compressed), in nats."""
    top1: Mean
    """The share of predictions at which both find the same token the most likely."""


class EvaluationRecord(Made):
    """`{model}/{recipe}/evaluation/{evaluation}.json`, by `armor evaluate` on a text: perplexity and KL divergence."""

    AGAIN: ClassVar[str] = "run armor evaluate again"

    format_version: Literal[3] = 3
    evaluation: str
    """The evaluation's name."""
    metric: Literal["perplexity"] = "perplexity"
    """What `value` is."""
    value: float
    """The perplexity."""
    standard_error: float | None
    """Null for a single block."""
    tokens: int
    """Predictions: blocks · (length − 1)."""
    blocks: int
    """Blocks of text."""
    length: int
    """Tokens in a block."""
    text_fingerprint: str
    """The SHA-256 of the tokens."""
    block_means: tuple[float, ...]
    """The mean negative log-likelihood of each block, in nats."""
    against_dense: AgainstDense | None
    """Null for a dense model, and for one that was not compared."""


class Metric(Typed):
    """One metric of a task, as lm-eval gives it."""

    value: float
    """A share between 0 and 1, or a number in the task's own unit."""
    standard_error: float | None
    """In the same unit; null where lm-eval gives none."""
    higher_is_better: bool | None
    """Null where lm-eval does not say."""


class TaskResult(Metric):
    """What stands for a task in a table."""

    metric: str
    """lm-eval's name of it."""
    shots: int
    """Examples before each question."""
    items: int
    """Questions."""


class TaskRecord(TaskResult, Record):
    """`{model}/{recipe}/evaluation/{evaluation}/{task}.json`, by `armor evaluate` on tasks: all metrics of one task."""

    AGAIN: ClassVar[str] = "run armor evaluate again"

    format_version: Literal[2] = 2
    task: str
    """The task's name."""
    metrics: dict[str, Metric]
    """Every metric of the task by lm-eval's name."""
    subtasks: dict[str, dict[str, Metric]]
    """The metrics of a group's tasks, by task."""
    versions: dict[str, Any]
    """lm-eval's versions of the tasks."""

    def headline(self) -> TaskResult:
        """What stands for the task in a table."""
        return TaskResult(**{name: getattr(self, name) for name in TaskResult.model_fields})


class TasksRecord(Made):
    """`{model}/{recipe}/evaluation/{evaluation}.json`, by `armor evaluate` on tasks: what stands for each of them."""

    AGAIN: ClassVar[str] = "run armor evaluate again"

    format_version: Literal[3] = 3
    evaluation: str
    """The evaluation's name."""
    tasks: dict[str, TaskResult]
    """The results by task."""
