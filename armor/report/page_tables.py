"""The tables of the page that follow the summary, each for one model, a row for each recipe or part of one."""

from __future__ import annotations

import re

from armor.report.results import STAGES, ModelResults
from armor.report.tables import (
    GAP,
    best_cells,
    cells_table,
    duration,
    evaluation_cells,
    higher_is_better,
    number,
    score,
    size,
    summary_rows,
)

__all__ = [
    "benchmark_table",
    "bits_table",
    "evaluation_table",
    "linear_table",
    "sample_table",
    "stage_table",
    "task_table",
]


def evaluation_table(model: ModelResults, name: str) -> str:
    """Perplexity, KL and agreement of all recipes on all texts, with standard errors, as an HTML table."""
    cells, best = evaluation_cells(model)
    return cells_table(cells, name, best)


def task_table(model: ModelResults, name: str) -> str:
    """The results of all recipes on all tasks, with standard errors, as an HTML table."""
    none = (None, None)
    cells = {r.name: {task: score(*r.scores.get(task, none)) for task in model.task_names()} for r in model.recipes}
    return cells_table(cells, name, best_cells(summary_rows([model]), higher_is_better([model])))


def _middle(runs: dict | None) -> str:
    """A median, and the quartiles around it."""
    if not runs:
        return GAP
    low, high = runs["quartiles"]
    return f"{number(runs['median'], 3)} ({number(low, 3)} to {number(high, 3)})"


def _times(factor: float | None) -> str:
    return GAP if factor is None else f"{number(factor, 3)} ×"


def _decoding(record: dict, batch: str) -> str:
    """How many times as fast as dense it decodes, by the `speedup` of a record or of its core."""
    return _times((record.get("speedup") or {}).get(batch, {}).get("decode", {}).get("median"))


def benchmark_table(model: ModelResults, benchmark: str, name: str) -> str:
    """Memory, time to load and speed by batch of all recipes in one benchmark, as an HTML table."""
    measured = {recipe.name: recipe.measured(benchmark) or {} for recipe in model.recipes}
    batches = sorted({batch for own in measured.values() for batch in own.get("tokens_per_second", ())}, key=int)
    cells = {}
    for recipe in model.recipes:
        own, record = measured[recipe.name], recipe.benchmarks.get(benchmark, {})
        cells[recipe.name] = {
            "Memory, loaded": size(own.get("resident_bytes")),
            "At the peak": size(own.get("peak_bytes")),
            "Time to load": duration(own.get("load_seconds")),
            "In theory": _times(record.get("theoretical_speedup")),
        }
        for batch in batches:
            speeds = own.get("tokens_per_second", {}).get(batch, {})
            cells[recipe.name] |= {
                f"Prefill, batch {batch}": _middle(speeds.get("prefill")),
                f"Decode, batch {batch}": _middle(speeds.get("decode")),
                f"Beside dense, {batch}": _decoding(record, batch),
                f"Without blocks, {batch}": _decoding(record.get("core") or {}, batch),
            }
    return cells_table(cells, name)


def linear_table(model: ModelResults, benchmark: str, name: str) -> str:
    """Milliseconds of one row through a linear of each shape, dense, packed and without its blocks, as an HTML table.

    Empty where nothing is packed.
    """
    cells = {}
    for recipe in model.compressed:
        for shape in recipe.benchmarks.get(benchmark, {}).get("linears", ()):
            what = [recipe.name, f"{shape['out_features']}\u00a0×\u00a0{shape['in_features']}", shape["pattern"]]
            left, right = (shape[f"{side}_block_size"] for side in ("left", "right"))
            if left or right:
                what.append(f"blocks\u00a0{left}" if left == right else f"blocks {left or GAP} and {right or GAP}")
            cells[", ".join(what)] = {
                "Linears": str(shape["count"]),
                "Dense, ms": _middle(shape["dense_milliseconds"]),
                "Packed, ms": _middle(shape["milliseconds"]),
                "Without blocks, ms": _middle(shape.get("core_milliseconds")),
                "Speed-up": _times(shape["speedup"]["median"]),
                "In theory": _times(shape["theoretical_speedup"]),
            }
    return cells_table(cells, name, classes="data long") if cells else ""


def _visible(text: str) -> str:
    """A text as one line; the characters that only control a terminal are replaced."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", re.sub(r"\s*\n\s*", " ↵ ", text)).strip()


def sample_table(samples: dict[str, dict[str, str]], name: str) -> str:
    """What each recipe writes after each prompt, `samples` by recipe and prompt, as an HTML table."""
    prompts = dict.fromkeys(prompt for own in samples.values() for prompt in own)
    cells = {
        recipe: {f"{_visible(prompt)} …": _visible(own[prompt]) if prompt in own else GAP for prompt in prompts}
        for recipe, own in samples.items()
    }
    return cells_table(cells, name, classes="data text")


def bits_table(model: ModelResults, name: str) -> str:
    """Bits per weight of all recipes on each linear of a decoder layer, as an HTML table; ! where dense takes less."""
    cells = {}
    for recipe in model.compressed:
        bits = model.module_bits(recipe)
        larger = model.larger_than_dense(recipe)
        cells[recipe.name] = {linear: f"{bits[linear]:.2f}" + "!" * (linear in larger) for linear in bits}
    return cells_table(cells, name)


def stage_table(model: ModelResults, name: str) -> str:
    """Seconds and peak memory of every stage of a model's recipes, as an HTML table."""

    def cell(seconds: float | None, memory: int | None) -> str:
        return duration(seconds) + (f", {size(memory)}" if memory else "")

    cells = {
        row: {"calibrate": cell(record["seconds"], record["peak_memory_bytes"])}
        for row, record in model.calibration_rows().items()
    }
    for recipe in model.recipes:
        memory = recipe.peak_memory()
        cells[recipe.name] = {stage: cell(seconds, memory[stage]) for stage, seconds in recipe.seconds().items()}
    return cells_table({row: {s.capitalize(): own.get(s, "") for s in STAGES} for row, own in cells.items()}, name)
