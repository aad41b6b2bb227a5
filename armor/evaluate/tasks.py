"""Accuracy on tasks, by lm-eval: its tasks, its prompts, its metrics and standard errors; ours is the model.

A task is a name of lm-eval, a YAML file, or one of the two that are built from a text (`armor.evaluate.built`). Each is
run by itself and written to a file of its own, `{evaluation}/{task}.json`. So a run that was killed goes on with the
next one. The record `{evaluation}.json`, written last, has all results without their details. The model is loaded once,
after all tasks were: a data set that is not there should not wait for 70 billion weights. On a GPU lm-eval finds the
batch size; on a CPU, where its search would run out of the host's memory, it is fixed, and smaller where items are
long, for lm-eval keeps the logits of all tokens of a batch. Where one is too large all the same, the task is run again
with batches of half the size. Items of a batch are padded, so a log-likelihood depends on it by the rounding of the
model's dtype, as it does in lm-eval.

With an engine the model is behind vLLM's server (`armor.evaluate.served`), whatever its size. Without one a model may
have weights larger than the memory, of the GPU or else of the host. It answers with one decoder layer in
memory at a time (`armor.runtime.streamed`). lm-eval asks for one batch after the other, and streaming wants to know
them all. So lm-eval's code runs twice, first to see what it asks for, then with the answers. Where a task generates
text, each new token of a batch reads all weights.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import tee
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from pydantic import BaseModel, Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from armor.config.measures import BUILT_TASKS, EvaluationSettings
from armor.config.sources import TextSettings
from armor.config.tasks import PAPER, asked_tasks
from armor.core.errors import ArmorError, DoesNotFit, one_line
from armor.evaluate.built import build_task
from armor.execution.files import atomic_path, sha256
from armor.execution.log import log
from armor.execution.machine import USABLE, current_machine, device_memory_bytes, host_memory_bytes, peak_memory_bytes
from armor.execution.resume import identity, resumable
from armor.format.names import beside, samples_beside, task_beside
from armor.format.provenance import combined, made_by
from armor.format.records.base import Input
from armor.format.records.evaluation import Metric, TaskRecord, TasksRecord
from armor.runtime.folder import load_tokenizer
from armor.runtime.load import load_model, weights_bytes
from armor.runtime.streamed import StreamedModel
from armor.runtime.streaming import stream_model
from armor.text.sources import describe as describe_text
from armor.text.sources import documents

__all__ = ["check_names", "evaluate_tasks"]

CPU_BATCH_SIZE = 8
LOGITS = 4 * 10**8
"""Bytes of the logits of a batch of that fixed size, in float32, unless those of one item are more."""
ITEMS = 100
SERVED = "armor.evaluate.served"
"""The module for models behind a server; by name, so that an edit there does not change what the others depend on."""
Base: Any = HFLM
"""lm-eval's decorators hide what it is from a type checker."""
# What stands for a task in a table: the first of these that it has, else its first metric.
HEADLINES = ("acc_norm", "acc", "exact_match")


def evaluate_tasks(
    folder: Path | str,
    settings: EvaluationSettings,
    output: Path | str,
    device: str = "cpu",
    fingerprint: str | None = None,
) -> TasksRecord:
    """Run the tasks of `settings` on the model in `folder` (dense or ARMOR) and write `output`, {evaluation}.json.

    Beside it, in the folder {evaluation}/, lie {task}.json with all metrics, the tasks that were built, and
    {task}.samples.jsonl if asked for; the model's `fingerprint` is noted. Raises ArmorError for a task that is unknown
    or whose data cannot be had, for a folder that is no model, and for a model that the engine does not serve. So it
    does for log-likelihoods that are not finite, and for a device with too little memory for one item.
    """
    folder, output = Path(folder), Path(output)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tokenizer = load_tokenizer(folder)
    built = {} if settings.text is None else _built(settings.text, settings, beside(output))
    specs = {name: (built.get(task, task), shots) for name, (task, shots) in asked_tasks(settings).items()}
    manager = check_names(task for task, _ in specs.values())
    files = combined(sha256(file) for task, _ in specs.values() for file in _files(Path(task)))
    behind: Any = importlib.import_module(SERVED) if settings.engine else None
    engine, also = (behind.check_engine(), behind.CODE) if behind else ({}, ())
    made = made_by(__name__, settings, {Input.MODEL: fingerprint, Input.FILES: files}, also)
    work = {"model": identity(folder), "settings": settings.model_dump(mode="json"), "files": files, "engine": engine}
    with resumable(output, __name__, device, also, **work) as steps, contextlib.ExitStack() as stack:
        left = [name for name in specs if steps.get(name, TaskRecord) is None]
        loaded = {name: _load(manager, specs[name][0]) for name in left}
        model: Any = None
        if loaded and behind:
            model = stack.enter_context(behind.served(folder, tokenizer, settings))
        elif loaded:
            model = _open(folder, tokenizer, settings.dtype, device)
        for number, (name, task) in enumerate(loaded.items(), len(specs) - len(loaded) + 1):
            log.info("task %s (%d of %d)", name, number, len(specs))
            found = _run(model, task, specs[name][1], manager, f"{folder}: task {name}", device)
            _check_finite(folder, found.samples)
            if settings.samples:
                _write_samples(samples_beside(output, name), found.samples)
            record = _record(name, task.name if isinstance(task, Group) else task.task_name, found)
            record.write(task_beside(output, name))
            steps.put(name, record)
        records = {name: steps.get(name, TaskRecord) for name in specs}
        machine = current_machine(device)
        result = TasksRecord(
            evaluation=output.stem,
            tasks={name: record.headline() for name, record in records.items() if record},
            seconds=steps.seconds(),
            peak_memory_bytes=peak_memory_bytes(device) + (model.memory_bytes() if model and behind else 0),
            made_by=made,
            machine=machine.replace(versions=machine.versions | engine),  # of what computes
        )
        result.write(output)
    return result


def _built(text: TextSettings, settings: EvaluationSettings, place: Path) -> dict[str, str]:
    """The YAML files of the tasks that are built from `text`, by their names; articles are cleaned once for both."""
    texts = zip(BUILT_TASKS, tee(documents(text), len(BUILT_TASKS)), strict=True)
    count, where = settings.items or ITEMS, describe_text(text)
    asked = settings.tasks or ()
    return {task: str(build_task(task, stream, count, place, where)) for task, stream in texts if task in asked}


class _Found(BaseModel):
    """What is looked at of lm-eval's results, by task."""

    results: dict[str, dict[str, Any]]
    higher_is_better: dict[str, dict[str, Any]]
    shots: dict[str, int] = Field(alias="n-shot")
    counts: dict[str, dict[str, int]] = Field(alias="n-samples")
    versions: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]


class PlainLM(Base):
    """lm-eval's model, whose progress bars stay out of log files."""

    @property
    def max_length(self) -> int:
        """Tokens in the context: of a model that says that it has no end, as of one that says nothing."""
        found = super().max_length
        return found if found > 0 else self._DEFAULT_MAX_LENGTH

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests: list[tuple], *args: Any, **options: Any) -> list[tuple[float, bool]]:
        size = self.batch_size
        longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=1)
        bytes_of_one = 4 * min(longest, self.max_length) * self.config.get_text_config().vocab_size
        if size != "auto":
            self.batch_size_per_gpu = max(1, min(size, LOGITS // bytes_of_one))
        try:
            return super()._loglikelihood_tokens(requests, *args, **options)
        finally:
            self.batch_size_per_gpu = size

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm or not sys.stderr.isatty())

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return super().generate_until(requests, disable_tqdm or not sys.stderr.isatty())


class StreamedLM(PlainLM):
    """lm-eval's model with a `StreamedModel` behind it."""

    def __init__(self, model: StreamedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        super().__init__(pretrained=model.skeleton.model, tokenizer=tokenizer, batch_size=batch_size)
        self._streamed = model

    def _model_call(self, inps: Tensor) -> Tensor:
        return self._answer(inps)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._twice(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return self._twice(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        folder = self._streamed.name_or_path
        log.warning("%s: each new token of a batch of %d reads all weights", folder, self.batch_size)
        with self._streamed.whole():
            return super().generate_until(requests, disable_tqdm)

    def _twice(self, method: Callable, requests: list[Instance]) -> list:
        batches: list[Tensor] = []
        vocabulary = self.config.get_text_config().vocab_size
        nothing = torch.zeros(1, dtype=self.model.dtype, device=self.device)

        def note(tokens: Tensor) -> Tensor:
            batches.append(tokens)
            return nothing.expand(*tokens.shape, vocabulary)

        self._answer = note
        method(requests, disable_tqdm=True)
        answers = self._streamed.logits(batches)
        self._answer = lambda _: next(answers)
        return method(requests, disable_tqdm=True)


def _open(folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: str, device: str) -> PlainLM:
    """The model for lm-eval, streamed if its weights do not fit."""
    needed, available = weights_bytes(folder, dtype), device_memory_bytes(device) or host_memory_bytes()
    sizes = f"its weights take {needed / 1e9:.3g} GB, {device} has {available / 1e9:.3g} GB"
    if needed <= USABLE * available:
        size = CPU_BATCH_SIZE if device == "cpu" else "auto"
        try:
            return PlainLM(pretrained=load_model(folder, dtype, device), tokenizer=tokenizer, batch_size=size)
        except DoesNotFit:
            sizes += ", and it ran out"
    log.info("%s: %s, so one decoder layer at a time is read", folder, sizes)
    return StreamedLM(stream_model(folder, dtype, device), tokenizer, CPU_BATCH_SIZE)


def _run(model: Any, task: Task | Group, shots: int | None, manager: TaskManager, where: str, device: str) -> _Found:
    """lm-eval's results; where memory runs out, of batches of half the size, for the tasks that follow too.

    Raises ArmorError, naming `where`, if `device` has too little memory for a single item.
    """
    evaluated: Any = simple_evaluate
    while True:
        try:
            found = evaluated(model=model, tasks=[task], num_fewshot=shots, task_manager=manager)
            return _Found.model_validate(found)
        except torch.OutOfMemoryError as error:
            size = model.batch_size
            if size == "auto":  # what lm-eval found, for log-likelihoods, or began with
                size = max(model.batch_sizes.values(), default=model.max_batch_size)
            if size == 1:
                raise ArmorError(
                    f"{where}: out of memory on {device} with a single item; take a larger GPU, or evaluate with "
                    "--gpus 0 (gpu=0)"
                ) from error
        model.batch_size_per_gpu = size // 2
        log.warning("%s: out of memory with batches of %d; again with %d", where, size, size // 2)
        torch.cuda.empty_cache()


@cache  # reading all of lm-eval's YAML files takes seconds
def _register(with_its_own: bool) -> TaskManager:
    """lm-eval's register of tasks, of files alone or with those that come with it."""
    return TaskManager(include_defaults=with_its_own)


def check_names(tasks: Iterable[str]) -> TaskManager:
    """lm-eval's register of tasks, with all that are named. Raises ArmorError for one that it does not know."""
    tasks = list(tasks)
    files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [task for task in tasks if task not in files]
    manager = _register(bool(names))
    for file in files:
        if not Path(file).is_file():
            raise ArmorError(f"{file}: no such file; expected a task of lm-eval's as YAML")
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, [*manager.task_index, *BUILT_TASKS, PAPER], n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else "see `lm_eval ls tasks`."
            raise ArmorError(f"task {name}: lm-eval has none of this name; {hint} A file of your own ends in .yaml")
        if name in manager.all_tags and name not in [*manager.all_groups, *manager.all_subtasks]:
            members = ", ".join(sorted(manager.task_index[name].tags))
            raise ArmorError(f"task {name}: stands for several tasks without a common result; name them: {members}")
    return manager


def _load(manager: TaskManager, task: str) -> Task | Group:
    """The task, or group of tasks, with its data. Raises ArmorError if that cannot be had."""
    found: Any
    try:
        found = manager.load(task)
    except Exception as error:  # of the hub's client, of datasets, of YAML, of a task's own code
        reason = one_line(error)
        raise ArmorError(f"task {task}: cannot be loaded: {reason}; {_instead(manager, task)}") from error
    things = {name: thing for kind in ("groups", "tasks") for name, thing in found[kind].items()}
    inner = {name for children in found["group_map"].values() for name in children}
    thing = next(thing for name, thing in things.items() if name not in inner)
    if isinstance(thing, Group) and not thing.aggregate_metric_list:
        raise ArmorError(
            f"task {task}: a group without a common result; name its tasks: {', '.join(thing.child_names)}"
        )
    return thing


def _instead(manager: TaskManager, task: str) -> str:
    """What serves where a task's data cannot be downloaded: a local file, and the YAML file that names it."""
    if task not in manager.task_index:
        return "check its file"
    members = list(_members(manager, task)) or [task]
    first = members[0]
    entry: Any = manager.task_index[first]
    splits = [entry.cfg.get(f"{use}_split") for use in ("training", "validation", "test", "fewshot")]
    files = ", ".join(f"{split}: {first}.{split}.jsonl" for split in dict.fromkeys(filter(None, splits)) or ["test"])
    name = f"a file {first}_local.yaml instead"
    if len(members) > 1:
        name = f"a file for each of its {len(members)} tasks instead, {first}_local.yaml for the first"
    return (
        f"run it once with a network, which fills the cache, or name {name}, with `task: {first}_local`, `include: "
        f"{entry.yaml_path}`, `dataset_path: json`, `dataset_name: null` and `dataset_kwargs: {{data_files: "
        f"{{{files}}}}}`, its rows as JSON lines"
    )


def _members(manager: TaskManager, task: Any) -> Iterator[str]:
    """The names of the tasks that `task`, a name of lm-eval or what a group lists, stands for; none for a file."""
    match task:
        case {"task": members} | [*members]:
            for member in members if isinstance(members, list) else [members]:
                yield from _members(manager, member)
            return
        case dict():
            return
    if entry := manager.task_index.get(task):
        kind = entry.kind.name
        yield from [task] if "TASK" in kind else _members(manager, sorted(entry.tags) if kind == "TAG" else entry.cfg)


def _record(name: str, label: str, found: _Found) -> TaskRecord:
    """What is kept of one task's results, lm-eval's `label`; `value` is its headline, `items` counts all questions."""
    better = found.higher_is_better
    metrics = _metrics(found.results[label], better.get(label, {}))
    first = next((key for want in HEADLINES for key in metrics if key.partition(",")[0] == want), next(iter(metrics)))
    return TaskRecord(
        task=name,
        metric=first.removesuffix(",none"),
        value=metrics[first].value,
        standard_error=metrics[first].standard_error,
        higher_is_better=metrics[first].higher_is_better,
        metrics=metrics,
        subtasks={
            task: _metrics(results, better.get(task, {})) for task, results in found.results.items() if task != label
        },
        shots=max(found.shots.values(), default=0),
        items=sum(count["effective"] for count in found.counts.values()),
        versions=found.versions,
    )


def _metrics(results: dict, better: dict[str, bool]) -> dict[str, Metric]:
    """lm-eval's "acc,none" and "acc_stderr,none" side by side, and by `better` whether a higher value is; or None."""
    found = {}
    for key, value in results.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = results.get(f"{metric}_stderr,{kind}")
            found[key] = Metric(
                value=float(value),
                standard_error=float(error) if isinstance(error, float) and math.isfinite(error) else None,
                higher_is_better=better.get(metric),
            )
    return found


def _check_finite(folder: Path, samples: dict[str, list[dict]]) -> None:
    """Raise ArmorError if a log-likelihood is NaN: the best of four of them is an answer all the same."""
    for task, answers in samples.items():
        for number, answer in enumerate(answers):
            values = [r[0] if isinstance(r, list | tuple) else r for r in answer["filtered_resps"]]
            if any(isinstance(value, float) and math.isnan(value) for value in values):
                raise ArmorError(
                    f"{folder}: {task}: the log-likelihoods are not finite (item {number}); check the model with "
                    "armor verify, or set the dtype to float32"
                )


def _write_samples(path: Path, samples: dict[str, list[dict]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for task, answers in samples.items():
            for answer in answers:
                print(json.dumps({"task": task, **answer}, default=str, ensure_ascii=False), file=file)


def _files(task: Path) -> list[Path]:
    """The YAML file of a task and the data beside it, as far as they are there."""
    return [file for file in (task, task.with_suffix(".jsonl")) if file.is_file()]
