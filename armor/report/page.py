"""The report: a summary in words, the table, the figures, on one page that needs nothing but itself.

Table and figures are files beside it too, for other pages and papers. Only the JSON of the other stages is read. The
same JSON gives the same bytes: no time of writing, no random ids. The words are put together sentence by sentence, each
only when the results for it are there; what is missing is listed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import stdev

import jinja2
import yaml
from markupsafe import Markup

from armor.config.reading import parse_settings
from armor.config.report import ReportSettings
from armor.execution.files import atomic_path
from armor.execution.log import log
from armor.format.provenance import made_by
from armor.report.charts import alone
from armor.report.figures import figures
from armor.report.gather import fingerprints, read_results
from armor.report.page_tables import (
    benchmark_table,
    bits_table,
    evaluation_table,
    linear_table,
    sample_table,
    stage_table,
    task_table,
)
from armor.report.results import STAGES, ModelResults, RecipeResults, decode_speed
from armor.report.tables import (
    METHODS,
    csv_text,
    higher_is_better,
    html_table,
    latex_text,
    markdown_text,
    number,
    percent,
    plus_minus,
    size,
    summary_rows,
)

__all__ = ["build", "missing", "summarize", "write_page"]

CAPTION = (
    "The best compressed value is bold; – was not measured or does not apply. Rel. loss: mean over the compressed "
    "linears, 0 is the dense weight, 1 no weight at all. Bits/weight: in the decoder's linears. Factorize: summed over "
    "decoder layers. Tokens/s: greedy decoding, median; the dense model by itself. A recipe's name leads to what made "
    "it."
)


def _named(recipe: RecipeResults) -> str:
    """What the recipe is, like "ARMOR (2:4, blocks of 64)", and its name where that says more than the method."""
    details = [f"recipe {recipe.name}"] if recipe.name != recipe.pair.method else []
    details.append(recipe.pair.pattern)
    if recipe.pair.method == "armor":
        details.append(f"blocks of {recipe.block_size}")
    return f"{METHODS[recipe.pair.method]} ({', '.join(details)})"


def _ratio(recipe: RecipeResults, dense: RecipeResults) -> tuple[float, float | None]:
    """How many times the dense model's perplexity, and the standard error of that, on the first evaluation.

    Both models predict the same blocks, so the error is that of the mean of the blocks' differences: much smaller than
    the two perplexities' own errors, which say how blocks differ from each other. None where the blocks differ.
    """
    own, other = (r.evaluations[recipe.pair.evaluations[0]] for r in (recipe, dense))
    ratio = own["value"] / other["value"]
    if own["settings"] != other["settings"] or own["blocks"] != other["blocks"] or own["blocks"] < 2:
        return ratio, None
    differences = [a - b for a, b in zip(own["block_means"], other["block_means"], strict=True)]
    return ratio, ratio * stdev(differences) / math.sqrt(len(differences))


def _lost(model: ModelResults, best: RecipeResults, rival: RecipeResults | None) -> list[str]:
    dense = model.dense if model.dense and model.dense.perplexity else None
    first = f"On {best.pair.evaluations[0]}, {_named(best)} has a perplexity of {plus_minus(*best.perplexity)}"
    others = [f"the dense model has {plus_minus(*dense.perplexity)}"] if dense else []
    if rival:
        others.append(f"the best pruning method, {_named(rival)}, has {plus_minus(*rival.perplexity)}")
    sentences = ["; ".join([first, *others]) + "."]
    if dense:
        second = f"That is {plus_minus(*_ratio(best, dense), digits=3)} times the dense model's"
        if rival:
            second += f", where pruning makes it {plus_minus(*_ratio(rival, dense), digits=3)} times"
        sentences.append(second + ".")
    if found := best.against_dense:
        sentences.append(
            f"Its predictions are {plus_minus(*found['kl'], digits=3)} nats from the dense model's (KL divergence), "
            f"and at {percent(*found['top1'])} of the positions both find the same token the most likely."
        )
    return sentences


def _saved(model: ModelResults, best: RecipeResults, rival: RecipeResults | None) -> list[str]:
    sentences = []
    dense = model.dense.row() if model.dense else {}
    row, other = best.row(), rival.row() if rival else {}
    if (count := row["checkpoint_bytes"]) is not None:
        text = f"Its checkpoint takes {size(count)}"
        if whole := dense.get("checkpoint_bytes"):
            text += f", {count / whole:.0%} of the dense model's {size(whole)}"
        if pruned := other.get("checkpoint_bytes"):
            text += f" ({rival.name}: {size(pruned)})"
        sentences.append(text + ".")
    if (bits := row["bits_per_weight"]) is not None:
        text = f"A weight of its linears takes {bits:.2f} bits"
        if (whole := dense.get("bits_per_weight")) is not None:
            text += f" instead of {whole:g}"
        if (pruned := other.get("bits_per_weight")) is not None:
            text += f" ({rival.name}: {pruned:.2f})"
        sentences.append(text + ".")
    case = best.benchmarks.get(next(iter(best.pair.benchmarks), ""))
    if case and case["compressed"]:
        own, whole = case["compressed"], case["dense"]
        speeds = [decode_speed(side) for side in (own, whole)]
        batch, ratio = min(((int(b), r) for b, r in case["speedup"].items()), key=lambda pair: pair[0])
        sentences.append(
            f"Loaded, it holds {size(own['resident_bytes'])} of memory beside {size(whole['resident_bytes'])}, and "
            f"decoding {'' if batch == 1 else f'{batch} sequences '}in turn with the dense model it writes "
            f"{number(speeds[0], 3)} tokens per second in the median, that one {number(speeds[1], 3)}; within a turn "
            f"it is {number(ratio['decode']['median'], 3)} times as fast in the median."
        )
    return sentences


def _trust(model: ModelResults) -> list[str]:
    """How sure the numbers are, and whether they compare."""
    evaluation = next(iter(model.evaluation_names()), None)
    results = [r.evaluations[evaluation] for r in model.recipes if evaluation in r.evaluations]
    if not results:
        return []
    first = results[0]
    sentences = []
    if first["standard_error"] is not None:
        sentences.append(f"± is one standard error over {first['blocks']} blocks of {first['length']:,} tokens.")
    conditions = [{key: r[key] for key in ("blocks", "length", "settings")} for r in results]
    if all(condition == conditions[0] for condition in conditions):
        if len(results) > 1:
            sentences.append(
                "All recipes were measured on the same blocks, so their ratios are surer than the perplexities."
            )
    else:
        sentences.append("The recipes were not all measured on the same text or in the same way: compare with care.")
    return sentences


def missing(model: ModelResults) -> list[str]:
    """The results that were asked for and are not there, by recipe."""
    gaps = []
    for recipe in model.recipes:
        absent = [f"evaluation {name}" for name in recipe.pair.evaluations if name not in recipe.evaluations]
        absent += [f"tasks {name}" for name in recipe.pair.tasks if name not in recipe.tasks]
        absent += [f"benchmark {name}" for name in recipe.pair.benchmarks if name not in recipe.benchmarks]
        if not recipe.dense:
            absent += ["checkpoint"] * (recipe.checkpoint is None) + ["some decoder layers"] * (not recipe.complete)
        if absent:
            gaps.append(f"{recipe.name}: {', '.join(absent)}")
    return gaps


def summarize(model: ModelResults) -> list[str]:
    """Paragraphs: what was lost, what was saved, how sure that is, what is missing."""
    best, rival = model.best(armor=True), model.best(armor=False)
    if best is None:
        best, rival = rival, None
    paragraphs = []
    if best:
        paragraphs += [" ".join(_lost(model, best, rival)), " ".join(_saved(model, best, rival))]
    paragraphs.append(" ".join(_trust(model)))
    if gaps := missing(model):
        paragraphs.append(f"Missing, and left as gaps: {'; '.join(gaps)}.")
    return [paragraph for paragraph in paragraphs if paragraph]


def _block_sizes(model: ModelResults) -> list[str]:
    """Where the block size asked for does not divide a dimension or costs more than it saves: which do."""
    notes = []
    for recipe in model.compressed:
        asked, used = recipe.pair.block_size, recipe.used_block_sizes
        if recipe.pair.method == "armor" and {*used} - {asked}:
            sizes = " and ".join(map(str, used))
            notes.append(f"{recipe.name}: blocks of {asked} were asked for, {sizes} divide the dimensions.")
        if larger := model.larger_than_dense(recipe):
            names = ", ".join(larger)
            notes.append(f"{recipe.name}: the blocks make {names} larger than dense; keep them dense, or lower blocks.")
    return notes


def _by_stage(told: Iterable[tuple[str, str]]) -> list[str]:
    """Each text once, after the stages that it is told of."""
    stages: dict[str, dict[str, None]] = {}
    for stage, text in told:
        stages.setdefault(text, {})[stage] = None
    return [f"{', '.join(names)}: {text}" for text, names in stages.items()]


def _reproduce(models: list[ModelResults], config: dict) -> dict:
    """What the template shows of how to make all this again: the configuration as YAML, cores, what it was made on."""
    machines = [(stage, record["machine"]) for stage in STAGES for model in models for record in model.records(stage)]
    places = [
        (stage, f"{m['processor'] if m['device'] == 'cpu' else m['device']}, {m['threads']} of {m['cores']} cores")
        for stage, m in machines
    ]
    versions = [
        (stage, ", ".join(f"{name} {version}" for name, version in sorted(m["versions"].items())))
        for stage, m in machines
    ]
    return {
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100) if config else "",
        "cores": max((m["cores"] for _, m in machines), default=1),
        "made": [*_by_stage(places), *_by_stage(versions)],
        "origins": _origins(models),
    }


def _origin_places(model: ModelResults, name: str) -> dict[str, str]:
    """Where the page tells what made a recipe: its id by the recipe's name; `name` is the section's."""
    return {r.name: f"{name}-origin-{i}" for i, r in enumerate(model.compressed) if r.checkpoint}


def _origins(models: list[ModelResults]) -> list[tuple[str, str]]:
    """What made each compressed model: fingerprints of source and calibration, hash of the code, seed; by id."""
    found = []
    for index, model in enumerate(models):
        places = _origin_places(model, f"m{index}")
        for recipe in model.compressed:
            if recipe.checkpoint:
                inputs, factors = recipe.checkpoint["inputs"], recipe.checkpoint["factors"]
                code = " and ".join(dict.fromkeys(part["code"] for part in factors))
                seeds = " and ".join(dict.fromkeys(str(part["settings"]["seed"]) for part in factors))
                source, statistics = inputs["model"][:16], inputs["statistics"][:16]
                name = recipe.name if len(models) == 1 else f"{model.name}, {recipe.name}"
                text = f"{name}: source {source}, calibration {statistics}, code {code}, seed {seeds}"
                found.append((places[recipe.name], text))
    return found


def _section(model: ModelResults, rows: list[dict], name: str) -> dict:
    """What the template shows of one model; `name` begins the ids of its tables and figures."""
    own = [row for row in rows if row["model"] == model.name]
    tables = []
    if len(model.evaluation_names()) > 1:
        caption = "Perplexity and distance to the dense model, with standard errors; the first text is the summary's."
        tables.append(("By text", evaluation_table(model, f"{name}-evaluations"), caption))
    if model.task_names():
        caption = "By lm-eval, with its standard errors; all recipes answered the same questions."
        better = higher_is_better([model])
        if lower := [task for task in model.task_names() if better.get(task) is False]:
            caption += f" Lower is better: {', '.join(lower)}."
        tables.append(("Accuracy on tasks", task_table(model, f"{name}-tasks"), caption))
    for index, case in enumerate(model.benchmark_names()):
        caption = (
            "Memory that the loaded model holds by itself, in a fresh process, and at the peak while it loads, reads "
            "and writes. Tokens per second, of all sequences of a batch together, of reading the prompt (prefill) and "
            "of greedy decoding: median (quartiles). Beside dense: how many times as fast as the dense model decodes, "
            "in the same process, in turn. Without blocks: the same for the packed core alone, which is no model, so "
            "that the difference is what the blocks cost. In theory: how many times fewer bytes of weights it reads "
            "for a token; more is reached where the dense model's kernels are further from the memory's speed."
        )
        tables.append((f"Memory and speed: {case}", benchmark_table(model, case, f"{name}-benchmark-{index}"), caption))
        if table := linear_table(model, case, f"{name}-linears-{index}"):
            caption = (
                "One row, as in decoding, times each linear's weights: milliseconds for a linear, median (quartiles) "
                "of rounds in which dense, packed and the packed core without its blocks took turns."
            )
            tables.append((f"Speed by linear: {case}", table, caption))
    if any((samples := model.samples()).values()):
        caption = (
            "Greedy decoding after each prompt; ↵ is the end of a line. A few samples show what was lost and prove "
            "nothing: that is for perplexity and tasks."
        )
        tables.append(("What they write", sample_table(samples, f"{name}-samples"), caption))
    if model.topology and model.compressed:
        caption = "Bits per weight of each linear of a decoder layer, blocks and mask included; ! is more than dense."
        tables.append(("Bits per weight by linear", bits_table(model, f"{name}-bits"), caption))
    caption = "Time summed over a stage's jobs, and the most memory that one of them held."
    tables.append(("Time and memory by stage", stage_table(model, f"{name}-stages"), caption))
    return {
        "id": name,
        "name": model.name,
        "summary": summarize(model),
        "table": Markup(html_table(own, f"{name}-summary", _origin_places(model, name))),
        "caption": CAPTION,
        "notes": _block_sizes(model),
        "figures": [{**vars(figure), "svg": Markup(figure.svg)} for figure in figures(model, name)],
        "tables": [{"title": t, "table": Markup(table), "caption": c} for t, table, c in tables],
    }


def write_page(title: str, sections: list[dict], file: Path, reproduce: dict | None = None) -> None:
    """Write the page of `sections`, one for each model: id, name, summary (paragraphs), table, caption and notes.

    Figures and further tables are there or not; at the end stands how to `reproduce` it all, if given.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("armor.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html.j2").render(title=title, models=sections, reproduce=reproduce)
    with atomic_path(file) as temporary:
        temporary.write_text(page, encoding="utf-8")


def build(results: Path | str, plan: ReportSettings | dict, output: Path | str) -> dict:
    """Write index.html, summary.csv, .md, .tex, .json and figures/ to the folder `output` from the JSON in `results`.

    Returns {"rows": [...]}, what summary.json holds: a row per model and recipe with the keys COLUMNS, None for a gap.
    Raises ArmorError for a plan or a result that cannot be read, and where there is no result at all.
    """
    results, output = Path(results), Path(output)
    settings = plan if isinstance(plan, ReportSettings) else parse_settings(ReportSettings, plan, "plan")
    models = read_results(results, settings)
    rows = summary_rows(models)
    sections = [_section(model, rows, f"m{index}") for index, model in enumerate(models)]
    better = higher_is_better(models)
    texts = {
        "summary.csv": csv_text(rows),
        "summary.md": markdown_text(rows, better, models),
        "summary.tex": latex_text(rows, better, models),
    }
    (output / "figures").mkdir(parents=True, exist_ok=True)
    for old in (output / "figures").glob("*.svg"):
        old.unlink()
    drawn = [figure for section in sections for figure in section["figures"]]
    texts |= {f"figures/{figure['name']}.svg": alone(figure["svg"]) for figure in drawn}
    for name, text in texts.items():
        with atomic_path(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    write_page(settings.title, sections, output / "index.html", _reproduce(models, settings.config))
    made = made_by("armor.report", settings.model_dump(mode="json"), fingerprints(results, settings))
    with atomic_path(output / "summary.json") as temporary:  # keys as they are: the columns have an order
        temporary.write_text(json.dumps({"rows": rows, **made}, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    log.info("%s: %d rows", output / "index.html", len(rows))
    return {"rows": rows}
