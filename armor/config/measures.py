"""Settings of what is measured: perplexity, tasks, speed, serving."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from armor.config.common import Dtype, local_path
from armor.config.sources import TextSettings
from armor.core.typed import Typed

__all__ = ["BUILT_TASKS", "BenchmarkSettings", "EvaluationSettings"]

PREDICTIONS_GB = 8.0

# Tasks that are built from a text.
BUILT_TASKS = ("last_word", "continuation")


def _task(value: str) -> str:
    return local_path(value) if value.endswith((".yaml", ".yml")) else value


class EvaluationSettings(Typed):
    """Perplexity on blocks of a text, or accuracy on tasks of lm-eval."""

    text: TextSettings | None = None
    """The text that perplexity is measured on, or that the tasks last_word and continuation are built from."""
    sequences: int | None = Field(default=None, ge=1)
    """Perplexity: how many blocks; unset: as many as the text has."""
    sequence_length: int | None = Field(default=None, ge=2)
    """Perplexity: tokens in each; unset: the model's context length."""
    tasks: list[Annotated[str, AfterValidator(_task)]] | None = Field(default=None, min_length=1)
    """Names of lm-eval, YAML files of your own, paper (its seven), last_word and continuation (built from the text)."""
    shots: int | None = Field(default=None, ge=0)
    """Tasks: examples before each question; unset: as the task says. The tasks of paper have their own."""
    items: int | None = Field(default=None, ge=4)
    """Tasks built from the text: how many items each has; unset: 100."""
    samples: bool = False
    """Tasks: keep every question, answer and log-likelihood beside the result."""
    engine: Literal["vllm"] | None = None
    """Tasks: vllm asks the model behind vLLM's server; unset: transformers, in the job's own process."""
    options: list[str] | None = None
    """Engine: further options of its server, like [--enforce-eager]; unset: none."""
    dtype: Dtype = "auto"
    """The dtype to compute in; auto is the checkpoint's own. The log-softmax is always float32."""

    predictions_gb: float = Field(PREDICTIONS_GB, ge=0)
    """Perplexity: GB of disk that the dense model's logits may take while the workflow runs. Where they need more, the
    dense model is run again beside each recipe."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationSettings:
        built = set(BUILT_TASKS) & set(self.tasks or ())
        others = ("sequences", "sequence_length") if self.tasks else ("shots", "items", "samples", "engine")
        if self.tasks and self.predictions_gb != PREDICTIONS_GB:
            others += ("predictions_gb",)
        if given := [key for key in others if getattr(self, key)]:
            raise ValueError(f"{given[0]}: goes with {'perplexity on a text' if self.tasks else 'tasks'}")
        if self.options and not self.engine:
            raise ValueError("options: goes with an engine")
        if (self.tasks is None or built) and self.text is None:
            raise ValueError(f"text: not given; {', '.join(sorted(built)) or 'perplexity'} needs one; or name tasks")
        if built and self.text and self.text.mixture:
            raise ValueError(f"text: a mixture is for sequences; {', '.join(sorted(built))} needs a single text")
        if self.tasks and not built and (self.text or self.items):
            raise ValueError(f"text and items go with {' and '.join(BUILT_TASKS)}, which are built from it")
        return self

    def task_files(self) -> list[str]:
        """The YAML files of tasks."""
        return [task for task in self.tasks or () if task.endswith((".yaml", ".yml"))]


class BenchmarkSettings(Typed):
    """Speed and memory: the dense model and its compressed ones, timed in turn; in one process, or behind a server."""

    engine: Literal["vllm"] | None = None
    """vllm: each model behind vLLM's server, under the load of vLLM's own client; unset: transformers' generate."""
    prompt_tokens: int = Field(default=32, ge=1)
    """Tokens of the prompt. The speed of prefill is their number divided by the seconds to the first new token."""
    new_tokens: int = Field(default=64, ge=2)
    """Tokens written in one round. The sequences of a batch share them; each writes 8 at least. With an engine each
    request has as many."""
    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(default=[1, 4], min_length=1)
    """How many sequences at once. The speed at the smallest number goes into the summary."""
    prompts: list[Annotated[str, Field(min_length=1)]] = [
        "The capital of France is",
        "Water boils when",
        "Once upon a time, a fox",
    ]
    """Texts that each model goes on with, by up to new_tokens tokens; the report shows them side by side. []: none."""
    clients: list[Annotated[int, Field(ge=1)]] | None = Field(default=None, min_length=1)
    """Engine: how many clients ask at once, each again as soon as it has its answer; unset: [1, 4, 16]."""
    requests: int | None = Field(default=None, ge=1)
    """Engine: requests of each client in a round; unset: 4."""
    options: list[str] | None = None
    """Engine: further options of its server, like [--enforce-eager]; unset: none."""
    repeats: int = Field(default=5, ge=1)
    """Rounds. Each times every model once; the report shows the median. With an engine each round starts every server
    anew, so fewer may do."""
    dtype: Dtype = "auto"
    """The dtype to compute in; auto is the checkpoint's own."""

    @model_validator(mode="after")
    def _check(self) -> BenchmarkSettings:
        others = ("batch_sizes", "prompts") if self.engine else ("clients", "requests", "options")
        if given := [key for key in others if getattr(self, key) != BenchmarkSettings.model_fields[key].default]:
            raise ValueError(f"{given[0]}: goes {'without' if self.engine else 'with'} an engine")
        return self

    def client_counts(self) -> list[int]:
        """The numbers of clients of a benchmark with an engine, each once, from the fewest."""
        return sorted(set(self.clients or (1, 4, 16)))

    def requests_of(self, clients: int) -> int:
        """The requests of so many clients in a round."""
        return clients * (self.requests or 4)
