"""A plan as a person reads it, and as a program does: stages, recipes, disk, and what does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from armor.core.typed import Typed
from armor.execution.table import text_table
from armor.plan.machine import COMPUTE_SHARE, MEMORY_SHARE, Card
from armor.plan.need import Memory, Need, Plan
from armor.plan.needs import need
from armor.plan.subject import Subject
from armor.plan.submitted import Submitted
from armor.plan.work import Kind
from armor.run.jobs import Job, jobs
from armor.run.stages import STAGES
from armor.runtime.folder import read_config

__all__ = ["Planned", "RecipePlan", "StagePlan", "kinds", "planned", "text", "too_small"]


class StagePlan(Typed):
    """The jobs of one stage, model and recipe (or calibration, evaluation, ...)."""

    stage: str
    of: str
    """Model and recipe, or whatever else tells these jobs from others of the stage."""
    jobs: int
    host_bytes: int
    """Of one job at its peak, without a GPU."""
    beside_bytes: int
    """Of one job at its peak on the host, while a card computes; 0 where none does."""
    card_bytes: int
    """Of one job at its peak on the card."""
    kept_bytes: int
    """What the jobs leave in the results."""
    scratch_bytes: int
    """What they need on disk only for a while."""
    seconds: float | None
    """Of all the jobs on this machine, one after the other; null where nothing was measured."""
    gpu_seconds: float
    """Of all the jobs on the card."""


class RecipePlan(Typed):
    """One model and recipe: what will come out."""

    model: str
    recipe: str
    weights_bytes: int
    """The safetensors files of the checkpoint."""
    dense_bytes: int
    """Those of the source."""
    bits_per_weight: float
    """Of the decoder layers' linears."""
    bytes_per_token: int
    """Weights that are read for a token."""


class Planned(Typed):
    """A whole plan."""

    stages: tuple[StagePlan, ...]
    recipes: tuple[RecipePlan, ...]
    results_bytes: int
    """All that stays."""
    scratch_bytes: int
    """The most that is needed beside it at one time."""
    elapsed_seconds: float | None
    """From the start to the end on this machine; null where nothing was measured."""
    gpu_hours: float
    """Of the card, all jobs one after the other."""
    notes: tuple[str, ...]
    """What was assumed."""
    problems: tuple[str, ...]
    """What does not fit, each with what would."""
    submitted: tuple[Submitted, ...] = ()
    """What the jobs ask of a cluster; empty without a profile."""


def planned(plan: Plan, results: Path, rates: Mapping[Kind, float] | None) -> Planned:
    """The plan in full. `results` is the folder with the model.json of every model; `rates` are seconds for a unit."""
    groups = list(_groups(plan, results))
    stages = [_stage(group, rates, plan.card) for group in groups]
    kept = sum(stage.kept_bytes for stage in stages)
    logits = sum(stage.scratch_bytes for stage in stages if stage.stage == "predict")
    passing = max((stage.scratch_bytes for stage in stages if stage.stage != "predict"), default=0)
    elapsed = None
    if rates is not None:
        alone = {stage for stage, row in STAGES.items() if not row.by_layer} | {"refine"}  # timed with all threads
        side_by_side = {stage: 1 if stage in alone else plan.host.cores for stage in STAGES}
        elapsed = sum((s.seconds or 0.0) / side_by_side[s.stage] for s in stages)
    return Planned(
        stages=tuple(stages),
        recipes=tuple(_recipes(plan)),
        results_bytes=kept,
        scratch_bytes=logits + passing,
        elapsed_seconds=elapsed,
        gpu_hours=sum(stage.gpu_seconds for stage in stages) / 3600,
        notes=tuple(plan.notes),
        problems=tuple(_problems(plan, groups, kept + logits + passing)),
    )


def kinds(plan: Plan, results: Path) -> set[Kind]:
    """All kinds of work that there are, to be timed."""
    return {work.kind for group in _groups(plan, results) for _, need in group for work in need.work}


def _groups(plan: Plan, results: Path) -> Iterator[list[tuple[Job, Need]]]:
    """The jobs with what they take, those together that differ by their layer alone."""
    groups: dict[tuple[str, ...], list[tuple[Job, Need]]] = {}
    for job in jobs(plan.config, str(results)):
        names = job.names[:2] if STAGES[job.stage].by_layer else job.names
        groups.setdefault((job.stage, *names), []).append((job, need(plan, job)))
    yield from groups.values()


def _stage(group: Sequence[tuple[Job, Need]], rates: Mapping[Kind, float] | None, card: Card) -> StagePlan:
    job, needs = group[0][0], [need for _, need in group]
    work = [work for need in needs for work in need.work]
    names = job.names[:2] if STAGES[job.stage].by_layer else job.names
    return StagePlan(
        stage=job.stage,
        of=" ".join(names),
        jobs=len(group),
        host_bytes=max(need.memory.host for need in needs),
        beside_bytes=max(need.memory.beside for need in needs),
        card_bytes=max(need.memory.card for need in needs),
        kept_bytes=sum(need.kept for need in needs),
        scratch_bytes=max(need.scratch for need in needs),
        seconds=None if rates is None else sum(rates[one.kind] * one.amount for one in work),
        gpu_seconds=sum(one.seconds_on(card) for one in work) if any(need.memory.card for need in needs) else 0.0,
    )


def _recipes(plan: Plan) -> Iterator[RecipePlan]:
    for model, recipe in plan.config.pairs():
        subject = plan.subjects[model]
        owner = None if plan.config.is_dense(recipe) else plan.config.owner(recipe)
        packed = None if owner is None else subject.packed[owner]
        yield RecipePlan(
            model=model,
            recipe=recipe,
            weights_bytes=subject.weights_bytes if packed is None else packed.weights_bytes,
            dense_bytes=subject.weights_bytes,
            bits_per_weight=subject.dense_bits if packed is None else packed.bits,
            bytes_per_token=_decode_bytes(subject, owner),
        )


def _decode_bytes(subject: Subject, owner: str | None) -> int:
    """The bytes of weights that a decoding step reads, dense or as recipe `owner` packs them: all but a table of
    embeddings that is not the head too.

    Of experts it reads as many as a token is sent to.
    """
    packed = None if owner is None else subject.packed[owner]
    shards, more = (subject.shards, 0) if packed is None else (packed.shards, packed.more_bytes)
    table = 0 if subject.topology.tied_embeddings else subject.table_bytes
    settings = read_config(subject.folder).get_text_config()
    count, asked = (
        _most(settings, *keys)
        for keys in (
            ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
            ("num_experts_per_tok", "moe_topk"),
        )
    )
    experts = sum(shards.bytes_of(name) for name in shards.names() if ".experts." in name) + (more if count > 1 else 0)
    return subject.loaded_bytes(owner) + more - table - round(experts * (1 - asked / count))


def _most(settings: object, *keys: str) -> int:
    """The largest number under any of `keys`; some families have one for each layer. 1 where there is none."""
    given = (getattr(settings, key, None) or 1 for key in keys)
    return max(max(each) if isinstance(each, list) else each for each in given)


def _problems(plan: Plan, groups: Sequence[Sequence[tuple[Job, Need]]], disk: int) -> Iterator[str]:
    """What does not fit this machine, and what would."""
    if disk > plan.host.disk:
        yield (
            f"disk: {_size(disk)} needed for results and scratch, {_size(plan.host.disk)} free; choose a folder on a "
            "larger disk with --directory, or plan fewer recipes and models"
        )
    gpu, room = plan.host.gpu, plan.host.memory
    for group in groups:
        job, need = max(group, key=lambda pair: max(pair[1].memory.card, pair[1].memory.host))
        memory = need.memory
        on_card = gpu is not None and memory.card > 0
        host = memory.beside if on_card else memory.host
        if gpu is not None and memory.card > gpu:
            yield f"{job}: {_size(memory.card)} needed on the GPU, it has {_size(gpu)}; {_remedy(plan, need)}"
        if host > room:
            yield f"{job}: {_size(host)} needed on the host, it has {_size(room)}; {_remedy(plan, need)}"
        elif _beside_others(plan, job) and not on_card and host * plan.host.cores > room:
            at_once = f"{plan.host.cores} such jobs at once need {_size(host * plan.host.cores)}"
            yield f"{job}: {at_once}, the host has {_size(room)}; use --cores {room // host}"


def _beside_others(plan: Plan, job: Job) -> bool:
    """Whether other layers' jobs run while `job` does: not where it is one of a chain."""
    if job.stage == "refine":
        return plan.config.refine_settings(job.names[1]).refine.inputs == "dense"
    return STAGES[job.stage].by_layer


def _remedy(plan: Plan, need: Need) -> str:
    """What would make a job fit that does not."""
    if need.by_length is None:
        return need.remedy or "take a larger machine"
    gpu, room = plan.host.gpu, plan.host.memory

    def fits(memory: Memory) -> bool:
        return memory.host <= room if gpu is None or not memory.card else memory.card <= gpu and memory.beside <= room

    return need.by_length.remedy(fits)


def text(found: Planned, plan: Plan, bandwidth: float | None) -> Iterator[str]:
    """The plan, line by line; `bandwidth` is this machine's in bytes a second, if it is known."""
    for name, subject in plan.subjects.items():
        yield f"{name}: {describe(subject)}"
    yield ""
    yield from _table(found, plan)
    yield ""
    yield from _results(found, plan, bandwidth)
    yield ""
    yield (
        f"disk: {_size(found.results_bytes)} of results, {_size(found.scratch_bytes)} more while it runs; "
        f"{_size(plan.host.disk)} free"
    )
    if found.elapsed_seconds is not None:
        yield f"time: about {_time(found.elapsed_seconds)} on this machine ({plan.host.cores} cores, no GPU)"
    yield (
        f"GPU: about {found.gpu_hours:.3g} hours of one {plan.card.name}, at {COMPUTE_SHARE:.0%} of its peak and "
        f"{MEMORY_SHARE:.0%} of its bandwidth (assumed, not measured)"
    )
    for note in found.notes:
        yield f"assumed: {note}"


def describe(subject: Subject) -> str:
    """A model in one line."""
    topology = subject.topology
    scale, unit = (1e9, "billion") if topology.parameters >= 1e9 else (1e6, "million")
    return (
        f"{topology.model_type}, {topology.parameters / scale:.3g} {unit} parameters in {topology.dtype}, "
        f"{len(topology.layers)} decoder layers; {topology.linear_parameters / max(topology.parameters, 1):.1%} of "
        "them in linears that can be compressed"
    )


def _table(found: Planned, plan: Plan) -> Iterator[str]:
    heads = ["stage", "of", "jobs", "host", "beside", plan.card.name, "seconds", "GPU s"]
    rows = [
        [
            stage.stage,
            stage.of,
            str(stage.jobs),
            _size(stage.host_bytes),
            _size(stage.beside_bytes) if stage.card_bytes else "–",
            _size(stage.card_bytes) if stage.card_bytes else "–",
            f"{stage.seconds or 0.0:,.1f}",
            f"{stage.gpu_seconds:,.0f}" if stage.card_bytes else "–",
        ]
        for stage in found.stages
    ]
    if found.elapsed_seconds is None:
        for row in (heads, *rows):
            del row[-2]
    yield from text_table(rows, heads, align="ll").splitlines()
    yield "host: memory of a job without a GPU; beside: on the host while a GPU computes"


def _results(found: Planned, plan: Plan, bandwidth: float | None) -> Iterator[str]:
    here = ["tokens/s here"] if bandwidth else []
    heads = ["checkpoint", "size", "of dense", "bits/weight", *here, f"on {plan.card.name}"]
    rows = [
        [
            f"{one.model} {one.recipe}",
            _size(one.weights_bytes),
            f"{one.weights_bytes / one.dense_bytes:.1%}",
            f"{one.bits_per_weight:.2f}",
            *([f"{bandwidth / one.bytes_per_token:,.1f}"] if bandwidth else []),
            f"{plan.card.bandwidth / one.bytes_per_token:,.0f}",
        ]
        for one in found.recipes
    ]
    yield from text_table(rows, heads).splitlines()
    yield "tokens/s: at most, one sequence, the weights read once for a token at the full bandwidth"


def too_small(found: Sequence[Submitted], stages: Sequence[StagePlan]) -> Iterator[str]:
    """The stages whose jobs ask for less memory than the plan says that they take, with what to ask for."""
    for asked in found:
        same = (stage for stage in stages if stage.stage == asked.stage)
        need = max((s.beside_bytes if asked.gpus and s.card_bytes else s.host_bytes for s in same), default=0)
        if 0 < asked.memory_bytes < need:
            enough = f"--set-resources {asked.stage}:mem_mb={math.ceil(need / 1e9) * 1000}"
            found_bytes, needed = asked.memory_bytes / 1e9, need / 1e9
            yield f"{asked.stage}: a job asks for {found_bytes:,.3g} GB and takes {needed:,.3g} GB; use {enough}"


def _size(size: float) -> str:
    if size < 1e9:
        return f"{size / 1e6:,.0f} MB"
    return f"{size / 1e9:.3g} GB" if size < 1e12 else f"{size / 1e9:,.0f} GB"


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
