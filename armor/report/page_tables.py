"""The tables of the page that follow the summary, each for one model, a row for each recipe or part of one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup

from armor.format.records.benchmark import BenchmarkRecord, LinearSpeed, Phases, Runs, Side
from armor.report.columns import summary_rows, task_columns
from armor.report.numbers import GAP, duration, number, size
from armor.report.results import STAGES, ModelResults
from armor.report.table import Table
from armor.report.tables import by_text, rows_table

__all__ = ["PageTable", "page_tables"]

Cells = dict[str, dict[str, str]]


@dataclass(frozen=True)
class PageTable:
    """A table as HTML, its heading, and a caption that says what one sees."""

    title: str
    html: Markup
    caption: str


def page_tables(model: ModelResults, prefix: str) -> Iterator[PageTable]:
    """The tables of one model that its results allow, with ids that begin with `prefix`."""
    if len(model.evaluation_names()) > 1:
        caption = "Perplexity and distance to the dense model, with standard errors; the first text is the summary's."
        yield PageTable("By text", by_text(model).html(f"{prefix}-evaluations"), caption)
    if model.task_names():
        rows = summary_rows([model])
        tasks = task_columns(rows)
        caption = "By lm-eval, with its standard errors; all recipes answered the same questions."
        if lower := [task.name for task in tasks if task.higher_is_better is False]:
            caption += f" Lower is better: {', '.join(lower)}."
        yield PageTable("Accuracy on tasks", rows_table(rows, tasks).html(f"{prefix}-tasks"), caption)
    for index, name in enumerate(model.benchmark_names()):
        yield from _benchmark(model, name, prefix, index)
    for index, name in enumerate(model.serving_names()):
        if name in model.serving:
            yield _serving(model, name, f"{prefix}-serving-{index}")
    if any((samples := model.samples()).values()):
        caption = (
            "Greedy decoding after each prompt; ↵ is the end of a line. A few samples show what was lost and prove "
            "nothing: that is for perplexity and tasks."
        )
        yield PageTable("What they write", Table(_samples(samples)).html(f"{prefix}-samples", "data text"), caption)
    if cells := _trainings(model):
        caption = (
            "What the factors were trained by after the solver, stage by stage. The loss is on held-out sequences, of "
            "the model as it is stored. For refine it is the relative error of a decoder layer's output, as a share "
            "of that before, the mean over layers. For tune it is the KL divergence from the dense model, in nats."
        )
        yield PageTable("Training", Table(cells).html(f"{prefix}-training"), caption)
    if any((cells := _bits(model)).values()):
        caption = "Bits per weight of each linear of a decoder layer, blocks and mask included; ! is more than dense."
        yield PageTable("Bits per weight by linear", Table(cells).html(f"{prefix}-bits"), caption)
    caption = (
        "Time summed over a stage's jobs, and the most memory that one of them held. One benchmark's job times the "
        "dense model and all recipes."
    )
    yield PageTable("Time and memory by stage", Table(_stages(model)).html(f"{prefix}-stages"), caption)


def _benchmark(model: ModelResults, name: str, prefix: str, index: int) -> Iterator[PageTable]:
    if any(name in recipe.benchmarks for recipe in model.recipes):
        yield _speeds(model, name, f"{prefix}-benchmark-{index}")
    if cells := _linears(model, name):
        caption = (
            "One row, as in decoding, times each linear's weights: milliseconds for a linear, median (quartiles) of "
            "rounds in which dense, packed and the packed core without its blocks took turns."
        )
        html = Table(cells).html(f"{prefix}-linears-{index}", "data long")
        yield PageTable(f"Speed by linear: {name}", html, caption)


def _middle(runs: Runs | None) -> str:
    """A median, and the quartiles around it."""
    if runs is None:
        return GAP
    low, high = runs.quartiles
    return f"{number(runs.median, 3)} ({number(low, 3)} to {number(high, 3)})"


def _times(factor: float | None) -> str:
    return GAP if factor is None else f"{number(factor, 3)} ×"


def _decoding(speedup: Mapping[str, Phases] | None, batch: str) -> str:
    """How many times as fast as dense it decodes."""
    phases = speedup.get(batch) if speedup else None
    return _times(phases and phases.decode.median)


def _speeds(model: ModelResults, benchmark: str, name: str) -> PageTable:
    """Memory, time to load and speed by batch of all recipes in one benchmark."""
    sides = {recipe.name: recipe.benchmarks.get(benchmark) for recipe in model.recipes}
    batches = sorted({batch for side in sides.values() if side for batch in side.tokens_per_second}, key=int)
    cells = {recipe: _side(side, batches) if side else {} for recipe, side in sides.items()}
    caption = (
        "Memory that the loaded model holds by itself, and at the peak while it loads, reads and writes. Tokens per "
        "second, of all sequences of a batch together, of reading the prompt (prefill) and of greedy decoding: median "
        "(quartiles). Beside dense: how many times as fast as the dense model decodes, in the same process, in turn. "
        "Without blocks: the same for the packed core alone, which is no model, so that the difference is what the "
        "blocks cost. In theory: how many times fewer bytes of weights it reads for a token; more is reached where the "
        "dense model's kernels are further from the memory's speed."
    )
    caption += _turns(model.benchmarks.get(benchmark))
    return PageTable(f"Memory and speed: {benchmark}", Table(cells).html(name), caption)


def _turns(record: BenchmarkRecord | None) -> str:
    """Which recipes took turns, where these were not all of them."""
    if record is None or len(record.turns) < 2:
        return ""
    groups = "; ".join(", ".join(group) for group in record.turns)
    return f" Not all recipes fit together: those that took turns with the dense model are {groups}."


def _side(side: Side, batches: list[str]) -> dict[str, str]:
    cells = {
        "Memory, loaded": size(side.resident_bytes),
        "At the peak": size(side.peak_bytes),
        "Time to load": duration(side.load_seconds),
        "In theory": _times(side.theoretical_speedup),
    }
    for batch in batches:
        phases = side.tokens_per_second.get(batch)
        cells |= {
            f"Prefill, batch {batch}": _middle(phases and phases.prefill),
            f"Decode, batch {batch}": _middle(phases and phases.decode),
            f"Beside dense, {batch}": _decoding(side.speedup, batch),
            f"Without blocks, {batch}": _decoding(side.core and side.core.speedup, batch),
        }
    return cells


def _serving(model: ModelResults, benchmark: str, name: str) -> PageTable:
    """Speed by the number of clients, memory and time to start of all recipes behind a server."""
    cells = {
        f"{recipe.name}, {count} client{'' if count == '1' else 's'}": {
            "Tokens/s": _middle(load.tokens_per_second),
            "Beside dense": _times(load.speedup and load.speedup.median),
            "Requests/s": _middle(load.requests_per_second),
            "First token, ms": _middle(load.first_token_milliseconds),
            "Token, ms": _middle(load.token_milliseconds),
            "Memory": size(side.memory_bytes.median),
            "Start": duration(side.start_seconds.median),
        }
        for recipe in model.recipes
        if (side := recipe.serving.get(benchmark))
        for count, load in sorted(side.clients.items(), key=lambda known: int(known[0]))
    }
    caption = (
        f"Behind vLLM {model.serving[benchmark].engine['vllm']}, by the number of clients, each of which asks again as "
        "soon as it has its answer: new tokens and requests per second of all clients together, milliseconds to the "
        "first token and for each after it. Median (quartiles) of rounds in which one server after the other ran; a "
        "round's milliseconds are the median of its requests. Beside dense: tokens per second by those of the dense "
        "model. Memory: of the server's processes on the host after the loads, libraries and vLLM's cache included. "
        "Start: until the server answered."
    )
    return PageTable(f"Served by vLLM: {benchmark}", Table(cells).html(name, "data long"), caption)


def _linears(model: ModelResults, benchmark: str) -> Cells:
    """Milliseconds of one row through a linear of each shape, dense, packed and without its blocks."""
    return {
        f"{recipe.name}, {_shape(shape)}": {
            "Linears": str(shape.count),
            "Dense, ms": _middle(shape.dense_milliseconds),
            "Packed, ms": _middle(shape.milliseconds),
            "Without blocks, ms": _middle(shape.core_milliseconds),
            "Speed-up": _times(shape.speedup.median),
            "In theory": _times(shape.theoretical_speedup),
        }
        for recipe in model.compressed
        if (side := recipe.benchmarks.get(benchmark))
        for shape in side.linears
    }


def _shape(shape: LinearSpeed) -> str:
    what = f"{shape.out_features}\u00a0×\u00a0{shape.in_features}, {shape.pattern}"
    if shape.block_sizes is None:
        return what
    left, right = shape.block_sizes.left, shape.block_sizes.right
    return f"{what}, blocks\u00a0{left}" if left == right else f"{what}, blocks {left or GAP} and {right or GAP}"


def _visible(text: str) -> str:
    """A text as one line; the characters that only control a terminal are replaced."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", re.sub(r"\s*\n\s*", " ↵ ", text)).strip()


def _samples(samples: dict[str, dict[str, str]]) -> Cells:
    """What each recipe writes after each prompt, `samples` by recipe and prompt."""
    return {
        recipe: {f"{_visible(prompt)} …": _visible(text) for prompt, text in own.items()}
        for recipe, own in samples.items()
    }


def _bits(model: ModelResults) -> Cells:
    """Bits per weight of all recipes on each linear of a decoder layer; ! where dense takes less."""
    cells = {}
    for recipe in model.compressed:
        larger = recipe.larger_than_dense()
        cells[recipe.name] = {name: f"{bits:.2f}" + "!" * (name in larger) for name, bits in recipe.bits().items()}
    return cells


def _trainings(model: ModelResults) -> Cells:
    """What trained each recipe's factors: on what, how long, and what the loss became."""
    cells: Cells = {}
    for recipe in model.compressed:
        for number_of, layers in enumerate(recipe.trainings):
            first, trained = layers[0], sum(training.parameters for training in layers)
            refined = first.stage == "refine"
            shares = [training.loss / training.start_loss for training in layers if training.start_loss]
            stayed = sum(not training.kept for training in layers)
            rounded = any(training.rounded for training in layers)
            key = f"{recipe.name}, {first.stage}" + (", quantized" if rounded else "")
            key += "" if len(recipe.trainings) < 3 else f" {number_of + 1}"
            cells[key] = {
                "Numbers": f"{(trained if refined else first.parameters) / 1e6:,.1f} M",
                "Inputs": first.inputs or "",
                "Text": first.text,
                "Sequences": f"{first.sequences} × {first.length:,}",
                "Held out": str(first.held_out),
                "Steps": str(max(training.steps for training in layers)),
                "Before": "1" if refined else number(first.start_loss, 3),
                "After": number(fmean(shares) if refined and shares else first.loss, 3),
                "Stayed as it was": f"{stayed} of {len(layers)} layers" if refined else "no" if first.kept else "yes",
            }
    return cells


def _stages(model: ModelResults) -> Cells:
    """Seconds and peak memory of every stage of a model's recipes."""
    cells: Cells = {}
    known = [stage for stage in STAGES if any(stage in stages for stages in model.work().values())]
    for row, stages in model.work().items():
        cells[row] = {stage.capitalize(): "" for stage in known}
        for stage, records in stages.items():
            seconds = sum(record.seconds for record in records) if records else None
            memory = max((record.peak_memory_bytes for record in records), default=0)
            cells[row][stage.capitalize()] = duration(seconds) + (f", {size(memory)}" if memory else "")
    return cells
