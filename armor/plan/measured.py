"""What the jobs take that run a finished model: predictions, perplexity, tasks, benchmarks, serving."""

from __future__ import annotations

from armor.config.measures import BUILT_TASKS
from armor.evaluate.logits import TOKENS_AT_A_TIME, block_bytes
from armor.evaluate.predictions import SHARE_OF_DISK
from armor.execution.machine import USABLE
from armor.format.shards import dtype_name
from armor.plan.need import (
    BESIDE_CUDA,
    FORKED,
    IN_WHOLE,
    PROCESS,
    START,
    ByLength,
    Memory,
    Need,
    Plan,
    compiled,
    forward,
    head,
    memory_of,
)
from armor.plan.subject import Subject
from armor.plan.work import Read, Step, Work
from armor.runtime.apart import HOST_SHARE
from armor.runtime.load import loaded_dtype
from armor.runtime.streaming import stacks_experts

__all__ = ["benchmark", "evaluate", "predict", "serving", "tasks"]

TASK_TOKENS = 1024
"""Tokens of one request of a task."""
LM_EVAL = 285 * 10**6
"""Bytes of lm-eval with its own tasks, beside what a fork has (docs/TRIED.md)."""
ANSWERS = 12 * 10**8
"""Bytes of long items on the host: the logits of a batch and their log-softmax, and that of the batch before them."""
SERVER = 2 * 10**9
"""Bytes of vLLM's processes on the host, without weights and cache (docs/RESULTS.md)."""


def _measured(
    plan: Plan, subject: Subject, recipe: str | None, dtype: str, length: int, more: int, group: int, streams: bool
) -> Memory:
    """Memory of a job that runs one model on blocks of `length` tokens: loaded where it fits, else streamed.

    `more` bytes are needed beside the model, `group` bytes are the states of all blocks between two
    layers. A host that `streams` does so in any case.
    """
    folder = subject.folder if recipe is None else subject.packed[recipe].folder
    given = loaded_dtype(folder, dtype)
    itemsize = given.itemsize
    loaded = subject.loaded_bytes(recipe, dtype) + block_bytes(folder, dtype, length) + more
    logits = length * subject.vocabulary * itemsize + TOKENS_AT_A_TIME * 12 * subject.vocabulary

    outside, (whole, one) = subject.outside(itemsize, head=True), subject.largest_layer(given, recipe)
    share = int(HOST_SHARE * plan.host.memory)

    def streamed(room: float) -> tuple[int, int]:
        """With one decoder layer, and the states on the host; without most of its experts if those have no room."""
        apart = subject.topology.has_experts() and outside + whole > USABLE * room
        states = min(group, share) + (min(2 * group, share) if apart else 0)
        states += compiled(subject, given) if recipe is None else 0
        return outside + (one if apart else whole) + logits + more, states

    fits, on_card = (loaded <= USABLE * room for room in (plan.host.memory, plan.card_memory))
    here, there = streamed((1 - HOST_SHARE) * plan.host.memory), streamed(plan.card_memory)
    host, beside = loaded if fits and not streams else sum(here), 0 if on_card else there[1]
    return Memory(FORKED + host, PROCESS + BESIDE_CUDA + beside, loaded if on_card else there[0])


def _text(plan: Plan, model: str, recipe: str | None, evaluation: str, compared: bool) -> Need:
    """A model on the text of an evaluation; `recipe` None: the dense one, whose logits are stored."""
    subject, settings = plan.subjects[model], plan.config.evaluations[evaluation]
    where = f"evaluations.{evaluation}"
    blocks, length = plan.tokens(subject, settings, where)
    dtype = loaded_dtype(subject.folder, settings.dtype)
    block = length * subject.vocabulary * dtype.itemsize
    room = min(settings.predictions_gb * 1e9, SHARE_OF_DISK * plan.host.disk)
    stored = blocks * block if blocks * block <= room else 0
    owner = recipe and plan.config.owner(recipe)
    streams = owner is None and stacks_experts(subject.folder)

    def memory(length: int) -> Memory:
        group = blocks * max(subject.state_bytes(length, dtype))
        read = length * subject.vocabulary * dtype.itemsize if stored else 0
        beside = read + 2 * TOKENS_AT_A_TIME * 4 * subject.vocabulary if compared else 0
        return _measured(plan, subject, owner, settings.dtype, length, beside, group, streams)

    work = [START, forward(subject, dtype, blocks, length, owner), head(subject, dtype, blocks * length, compared)]
    if not stored and compared:
        work.append(forward(subject, dtype, blocks, length))
    work.append(Work(Read(), float(stored + subject.weights_bytes)))
    shorter = ByLength(f"{where}.sequence_length", length, memory)
    return Need(memory(length), scratch=0 if compared else stored, work=tuple(work), by_length=shorter)


def predict(plan: Plan, model: str, evaluation: str) -> Need:
    """What `predict` takes."""
    return _text(plan, model, None, evaluation, compared=False)


def evaluate(plan: Plan, model: str, recipe: str, evaluation: str) -> Need:
    """What `evaluate` takes."""
    if plan.config.is_dense(recipe):  # its losses are in the predictions
        return Need(Memory(FORKED, PROCESS), work=(START,))
    return _text(plan, model, recipe, evaluation, compared=True)


def tasks(plan: Plan, model: str, recipe: str, evaluation: str) -> Need:
    """What `tasks` takes."""
    subject, settings = plan.subjects[model], plan.config.evaluations[evaluation]
    plan.note(f"evaluations.{evaluation}: the time of tasks is not known before they run, and is left out")
    owner = None if plan.config.is_dense(recipe) else plan.config.owner(recipe)
    if settings.engine:
        plan.note(f"evaluations.{evaluation}: the memory of vLLM's cache is not known and left out")
        memory = memory_of(SERVER + LM_EVAL, subject.loaded_bytes(owner, settings.dtype))
        return Need(memory, work=(IN_WHOLE,), remedy="take a larger machine, or leave the engine out")
    memory = _measured(plan, subject, owner, settings.dtype, TASK_TOKENS, 0, 0, False)
    answers = 0 if set(settings.tasks or ()) <= set(BUILT_TASKS) else ANSWERS
    host = memory.host + LM_EVAL + answers
    return Need(memory._replace(host=host, beside=memory.beside + LM_EVAL), work=(IN_WHOLE,))


def benchmark(plan: Plan, model: str, name: str) -> Need:
    """What `benchmark` takes."""
    subject, settings = plan.subjects[model], plan.config.benchmarks[name]
    owners = [plan.config.owner(recipe) for recipe in plan.config.benchmarked(model, name)]
    sizes = [subject.loaded_bytes(owner, settings.dtype) for owner in (None, *owners)]
    together, least = sum(sizes), sizes[0] + max(sizes[1:], default=0)
    on_host, on_card = (
        together if room is None or together <= USABLE * room else least for room in (plan.host.memory, plan.host.gpu)
    )
    memory = memory_of(0, on_host)._replace(card=memory_of(0, on_card).card)
    dtype = dtype_name(loaded_dtype(subject.folder, settings.dtype))
    rows = [max(settings.new_tokens // size, 8) for size in settings.batch_sizes]
    steps = float(settings.repeats * sum(rows) + settings.new_tokens * len(settings.prompts))
    work = [START, Work(Read(), 2.0 * sum(sizes))]
    for owner, size in zip((None, *owners), sizes, strict=True):
        work.append(Work(Step(model, dtype, owner), steps * len(subject.topology.layers), moved=steps * size))
    return Need(memory, work=tuple(work), remedy="take a larger machine, or leave benchmarks out")


def serving(plan: Plan, model: str, name: str) -> Need:
    """What `serving` takes: one server at a time."""
    subject, dtype = plan.subjects[model], plan.config.benchmarks[name].dtype
    plan.note(f"benchmarks.{name}: the time that vLLM takes, and the memory of its cache, are not known and left out")
    owners = [plan.config.owner(recipe) for recipe in plan.config.benchmarked(model, name)]
    largest = max(subject.loaded_bytes(owner, dtype) for owner in (None, *owners))
    return Need(memory_of(SERVER, largest), work=(IN_WHOLE,), remedy="take a larger machine, or leave it out")
