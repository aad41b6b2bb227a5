"""The tasks of an evaluation, one by one, with what `paper` stands for.

They are resolved here alone. So an edit of the paper's list runs the evaluations on tasks again, and no perplexity.
"""

from __future__ import annotations

from pathlib import Path

from armor.config.measures import EvaluationSettings
from armor.core.errors import ArmorError

__all__ = ["PAPER", "PAPER_TASKS", "asked_tasks"]

PAPER = "paper"
"""What stands for all of the paper's tasks."""
PAPER_TASKS = {
    "mmlu": 5,
    "gsm8k": 5,
    "bbh_cot_fewshot": 3,
    "gpqa_main_zeroshot": 0,
    "arc_challenge": 25,
    "winogrande": 5,
    "hellaswag": 10,
}
"""What ARMOR's paper evaluates, by lm-eval's names, and the examples before each question."""


def asked_tasks(settings: EvaluationSettings) -> dict[str, tuple[str, int | None]]:
    """The tasks by what they are called in results: the name or the YAML file, and the examples before each question.

    None are as many examples as the task says. Raises ArmorError where two tasks have one name.
    """
    named = [one for task in settings.tasks or () for one in _spelt_out(task, settings.shots)]
    names = [Path(task).stem if task.endswith((".yaml", ".yml")) else task for task, _ in named]
    if len({*names}) < len(names):
        raise ArmorError(f"tasks: {', '.join(names)}: each once")
    return dict(zip(names, named, strict=True))


def _spelt_out(task: str, shots: int | None) -> list[tuple[str, int | None]]:
    return [*PAPER_TASKS.items()] if task == PAPER else [(task, shots)]
