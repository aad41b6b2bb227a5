"""What each job of the workflow takes, stage by stage: memory, disk, work. The formulas are the stages' own.

Memory is that of the process at its peak. Where the stage refuses a device that is too small, its own estimate is asked
(`armor.calibrate.capture`, `armor.factorize.layer`, `armor.training.memory`, `armor.evaluate.logits`). To it come what
the process takes before any work, and what lies on the host whatever computes.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch

from armor.assemble.folder import MAX_SHARD_BYTES
from armor.calibrate.capture import is_apart
from armor.calibrate.capture import peak_bytes as calibration_bytes
from armor.config.training import TrainingSettings
from armor.core.factorization import owner as owner_of
from armor.execution.machine import USABLE
from armor.factorize.asked import groups_asked, linear_bytes, possible
from armor.factorize.quantize import peak_bytes as rounding_bytes
from armor.factorize.sharing import one_linear
from armor.format.records.topology import DecoderLayer
from armor.plan.measured import benchmark, evaluate, predict, serving, tasks
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
    memory_of,
    products,
)
from armor.plan.subject import Packed, Subject
from armor.plan.work import Read, Train, Work, rounding, solving
from armor.run.groups import expert_groups
from armor.run.jobs import Job
from armor.runtime.apart import HOST_SHARE
from armor.runtime.skeleton import compute_dtype
from armor.training.fit import LOOKS
from armor.training.memory import (
    Shapes,
    best_bytes,
    predictions_bytes,
    refine_bytes,
    saved_bytes,
    sensitivity_bytes,
    tune_bytes,
)

__all__ = ["NEEDS", "need"]

LIGHT = 55 * 10**6
"""Bytes of a process that needs no torch."""
PAGE = 390 * 10**6
"""Bytes of the job that draws the report's figures."""


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


def _states_bytes(subject: Subject, sequences: int, length: int) -> list[int]:
    """The bytes of what goes into every decoder layer, and out of the last, in all sequences."""
    dtype = compute_dtype(subject.topology.dtype)
    return [sequences * size for size in subject.state_bytes(length, dtype)]


def _text_bytes(subject: Subject, tokens: int) -> int:
    """What stays of a tokenizer, by its vocabulary, and of a text of so many tokens (docs/TRIED.md)."""
    return 950 * subject.vocabulary + 450 * tokens


def _calibrate(plan: Plan, model: str, calibration: str) -> Need:
    subject, settings = plan.subjects[model], plan.config.calibrations[calibration]
    where = f"calibrations.{calibration}"
    sequences, length = plan.tokens(subject, settings, where)
    dtype = compute_dtype(subject.topology.dtype)
    widths = [g[0].in_features for layer in subject.topology.layers for g in layer.groups()]
    states = _states_bytes(subject, sequences, length)
    kept = sum(4 * (width + (width**2 if settings.gram else 0)) for width in widths)

    most = int(settings.hidden_states_memory_gb * 1e9)

    def memory(length: int, held: int = most) -> Memory:
        hidden = max(_states_bytes(subject, sequences, length))

        def computed(room: float) -> Memory:
            """Where the layer has so much room."""
            apart = is_apart(subject.topology, length, dtype, settings.gram, room)
            waiting = min(2 * hidden, int(HOST_SHARE * plan.host.memory)) if apart else 0
            beside = compiled(subject, dtype) + _text_bytes(subject, sequences * length)
            return memory_of(
                on_host=min(hidden, held) + waiting + beside,
                computing=calibration_bytes(subject.topology, length, dtype, settings.gram, apart),
                before=subject.outside(dtype.itemsize),
            )

        on_host, on_card = computed(USABLE * plan.host.memory - min(hidden, held)), computed(USABLE * plan.card_memory)
        return Memory(on_host.host, on_card.beside, on_card.card)

    here = plan.host.gpu or plan.host.memory - min(max(states), most)
    times = 1
    if is_apart(subject.topology, length, dtype, settings.gram, USABLE * here):  # experts are read for each group
        times = math.ceil(2 * max(states) / (HOST_SHARE * plan.host.memory))
    read = Work(Read(), float(times * subject.weights_bytes + sum(states)))
    work = (START, forward(subject, dtype, sequences, length), read)
    # Fewer states in memory cost time alone, shorter sequences the statistics.
    enough = memory(length, 0).host <= plan.host.memory < memory(length).host
    remedy = f"lower {where}.hidden_states_memory_gb" if enough and plan.host.gpu is None else ""
    shorter = None if remedy else ByLength(f"{where}.sequence_length", length, memory)
    return Need(memory(length), kept=kept, scratch=2 * max(states), work=work, remedy=remedy, by_length=shorter)


def _experts(plan: Plan, model: str, recipe: str, index: str, group: str) -> Need:
    layer, packed = plan.subjects[model].topology.layers[int(index)], plan.subjects[model].packed[recipe]
    found = _factorizing(plan, model, recipe, layer.group(group))
    return dataclasses.replace(found, kept=0, scratch=packed.layer_bytes(layer))


def _factorize(plan: Plan, model: str, recipe: str, index: str) -> Need:
    layer, packed = plan.subjects[model].topology.layers[int(index)], plan.subjects[model].packed[recipe]
    settings, size = plan.config.layer_settings(recipe, layer.index), plan.config.recipes[recipe].experts_per_job
    groups = [layer.group(group) for group in expert_groups(layer, settings, size)]
    apart = {linear.name for group in groups for linear in group.linears}
    found = _factorizing(plan, model, recipe, layer.only({linear.name for linear in layer.linears} - apart))
    taken_over = Work(Read(), 2.0 * packed.layer_bytes(layer.only(apart)))
    return dataclasses.replace(found, kept=packed.layer_bytes(layer), work=(*found.work, taken_over))


def _factorizing(plan: Plan, model: str, recipe: str, layer: DecoderLayer) -> Need:
    """What it takes to factorize these linears of a layer."""
    packed = plan.subjects[model].packed[recipe]
    asked = plan.asked(recipe, layer)
    settings = plan.config.layer_settings(recipe, layer.index)
    gram = any(one.takes("gram") for several in asked.values() for one in several)
    statistics = 4 * sum(group[0].in_features ** (2 if gram else 1) for group in layer.groups())
    held, peak, computing, work = statistics, 0, 0, [START]
    resolved = {linear.name: settings.for_module(linear.name) for linear in layer.linears}
    for group, chosen in groups_asked(layer, settings, resolved):
        linear = one_linear(group)
        entries, itemsize = linear.out_features * linear.in_features, getattr(torch, linear.dtype).itemsize
        own = linear_bytes(linear, asked[group[0]] if len(group) == 1 else [chosen])
        peak, computing = max(peak, held + own), max(computing, own)
        if not chosen.is_dense:
            held += entries * (itemsize + 1)  # the core and its mask, as they are read back
            work += solving(chosen, (linear.out_features, linear.in_features))
    written = packed.layer_bytes(layer)
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
        shape, several = (linear.out_features, linear.in_features), [asked.priced for asked in several]
        peak = max(peak, max(linear_bytes(linear, several), 16 * shape[0] * shape[1]))
        for asked in several:
            chosen, _ = possible(asked, *shape)
            few = min(settings.iterations, chosen.solver.iterations)
            tried = chosen.solver.replace(iterations=max(few * 4 // 3, 1))  # with all, and a third
            if not chosen.is_dense:
                work += solving(chosen.replace(solver=tried), shape)
    return Need(memory_of(0, peak), work=tuple(work))


def _states(plan: Plan, model: str, states: str) -> Need:
    subject = plan.subjects[model]
    sequences, length = plan.tokens(subject, plan.config.states()[states], f"states {states}")
    dtype, sizes = compute_dtype(subject.topology.dtype), _states_bytes(subject, sequences, length)
    computing = calibration_bytes(subject.topology, length, dtype, gram=False)
    on_host = compiled(subject, dtype) + _text_bytes(subject, sequences * length)
    memory = memory_of(on_host, computing, subject.outside(dtype.itemsize))
    work = (START, forward(subject, dtype, sequences, length), Work(Read(), 2.0 * sum(sizes)))
    return Need(memory, scratch=sum(sizes), work=work)


def _sensitivity(plan: Plan, model: str, sensitivity: str) -> Need:
    subject = plan.subjects[model]
    settings = plan.config.sensitivities()[sensitivity]
    sequences, length = plan.tokens(subject, settings.sample, f"sensitivity {sensitivity}")
    dtype, sizes = compute_dtype(subject.topology.dtype), _states_bytes(subject, sequences, length)
    logits = 4 * 4 * length * subject.vocabulary
    head = subject.outside(dtype.itemsize, head=True) + logits
    computing = max(sensitivity_bytes(subject.topology, length, dtype.itemsize), head)
    work = (START, *[forward(subject, dtype, sequences, length)] * 4)
    gradients = 2 * max(sizes) * 4 // dtype.itemsize
    return Need(memory_of(max(sizes), computing), scratch=sum(sizes) + gradients, work=work)


def _training(
    subject: Subject, settings: TrainingSettings, length: int, block: int, layers: int, passed: int = 0
) -> Work:
    """Steps and looks through `layers` decoder layers, and `passed` sequences that only go forward through one.

    Backward takes twice what forward does, so do A·S·B.
    """
    looked = (LOOKS + 1) * settings.held_out
    tokens = (settings.steps * settings.batch + (looked + passed / layers) / 3) * length
    weights = subject.topology.linear_parameters / max(len(subject.topology.layers), 1)
    multiplied_out = 3 * settings.steps * 4 * block * weights
    return Work(Train(subject.name, length), tokens * layers, layers * (3 * products(subject, tokens) + multiplied_out))


def _shapes(plan: Plan, packed: Packed, stage: str, recipe: str) -> Sequence[Shapes]:
    """The factors of each layer that the `stage` of `recipe` trains; if they are quantized, with scales."""
    made = plan.config.chain(recipe)
    if not any(name == "quantize" for name, _ in made[: made.index((stage, recipe))]):
        return packed.layers
    return [
        {**own, **{f"{n.removesuffix('values')}scales": (own[n][0], 1) for n in own if n.endswith(".core_values")}}
        for own in packed.layers
    ]


def _refine(plan: Plan, model: str, recipe: str, index: str) -> Need:
    subject = plan.subjects[model]
    job = plan.config.refine_settings(recipe)
    sequences, length = plan.tokens(subject, job.sample, f"recipes.{recipe}.refine")
    layer, packed = subject.topology.layers[int(index)], subject.packed[plan.config.owner(recipe)]
    shapes = _shapes(plan, packed, "refine", recipe)[layer.index]

    def memory(length: int) -> Memory:
        computing = refine_bytes(subject.shards, layer.prefix, shapes, job.refine.core, length)
        return memory_of(best_bytes([shapes], job.refine.core), computing, subject.outside(4))

    block = plan.config.factorized(recipe).block_size
    # With compressed inputs all sequences go through the refined layer before.
    passed = sequences if job.refine.inputs == "compressed" and layer.index else 0
    work = (START, _training(subject, job.refine, length, block, 1, passed))
    shorter = ByLength(f"recipes.{recipe}.refine.sequence_length", length, memory)
    states = _states_bytes(subject, sequences, length)  # the dense model's, and in a chain what goes in and comes out
    at_once = 1 if job.refine.inputs == "compressed" else min(plan.host.cores, len(states) - 1)
    scratch = sum(states) + (2 * max(states) if passed else 0) + at_once * saved_bytes([shapes], job.refine.core)
    return Need(memory(length), kept=packed.layer_bytes(layer), scratch=scratch, work=work, by_length=shorter)


def _tune(plan: Plan, model: str, recipe: str) -> Need:
    subject = plan.subjects[model]
    job = plan.config.tune_settings(recipe)
    sequences, length = plan.tokens(subject, job.sample, f"recipes.{recipe}.tune")
    packed = subject.packed[plan.config.owner(recipe)]
    shapes, core = _shapes(plan, packed, "tune", recipe), job.tune.core
    on_host = best_bytes(shapes, core) + predictions_bytes(sequences * length)
    placed = partial(tune_bytes, subject.shards, shapes, core, length)
    _, least = placed()
    dtype = compute_dtype(subject.topology.dtype)
    block = plan.config.factorized(recipe).block_size
    work = (
        START,
        forward(subject, dtype, sequences, length),
        _training(subject, job.tune, length, block, len(subject.topology.layers)),
    )
    remedy = f"set recipes.{recipe}.tune.core to false, or refine its layers instead of tune"
    if room := plan.host.gpu:
        cards = range(1, len(shapes) + 1)
        enough = (n for n in cards if memory_of(on_host, placed(devices=n)[1]).card <= USABLE * room)
        if (n := next(enough, 1)) > 1:
            remedy = f"use --set-resources tune:gpu={n}, {remedy}"
    return Need(
        memory_of(on_host, least),
        kept=sum(packed.linear_bytes.values()),
        scratch=saved_bytes(shapes, core) + predictions_bytes(sequences * length),
        work=work,
        remedy=remedy,
    )


def _quantize(plan: Plan, model: str, recipe: str, index: str) -> Need:
    subject, owner = plan.subjects[model], plan.config.owner(recipe)
    layer = subject.topology.layers[int(index)]
    written = subject.packed[owner].layer_bytes(layer)
    plan.note(f"recipes.{recipe}: planned with its factors in floats; quantize makes its checkpoint smaller")
    config, settings = plan.config, plan.config.quantize_settings(recipe, layer.index)
    made, methods = config.chain(recipe), config.layer_settings(recipe, layer.index)
    trained = any(stage in ("refine", "tune") for stage, _ in made[: made.index(("quantize", recipe))])
    has_gram = config.calibrations[config.calibration_of(recipe)].gram
    computing, work = 0, [START, Work(Read(), 3.0 * written)]
    by_gram = {n.name: has_gram and (trained or methods.for_module(n.name).takes("gram")) for n in layer.linears}
    held = sum(4 * group[0].in_features ** (2 if any(by_gram.values()) else 1) for group in layer.groups())
    rows: Counter[str] = Counter()  # linears that share B are rounded as one
    for linear in layer.linears:
        name, layout = linear.name, subject.packed[owner].modules.get(linear.name)
        asked = layout and settings.for_module(name)
        if layout is not None and asked is not None:
            first = owner_of(name, "right", layout.right_of)
            rows[first] += layout.out_features
            computing = max(computing, rounding_bytes((rows[first], layout.in_features), by_gram[name]))
            work.append(rounding(asked.core, layout, by_gram[name]))
    return Need(memory_of(held + 2 * written, computing), kept=written, work=tuple(work))


def _assemble(plan: Plan, model: str, recipe: str) -> Need:
    packed = plan.subjects[model].packed[plan.config.owner(recipe)]
    size = packed.weights_bytes
    memory = FORKED + min(size, MAX_SHARD_BYTES)  # one shard
    return Need(Memory(memory, memory), kept=size, work=(START, Work(Read(), 4.0 * size)))


def _light(memory: int, start: Work = START) -> Callable[..., Need]:
    return lambda plan, *names: Need(Memory(memory, memory), work=(start,))


NEEDS: dict[str, Callable[..., Need]] = {
    "fetch": _fetch,
    "inspect": _light(PROCESS, IN_WHOLE),
    "calibrate": _calibrate,
    "sensitivity": _sensitivity,
    "price": _price,
    "budget": _light(FORKED),
    "experts": _experts,
    "factorize": _factorize,
    "states": _states,
    "refine": _refine,
    "refined": _light(FORKED),
    "tune": _tune,
    "quantize": _quantize,
    "assemble": _assemble,
    "predict": predict,
    "evaluate": evaluate,
    "tasks": tasks,
    "benchmark": benchmark,
    "serving": serving,
    "report": _light(PAGE, IN_WHOLE),
}
"""By stage, as `armor.run.stages` has them."""


def need(plan: Plan, job: Job) -> Need:
    """What `job` of the plan takes."""
    return NEEDS[job.stage](plan, *job.names)
