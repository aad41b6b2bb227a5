"""The report: a summary in words, the table, the figures, on one page that needs nothing but itself.

Table and figures are files beside it too, for other pages and papers. Only the records of the other stages are read.
The same records give the same bytes: no time of writing, no random ids. What is missing is listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from armor.config.layers import LayerSettings
from armor.config.report import ReportSettings
from armor.execution.files import atomic_path
from armor.execution.log import log
from armor.execution.machine import current_machine
from armor.format.layout import FIGURES, PAGE, SUMMARY
from armor.format.provenance import made_by
from armor.format.records.report import ReportRecord, Row
from armor.report.charts import Figure, alone
from armor.report.columns import summary_rows
from armor.report.figures import figures
from armor.report.front import in_words, offers, source_file
from armor.report.front import table as front_table
from armor.report.front_figures import panels
from armor.report.gather import fingerprints, read_results
from armor.report.page_tables import PageTable, page_tables
from armor.report.results import STAGES, ModelResults
from armor.report.tables import csv_text, html_table, latex_text, markdown_text
from armor.report.words import notes_on_blocks, summarize

__all__ = ["Section", "build", "write_page"]

CAPTION = (
    "The best compressed value is bold; – was not measured or does not apply. Rel. loss: mean over the compressed "
    "linears, 0 is the dense weight, 1 no weight at all. Bits/weight: in the decoder's linears. Factorize: summed over "
    "decoder layers, refine and tune included. Tokens/s: greedy decoding, median; the dense model and the recipes took "
    "turns in one job. A recipe's name leads to what made it."
)

FRONT = (
    "The line is the front: no other recipe is as good and costs as little as one on it. What is beaten is pale. "
    "{ours}Bits are counted as stored, in the decoder's linears: numbers, scales, masks and blocks. "
    "Speed is that of decoding one sequence, in turn with the dense model; in brackets, of a recipe whose integers are "
    "multiplied out first."
)


@dataclass(frozen=True)
class Front:
    """What one could take instead of a recipe: the panels of its figure, what they say, the table."""

    panels: list[Figure]
    words: list[str]
    table: Markup
    caption: str


@dataclass(frozen=True)
class Section:
    """What the page shows of one model; `id` begins the ids of its tables and figures."""

    id: str
    name: str
    summary: list[str]
    table: Markup
    caption: str
    notes: list[str]
    tables: list[PageTable]
    figures: list[Figure] = field(default_factory=list)
    front: Front | None = None

    def drawings(self) -> list[Figure]:
        """All its figures, in order."""
        return [*(self.front.panels if self.front else []), *self.figures]


@dataclass(frozen=True)
class _Reproduce:
    """How to make all this again: the configuration as YAML, cores, machines and versions, origins of recipes by id."""

    config: str
    cores: int
    made: list[str]
    origins: dict[str, str]


def _by_stage(told: Iterable[tuple[str, str]]) -> list[str]:
    """Each text once, after the stages that it is told of."""
    stages: dict[str, dict[str, None]] = {}
    for stage, text in told:
        stages.setdefault(text, {})[stage] = None
    return [f"{', '.join(names)}: {text}" for text, names in stages.items()]


def _reproduce(models: list[ModelResults], config: dict[str, Any]) -> _Reproduce:
    ran = sorted(
        ((stage, record.machine) for model in models for stage, record in model.records()),
        key=lambda pair: STAGES.index(pair[0]),
    )
    places = [
        (stage, f"{on.processor if on.device == 'cpu' else on.device}, {on.threads} of {on.cores} cores")
        for stage, on in ran
    ]
    versions = [(stage, ", ".join(f"{n} {v}" for n, v in sorted(on.versions.items()))) for stage, on in ran]
    return _Reproduce(
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100) if config else "",
        cores=max((on.cores or 1 for _, on in ran), default=1),
        made=[*_by_stage(places), *_by_stage(versions)],
        origins=_origins(models),
    )


def _origin_places(model: ModelResults, name: str) -> dict[str, str]:
    """Where the page tells what made a recipe: its id by the recipe's name; `name` is the section's."""
    return {r.name: f"{name}-origin-{i}" for i, r in enumerate(model.compressed) if r.checkpoint}


def _origins(models: list[ModelResults]) -> dict[str, str]:
    """What made each compressed model: fingerprints of source and calibration, hash of the code, seed; by id."""
    found = {}
    for index, model in enumerate(models):
        places = _origin_places(model, f"m{index}")
        for recipe in model.compressed:
            if made := recipe.checkpoint:
                code = " and ".join(dict.fromkeys(part.code for part in made.factors))
                settings = [LayerSettings.model_construct(**part.settings) for part in made.factors]
                seeds = " and ".join(dict.fromkeys(str(part.seed) for part in settings))
                source, statistics = made.fingerprint[:16], made.statistics_fingerprint[:16]
                name = recipe.name if len(models) == 1 else f"{model.name}, {recipe.name}"
                found[places[recipe.name]] = (
                    f"{name}: source {source}, calibration {statistics}, code {code}, seed {seeds}"
                )
    return found


def _section(model: ModelResults, rows: Sequence[Row], name: str) -> Section:
    own = [row for row in rows if row.model == model.name]
    return Section(
        id=name,
        name=model.name,
        summary=summarize(model),
        table=html_table(own, f"{name}-summary", _origin_places(model, name)),
        caption=CAPTION,
        notes=notes_on_blocks(model),
        tables=list(page_tables(model, name)),
        figures=figures(model, name),
        front=_front(model, name),
    )


def _front(model: ModelResults, name: str) -> Front | None:
    """None where there are not two recipes to choose from."""
    offered = offers(model)
    drawn = panels(offered, f"{name}-front")
    if not drawn:
        return None
    ours = " and ".join(dict.fromkeys(offer.method for offer in offered if offer.kind == "blocks"))
    return Front(
        drawn,
        in_words(offered, source_file(model)),
        front_table(offered).html(f"{name}-front"),
        FRONT.format(ours=f"Diamonds are {ours}. " if ours else ""),
    )


def write_page(title: str, sections: list[Section], file: Path, reproduce: _Reproduce | None = None) -> None:
    """Write the page of `sections`, one for each model; at the end stands how to `reproduce` it all, if given."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("armor.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html.j2").render(title=title, models=sections, reproduce=reproduce)
    _write(file, page)


def _write(file: Path, text: str) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def build(results: Path, settings: ReportSettings, output: Path) -> ReportRecord:
    """Write index.html, summary.csv, .md, .tex, .json and figures/ to `output`, from the records in `results`.

    Returns what summary.json holds. Raises ArmorError for a record that cannot be read, and where there is no result.
    """
    models = read_results(results, settings)
    rows = summary_rows(models)
    sections = [_section(model, rows, f"m{index}") for index, model in enumerate(models)]
    for old in (output / FIGURES).glob("*.svg"):
        old.unlink()
    for figure in (figure for section in sections for figure in section.drawings()):
        _write(output / FIGURES / f"{figure.name}.svg", alone(figure.svg))
    summary = output / SUMMARY
    _write(summary.with_suffix(".csv"), csv_text([row.flat() for row in rows]))
    _write(summary.with_suffix(".md"), markdown_text(rows, models))
    _write(summary.with_suffix(".tex"), latex_text(rows, models))
    write_page(settings.title, sections, output / PAGE, _reproduce(models, settings.config))
    made = made_by("armor.report", settings, fingerprints(results, settings))
    record = ReportRecord(rows=rows, made_by=made, machine=current_machine())
    record.write(summary)
    log.info("%s: %d rows", output / PAGE, len(rows))
    return record
