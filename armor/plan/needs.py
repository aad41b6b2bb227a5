"""What each job of the workflow takes, stage by stage: memory, disk, work. The formulas are the stages' own.

Memory is that of the process at its peak. Where the stage refuses a device that is too small, its own estimate is asked
(`armor.calibrate.capture`, `armor.factorize.layer`, `armor.training.memory`, `armor.evaluate.logits`). To it come what
the process takes before any work, and what lies on the host whatever computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from armor.assemble.folder import MAX_SHARD_BYTES
from armor.calibrate.capture import peak_bytes as calibration_bytes
from armor.config.layers import ModuleSettings
from armor.config.run import Config
from armor.config.sample import Sample
from armor.config.training import TrainingSettings
from armor.core.errors import ArmorError
from armor.evaluate.logits import TOKENS_AT_A_TIME
from armor.evaluate.logits import peak_bytes as evaluation_bytes
from armor.evaluate.predictions import SHARE_OF_DISK
from armor.factorize.layer import linear_bytes, possible
from armor.format.records.topology import DecoderLayer, Linear
from armor.methods import METHODS
from armor.plan.machine import Card, Host
from armor.plan.subject import Subject
from armor.plan.work import Forward, Head, Read, Start, Step, Train, Work, solving
from armor.run.jobs import Job
from armor.runtime.load import loaded_dtype, weights_bytes
from armor.runtime.skeleton import compute_dtype
from armor.runtime.streamed import HIDDEN_STATES, USABLE
from armor.training.fit import LOOKS
from armor.training.memory import refine_bytes, sensitivity_bytes, tune_bytes

__all__ = ["PROCESS", "TEXT_TOKENS", "Need", "Plan"]

PROCESS = 490 * 10**6
"""Bytes of a process that has loaded torch, transformers and this package (docs/log/plan.md)."""
FORKED = 385 * 10**6
"""Bytes of one that began as a fork of such a process, as jobs do where there is no GPU."""
BESIDE_CUDA = 1500 * 10**6
"""Bytes on the host of a process that computes on a card: CUDA's own libraries. Assumed."""
LIGHT = 55 * 10**6
"""Bytes of a process that needs no torch."""
PAGE = 390 * 10**6
"""Bytes of the job that draws the report's figures."""
TEXT_TOKENS = 300_000
"""Tokens that a text is taken to have where the configuration does not say how many are used; WikiText-2's test has
about as many."""
TASK_TOKENS = 1024
"""Tokens of one request of a task."""
ROUNDING = 64
"""Bytes for each entry of a weight while its factors are rounded. Assumed."""
START = Work(Start(), 1)
IN_WHOLE = Work(Start(whole=True), 1)


class Memory(NamedTuple):
    """Of a job at its peak, in bytes: on the host without a GPU; on the host while a card computes; on the card."""

    host: int
    beside: int
    card: int = 0


@dataclass(frozen=True)
class Need:
    """What a job takes. `kept` bytes stay in the results, `scratch` bytes are on disk only while they are needed."""

    memory: Memory
    kept: int = 0
    scratch: int = 0
    work: tuple[Work, ...] = ()
    remedy: str = ""
    """What to set where the memory is too small."""


@dataclass(frozen=True)
class Plan:
    """The plan of a configuration: what its models are, and the machine and card that it is for."""

    config: Config
    subjects: dict[str, Subject]
    host: Host
    card: Card
    notes: dict[str, None] = field(default_factory=dict)
    """What was assumed, each line once."""

    def need(self, job: Job) -> Need:
        """What `job` takes."""
        return NEEDS[job.stage](self, *job.names)

    def note(self, line: str) -> None:
        """Say once that something was assumed."""
        self.notes[line] = None

    def tokens(self, subject: Subject, sequences: int | None, length: int | None, where: str) -> tuple[int, int]:
        """Sequences and tokens in each. Raises ArmorError where the model does not say how long they may be."""
        known = subject.topology.context_length
        length = length or known
        if length is None:
            raise ArmorError(f"{where}: {subject.name} names no context length; set sequence_length")
        if known is not None and length > known:
            raise ArmorError(f"{where}.sequence_length: found {length}, but {subject.name} has a context of {known}")
        if sequences is None:
            self.note(f"{where}: sequences is not set; a text of {TEXT_TOKENS:,} tokens is assumed")
            sequences = math.ceil(TEXT_TOKENS / length)
        return sequences, length

    def asked(self, recipe: str, layer: DecoderLayer) -> dict[Linear, list[ModuleSettings]]:
        """The settings that each linear of a layer may be compressed with."""
        settings = self.config.layer_settings(recipe, layer.index)
        own = {linear: settings.for_module(linear.name) for linear in layer.linears}
        choices = {linear: settings.choices(linear.name) for linear in layer.linears}
        return {linear: [choice.apply(own[linear]) for choice in choices[linear]] for linear in layer.linears}


def _memory(on_host: int, computing: int, before: int = 0) -> Memory:
    """Of a job: `on_host` whatever computes, `computing` where it computes, `before` on the host, and gone by then."""
    host, beside = on_host + max(before, computing), max(on_host, before)
    return Memory(FORKED + host, PROCESS + BESIDE_CUDA + beside, computing)


def _products(subject: Subject, tokens: float) -> float:
    """The floating-point operations of the linears of one decoder layer, in the mean."""
    return 2 * tokens * subject.topology.linear_parameters / max(len(subject.topology.layers), 1)


def _forward(subject: Subject, dtype: torch.dtype, sequences: int, length: int, recipe: str | None = None) -> Work:
    """Sequences through all decoder layers."""
    layers = len(subject.topology.layers)
    tokens = sequences * length
    attention = 4.0 * tokens * length * subject.topology.hidden_size
    operations = layers * (_products(subject, tokens) + attention)
    moved = 30.0 * layers * tokens * subject.topology.hidden_size * dtype.itemsize
    kind = Forward(subject.name, str(dtype).removeprefix("torch."), length, recipe)
    return Work(kind, tokens * layers, operations, dtype == torch.float32, moved)


def _head(subject: Subject, dtype: torch.dtype, tokens: int, compared: bool) -> Work:
    size = subject.vocabulary
    operations = 2.0 * tokens * size * subject.topology.hidden_size
    kind = Head(subject.name, str(dtype).removeprefix("torch."), compared)
    return Work(kind, tokens, operations, dtype == torch.float32, (60.0 if compared else 30.0) * tokens * size)


def _fetch(plan: Plan, model: str) -> Need:
    subject, settings = plan.subjects[model], plan.config.models[model]
    size = subject.weights_bytes
    made = settings.hub is None and settings.folder is None
    if settings.hub is not None:
        plan.note(f"models.{model}: the time to download {size / 1e9:.3g} GB is not in the seconds")
    # A GGUF model is dequantized whole: the model, and what each of its tensors takes on the way.
    process = PROCESS + size + subject.outside(4) if made else LIGHT
    kept, read = 0 if settings.folder else size, Work(Read(), size * (4.0 if made else 1.0))
    return Need(Memory(process, process), kept, work=(IN_WHOLE, read))


def _inspect(plan: Plan, model: str) -> Need:
    subject = plan.subjects[model]
    outside = subject.outside(getattr(torch, subject.topology.dtype).itemsize)
    return Need(Memory(PROCESS + outside, PROCESS + outside), work=(IN_WHOLE,))


def _calibrate(plan: Plan, model: str, calibration: str) -> Need:
    subject, settings = plan.subjects[model], plan.config.calibrations[calibration]
    where = f"calibrations.{calibration}"
    sequences, length = plan.tokens(subject, settings.sequences, settings.sequence_length, where)
    dtype = compute_dtype(subject.topology.dtype)
    widths = [g[0].in_features for layer in subject.topology.layers for g in layer.groups()]
    hidden = sequences * length * subject.topology.hidden_size * dtype.itemsize
    kept = sum(4 * (width + (width**2 if settings.gram else 0)) for width in widths)
    memory = _memory(
        on_host=min(hidden, int(settings.hidden_states_memory_gb * 1e9)),
        computing=calibration_bytes(subject.topology, length, dtype, settings.gram),
        before=subject.outside(dtype.itemsize),
    )
    work = (START, _forward(subject, dtype, sequences, length), Work(Read(), subject.weights_bytes + 4.0 * hidden))
    remedy = f"lower {where}.sequence_length or {where}.hidden_states_memory_gb"
    return Need(memory, kept=kept, scratch=2 * hidden, work=work, remedy=remedy)


def _factorize(plan: Plan, model: str, recipe: str, index: str) -> Need:
    subject = plan.subjects[model]
    layer, packed = subject.topology.layers[int(index)], subject.packed[recipe]
    asked = plan.asked(recipe, layer)
    settings = plan.config.layer_settings(recipe, layer.index)
    gram = any("gram" in METHODS[one.method].statistics for several in asked.values() for one in several)
    statistics = 4 * sum(group[0].in_features ** (2 if gram else 1) for group in layer.groups())
    held, peak, computing, work = statistics, 0, 0, [START]
    for linear, several in asked.items():
        entries, itemsize = linear.out_features * linear.in_features, getattr(torch, linear.dtype).itemsize
        own = linear_bytes(linear, several)
        peak, computing = max(peak, held + own), max(computing, own)
        chosen, _ = possible(settings.for_module(linear.name), linear.out_features, linear.in_features)
        if chosen.method != "dense":
            held += entries * (itemsize + 1)  # the core and its mask, as they are read back
            work.append(solving(chosen, (linear.out_features, linear.in_features)))
    written = packed.layer_bytes[layer.index]
    work.append(Work(Read(), 2.0 * written))
    return Need(
        Memory(FORKED + max(peak, held + written), PROCESS + BESIDE_CUDA + held + written, computing),
        kept=written,
        work=tuple(work),
        remedy=f"choose another method for recipes.{recipe}, or compute on the CPU (gpu=0)",
    )


def _price(plan: Plan, model: str, recipe: str, index: str) -> Need:
    subject = plan.subjects[model]
    layer = subject.topology.layers[int(index)]
    settings = plan.config.price_settings(recipe, layer.index)
    peak, work = 0, [START]
    for linear, several in plan.asked(recipe, layer).items():
        shape = (linear.out_features, linear.in_features)
        peak = max(peak, max(linear_bytes(linear, several), 16 * shape[0] * shape[1]))
        for asked in several:
            chosen, _ = possible(asked, *shape)
            few = min(settings.iterations, chosen.solver.iterations)
            tried = chosen.solver.model_copy(update={"iterations": max(few * 4 // 3, 1)})  # with all, and a third
            if chosen.method != "dense":
                work.append(solving(chosen.model_copy(update={"solver": tried}), shape))
    return Need(_memory(0, peak), work=tuple(work))


def _sample(plan: Plan, subject: Subject, sample: Sample, where: str) -> tuple[int, int, int]:
    """Sequences, tokens in each, and the bytes of the states before one layer."""
    sequences, length = plan.tokens(subject, sample.sequences, sample.sequence_length, where)
    itemsize = compute_dtype(subject.topology.dtype).itemsize
    return sequences, length, sequences * length * subject.topology.hidden_size * itemsize


def _states(plan: Plan, model: str, states: str) -> Need:
    subject = plan.subjects[model]
    sequences, length, each = _sample(plan, subject, plan.config.states()[states], f"states {states}")
    dtype, layers = compute_dtype(subject.topology.dtype), subject.topology.layers
    computing = calibration_bytes(subject.topology, length, dtype, gram=False)
    memory = _memory(each, computing, subject.outside(dtype.itemsize))
    work = (START, _forward(subject, dtype, sequences, length), Work(Read(), 2.0 * each * len(layers)))
    return Need(memory, scratch=(len(layers) + 1) * each, work=work)


def _sensitivity(plan: Plan, model: str, sensitivity: str) -> Need:
    subject = plan.subjects[model]
    settings = plan.config.sensitivities()[sensitivity]
    sequences, length, each = _sample(plan, subject, settings.sample, f"sensitivity {sensitivity}")
    dtype, count = compute_dtype(subject.topology.dtype), len(subject.topology.layers)
    logits = 4 * 4 * length * subject.vocabulary
    head = subject.outside(dtype.itemsize, head=True) + logits
    computing = max(sensitivity_bytes(subject.topology, length, dtype.itemsize), head)
    work = (START, *[_forward(subject, dtype, sequences, length)] * 4)
    scratch = (count + 1) * each + 2 * each * 4 // dtype.itemsize
    return Need(_memory(each, computing), scratch=scratch, work=work)


def _training(subject: Subject, settings: TrainingSettings, length: int, block: int, layers: int) -> Work:
    """Steps and looks through `layers` decoder layers: backward takes twice what forward does, so do A·S·B."""
    looked = (LOOKS + 1) * settings.held_out * length
    tokens = float(settings.steps * settings.batch * length + looked / 3)
    weights = subject.topology.linear_parameters / max(len(subject.topology.layers), 1)
    products = 3 * settings.steps * 4 * block * weights
    return Work(
        Train(subject.name, length), tokens * layers, layers * (3 * _products(subject, tokens) + products), True
    )


def _refine(plan: Plan, model: str, recipe: str, index: str) -> Need:
    subject = plan.subjects[model]
    job = plan.config.refine_settings(recipe)
    _, length, _ = _sample(plan, subject, job.sample, f"recipes.{recipe}.refine")
    layer, packed = subject.topology.layers[int(index)], subject.packed[plan.config.made_by(recipe)[0][1]]
    computing = refine_bytes(subject.shards, layer.prefix, packed.layers[layer.index], length)
    block = plan.config.factorized(recipe).block_size
    work = (START, _training(subject, job.refine, length, block, 1))
    remedy = f"lower recipes.{recipe}.refine.sequence_length"
    written = packed.layer_bytes[layer.index]
    return Need(_memory(0, computing, subject.outside(4)), kept=written, work=work, remedy=remedy)


def _tune(plan: Plan, model: str, recipe: str) -> Need:
    subject = plan.subjects[model]
    job = plan.config.tune_settings(recipe)
    sequences, length, _ = _sample(plan, subject, job.sample, f"recipes.{recipe}.tune")
    packed = subject.packed[plan.config.made_by(recipe)[0][1]]
    _, least = tune_bytes(subject.shards, packed.layers, job.tune.core, length)
    dtype = compute_dtype(subject.topology.dtype)
    block = plan.config.factorized(recipe).block_size
    work = (
        START,
        _forward(subject, dtype, sequences, length),
        _training(subject, job.tune, length, block, len(subject.topology.layers)),
    )
    remedy = f"set recipes.{recipe}.tune.core to false, or refine its layers instead of tune"
    return Need(_memory(0, least), kept=sum(packed.layer_bytes), work=work, remedy=remedy)


def _quantize(plan: Plan, model: str, recipe: str, index: str) -> Need:
    subject, owner = plan.subjects[model], plan.config.made_by(recipe)[0][1]
    layer, written = subject.topology.layers[int(index)], subject.packed[owner].layer_bytes[int(index)]
    plan.note(f"recipes.{recipe}: planned with its factors in floats; quantize makes its checkpoint smaller")
    # The weight, its factors, their integers and what the search for scales takes, each about as large as the weight.
    computing = max(ROUNDING * linear.out_features * linear.in_features for linear in layer.linears)
    return Need(_memory(2 * written, computing), kept=written, work=(START, Work(Read(), 3.0 * written)))


def _assemble(plan: Plan, model: str, recipe: str) -> Need:
    packed = plan.subjects[model].packed[plan.config.made_by(recipe)[0][1]]
    size = packed.weights_bytes
    memory = FORKED + int(1.4 * min(size, MAX_SHARD_BYTES))  # the shard, and what is mapped of the files read
    return Need(Memory(memory, memory), kept=size, work=(START, Work(Read(), 4.0 * size)))


def _measured(
    plan: Plan, subject: Subject, recipe: str | None, dtype: str, length: int, more: int, group: int
) -> Memory:
    """Memory of a job that runs one model on blocks of `length` tokens: loaded where it fits, else streamed.

    `more` bytes are needed beside the model, `group` bytes are the hidden states of all blocks.
    """
    folder = subject.folder if recipe is None else subject.packed[recipe].folder
    itemsize = loaded_dtype(folder, dtype).itemsize
    loaded = evaluation_bytes([folder], dtype, length) + more
    largest = max(subject.inside(layer, itemsize) for layer in subject.topology.layers)
    logits = length * subject.vocabulary * itemsize + TOKENS_AT_A_TIME * 12 * subject.vocabulary
    streamed = subject.outside(itemsize, head=True) + largest + logits + more
    states = min(group, int(HIDDEN_STATES * plan.host.memory))
    fits, on_card = (loaded <= USABLE * room for room in (plan.host.memory, plan.card.memory))
    host, beside = loaded if fits else streamed + states, 0 if on_card else states
    return Memory(FORKED + host, PROCESS + BESIDE_CUDA + beside, loaded if on_card else streamed)


def _text(plan: Plan, model: str, recipe: str | None, evaluation: str, compared: bool) -> Need:
    """A model on the text of an evaluation; `recipe` None: the dense one, whose logits are stored."""
    subject, settings = plan.subjects[model], plan.config.evaluations[evaluation]
    where = f"evaluations.{evaluation}"
    blocks, length = plan.tokens(subject, settings.sequences, settings.sequence_length, where)
    dtype = loaded_dtype(subject.folder, settings.dtype)
    block = length * subject.vocabulary * dtype.itemsize
    room = min(settings.predictions_gb * 1e9, SHARE_OF_DISK * plan.host.disk)
    stored = blocks * block if blocks * block <= room else 0
    owner = recipe and plan.config.made_by(recipe)[0][1]
    group = blocks * length * subject.topology.hidden_size * dtype.itemsize
    memory = _measured(plan, subject, owner, settings.dtype, length, block if stored else 0, group)
    work = [START, _forward(subject, dtype, blocks, length, owner), _head(subject, dtype, blocks * length, compared)]
    if not stored and compared:
        work.append(_forward(subject, dtype, blocks, length))
    work.append(Work(Read(), float(stored + subject.weights_bytes)))
    remedy = f"lower {where}.sequence_length"
    return Need(memory, scratch=0 if compared else stored, work=tuple(work), remedy=remedy)


def _predict(plan: Plan, model: str, evaluation: str) -> Need:
    return _text(plan, model, None, evaluation, compared=False)


def _evaluate(plan: Plan, model: str, recipe: str, evaluation: str) -> Need:
    if plan.config.is_dense(recipe):  # its losses are in the predictions
        return Need(Memory(FORKED, PROCESS), work=(START,))
    return _text(plan, model, recipe, evaluation, compared=True)


def _tasks(plan: Plan, model: str, recipe: str, evaluation: str) -> Need:
    subject, settings = plan.subjects[model], plan.config.evaluations[evaluation]
    plan.note(f"evaluations.{evaluation}: the time of tasks is not known before they run, and is left out")
    owner = None if plan.config.is_dense(recipe) else plan.config.made_by(recipe)[0][1]
    return Need(_measured(plan, subject, owner, settings.dtype, TASK_TOKENS, 0, 0), work=(IN_WHOLE,))


def _benchmark(plan: Plan, model: str, benchmark: str) -> Need:
    subject, settings = plan.subjects[model], plan.config.benchmarks[benchmark]
    owners = [plan.config.made_by(recipe)[0][1] for recipe in plan.config.benchmarked(model, benchmark)]
    folders = [subject.folder, *(subject.packed[owner].folder for owner in owners)]
    sizes = [weights_bytes(folder, settings.dtype) for folder in folders]
    together = sum(sizes)
    if together > USABLE * plan.host.memory:
        together = sizes[0] + max(sizes[1:], default=0)
    dtype = str(loaded_dtype(subject.folder, settings.dtype)).removeprefix("torch.")
    rows = [max(settings.new_tokens // size, 8) for size in settings.batch_sizes]
    steps = float(settings.repeats * sum(rows) + settings.new_tokens * len(settings.prompts))
    work = [START, Work(Read(), 2.0 * sum(sizes))]
    for owner, size in zip((None, *owners), sizes, strict=True):
        work.append(Work(Step(model, dtype, owner), steps * len(subject.topology.layers), moved=steps * size))
    return Need(_memory(0, together), work=tuple(work), remedy="take a larger machine, or leave benchmarks out")


def _light(memory: int, start: Work = START) -> Callable[..., Need]:
    return lambda plan, *names: Need(Memory(memory, memory), work=(start,))


NEEDS: dict[str, Callable[..., Need]] = {
    "fetch": _fetch,
    "inspect": _inspect,
    "calibrate": _calibrate,
    "sensitivity": _sensitivity,
    "price": _price,
    "budget": _light(FORKED),
    "factorize": _factorize,
    "states": _states,
    "refine": _refine,
    "refined": _light(FORKED),
    "tune": _tune,
    "quantize": _quantize,
    "assemble": _assemble,
    "predict": _predict,
    "evaluate": _evaluate,
    "tasks": _tasks,
    "benchmark": _benchmark,
    "report": _light(PAGE, IN_WHOLE),
}
"""By stage, as `armor.run.jobs` has them."""
