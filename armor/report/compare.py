"""Two runs side by side: every model and recipe that both have, with the difference of perplexity and how sure it is.

Two perplexities compare only if both models predicted the same tokens. The fingerprint of an evaluation's blocks says
whether they did. So another tokenizer, text, length or dtype is named in place of a difference. Where nothing compares,
the two runs are refused. On the same blocks the difference is much surer than either perplexity, for a block that is
hard for one model is hard for the other. What each run holds is read from its own report's summary.json and the
records. These also say with which settings they were made. Those that differ are listed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

from pydantic import ValidationError

from armor.config.report import ReportSettings
from armor.core.errors import ArmorError
from armor.execution.files import atomic_path
from armor.format.layout import COMPARISON, PAGE, REPORT, RESULTS, SUMMARY, Results
from armor.format.provenance import ranges
from armor.format.records.evaluation import EvaluationRecord
from armor.format.records.report import ReportRecord
from armor.report.gather import read_results
from armor.report.numbers import GAP, number, plus_minus
from armor.report.page import Section, write_page
from armor.report.page_tables import PageTable
from armor.report.results import ModelResults
from armor.report.table import Table
from armor.report.tables import csv_text

__all__ = ["Compared", "compare", "comparison"]

TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model")
BLOCKS = ("text", "sequences", "sequence_length")
"""The settings of an evaluation that end in its blocks of tokens, and in nothing else."""
STORED = "predictions_gb"
"""One that changes no number."""
UNSET = "unset"
SETTINGS = "Of the models, recipes, calibrations and evaluations that both runs have, as their results note them."
Settings = dict[str, dict[str, str]]
"""The values of a setting in A and in B, by what it is a setting of."""


@dataclass(frozen=True)
class Compared:
    """A model, a recipe and an evaluation that both runs have: the columns of comparison.csv, in order.

    `difference` is B − A in perplexity, None where `not_comparable` says why.
    """

    model: str
    recipe: str
    evaluation: str
    perplexity_a: float
    perplexity_a_se: float | None
    perplexity_b: float
    perplexity_b_se: float | None
    difference: float | None
    difference_se: float | None
    bits_per_weight_a: float | None
    bits_per_weight_b: float | None
    not_comparable: str | None

    @property
    def refusal(self) -> str:
        return f"{self.recipe} on {self.evaluation}: not comparable: {self.not_comparable}"


@dataclass(frozen=True)
class _Measured:
    """One evaluation, with the bits per weight of the recipe and the hashes of the tokenizer's files."""

    record: EvaluationRecord
    bits: float | None
    tokenizer: dict[str, str]


def _models(run: Path) -> dict[str, ModelResults]:
    """What a run's report is about, by model."""
    for results in (run, run / RESULTS):
        file = next(path for path in map(Path, Results(str(results)).report()) if path.name == SUMMARY)
        if file.is_file():
            return {model.name: model for model in read_results(results, _settings_of(file))}
    raise ArmorError(f"{run}: holds no {REPORT}/{SUMMARY}; expected the results folder of a run with its report")


def _settings_of(file: Path) -> ReportSettings:
    try:
        return ReportSettings.model_validate(ReportRecord.read(file).made_by.settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("made_by", "settings", *first["loc"])))
        raise ArmorError(f"{file}: {where}: {first['msg']}; {ReportRecord.AGAIN}") from None


Key = tuple[str, str, str]


def _measured(models: Iterable[ModelResults]) -> dict[Key, _Measured]:
    """All perplexities, by model, recipe and evaluation."""
    found = {}
    for model in models:
        for recipe in model.recipes:
            files = recipe.source.files if recipe.source else {}
            tokenizer = {name: files[name].sha256 for name in TOKENIZER if name in files}
            for name, record in recipe.evaluations.items():
                found[model.name, recipe.name, name] = _Measured(record, recipe.bits_per_weight, tokenizer)
    return found


def _obstacle(a: _Measured, b: _Measured) -> str | None:
    """Why two evaluations do not compare, or None."""
    blocks = [(m.record.text_fingerprint, m.record.blocks, m.record.length) for m in (a, b)]
    same = blocks[0] == blocks[1]
    changed = [name for name in TOKENIZER if name in a.tokenizer and a.tokenizer[name] != b.tokenizer.get(name)]
    if changed and not same:
        return f"different tokenizers ({', '.join(changed)})"
    own, other = a.record.made_by.settings, b.record.made_by.settings
    alike = {STORED, *(BLOCKS if same else ())}
    keys = [key for key in own | other if own.get(key) != other.get(key) and key not in alike]
    told = [key if key == "text" else f"{key} {own.get(key)} and {other.get(key)}" for key in keys]
    if told:
        return f"different settings ({', '.join(told)})"
    return None if same else "not known to be the same text and tokens"


def _difference(a: EvaluationRecord, b: EvaluationRecord) -> tuple[float, float | None]:
    """How much higher the perplexity of `b` is than that of `a`, and the standard error of that.

    The perplexity is the exponential of the blocks' mean. So to first order the difference changes with block i by b·bᵢ
    − a·aᵢ (the delta method). Its mean over the n blocks has the standard error stdev / √n.
    """
    pairs = zip(a.block_means, b.block_means, strict=True)
    changes = [b.value * after - a.value * before for before, after in pairs]
    error = stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None
    return b.value - a.value, error


def _compared(key: Key, a: _Measured, b: _Measured) -> Compared:
    obstacle = _obstacle(a, b)
    difference, error = (None, None) if obstacle else _difference(a.record, b.record)
    return Compared(
        *key,
        perplexity_a=a.record.value,
        perplexity_a_se=a.record.standard_error,
        perplexity_b=b.record.value,
        perplexity_b_se=b.record.standard_error,
        difference=difference,
        difference_se=error,
        bits_per_weight_a=a.bits,
        bits_per_weight_b=b.bits,
        not_comparable=obstacle,
    )


def _flat(value: object, key: str = "") -> dict[str, str]:
    """Settings as one level of texts, keys joined by dots; what is unset is left out, a list of values is one text."""
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        value = dict(enumerate(value, 1))
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{key}.{name}".lstrip(".")).items()}
    return {} if value is None else {key: repr(value) if isinstance(value, list) else str(value)}


def _told(parts: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, str]:
    """One text for each setting; where the parts of a thing differ in it, each value with the parts that have it."""
    flat = [(part, _flat(settings)) for part, settings in parts]
    told = {}
    for key in dict.fromkeys(key for _, settings in flat for key in settings):
        values: dict[str, list[str]] = {}
        for part, settings in flat:
            values.setdefault(settings.get(key, UNSET), []).append(part)
        single = len(values) == 1
        told[key] = ", ".join(v if single else f"{v} ({', '.join(names)})" for v, names in values.items())
    return told


def _settings(model: ModelResults) -> Settings:
    """The settings that the perplexities of a model were made with, by what they are settings of."""
    source = model.recipes[0].source
    found = {"model": _flat(source.settings if source else {})}
    for recipe in model.recipes:
        if recipe.checkpoint:
            parts = recipe.checkpoint.factors
            made = _told((f"layers {ranges(part.layers)}", {"code": part.code} | part.settings) for part in parts)
            found[f"recipe {recipe.name}"] = made | _flat({"calibration": recipe.pair.calibration})
    for name, record in model.calibrations.items():
        found[f"calibration {name}"] = _flat(record.made_by.settings)
    for name in model.evaluation_names():
        records = {recipe.name: recipe.evaluations[name] for recipe in model.recipes if name in recipe.evaluations}
        found[f"evaluation {name}"] = _told((own, record.made_by.settings) for own, record in records.items())
    return found


def _differing(a: ModelResults, b: ModelResults) -> Settings:
    """The settings in which two runs of a model differ, in A and in B, of what both have."""
    found = {}
    own, other = _settings(a), _settings(b)
    for thing in (thing for thing in own if own[thing] and other.get(thing)):
        for key in own[thing] | other[thing]:
            values = {name: side[thing].get(key, UNSET) for name, side in (("A", own), ("B", other))}
            if values["A"] != values["B"]:
                found[f"{thing}: {key}"] = values
    return found


def comparison(a: Path, b: Path) -> tuple[list[Compared], list[str], dict[str, Settings]]:
    """A row for each model, recipe and evaluation that both runs have; a line for each that only one has; what differs.

    The last is by model, and by setting the values in A and in B.

    `a` and `b` are results folders, or folders that hold one named results. Raises ArmorError for a folder without a
    report, for two runs with nothing in common, and for two of which nothing compares.
    """
    own, other = _models(a), _models(b)
    sides = [_measured(models.values()) for models in (own, other)]
    rows = [_compared(key, sides[0][key], sides[1][key]) for key in sides[0] if key in sides[1]]
    lonely = [[_name(key) for key in one if key not in two] for one, two in (sides, sides[::-1])]
    if not rows:
        held = [", ".join(names) or "no perplexity" for names in lonely]
        raise ArmorError(f"{a} and {b}: no model, recipe and evaluation in common; found {held[0]}, and {held[1]}")
    if all(row.not_comparable for row in rows):
        where = _name((rows[0].model, rows[0].recipe, rows[0].evaluation))
        raise ArmorError(f"{a} and {b}: not comparable: {where}: {rows[0].not_comparable}; expected the same tokens")
    differing = {name: _differing(model, other[name]) for name, model in own.items() if name in other}
    notes = [f"Only in {side}: {', '.join(names)}." for side, names in zip("AB", lonely, strict=True) if names]
    return rows, notes, differing


def _name(key: Key) -> str:
    return "{}/{} on {}".format(*key)


def _signed(difference: float | None, error: float | None) -> str:
    """A difference with its sign, to the second digit of its standard error."""
    if difference is None:
        return "not comparable"
    if not difference:
        return "0"
    text = number(error, 2) if error else number(abs(difference), 3)
    value = f"{difference:+,.{len(text.partition('.')[2])}f}".replace("-", "−")
    return f"{value} ± {text}" if error else value


def _labelled(rows: list[Compared]) -> dict[str, Compared]:
    """The rows of one model by what they are called: the recipe, and the evaluation where there are several."""
    single = len({row.evaluation for row in rows}) == 1
    return {row.recipe if single else f"{row.recipe} on {row.evaluation}": row for row in rows}


def _bits(bits: float | None) -> str:
    return GAP if bits is None else f"{bits:.2f}"


def _cells(row: Compared) -> dict[str, str]:
    """The texts of a row by column: first the difference, for a phone shows little more."""
    return {
        "B − A": _signed(row.difference, row.difference_se),
        "Perplexity A": plus_minus(row.perplexity_a, row.perplexity_a_se),
        "Perplexity B": plus_minus(row.perplexity_b, row.perplexity_b_se),
        "Bits/weight A": _bits(row.bits_per_weight_a),
        "Bits/weight B": _bits(row.bits_per_weight_b),
    }


def _summary(rows: list[Compared]) -> str:
    """What the rows of a model come to, in words."""
    better, worse = [], []
    for label, row in _labelled(rows).items():
        if row.difference is not None and row.difference_se and abs(row.difference) > 2 * row.difference_se:
            (better if row.difference < 0 else worse).append(label)
    if all(row.difference_se is None for row in rows):
        return "How sure a difference is cannot be said: that takes the same blocks in both runs, two or more."
    parts = [f"B has the lower perplexity for {', '.join(better)}"] * bool(better)
    parts += [f"{'A' if better else 'A has the lower perplexity'} for {', '.join(worse)}"] * bool(worse)
    if not parts:
        return "No perplexity of the two runs differs by more than two standard errors of the difference."
    return f"By more than two standard errors of the difference, {', '.join(parts)}."


def compare(a: Path, b: Path, output: Path) -> str:
    """Write index.html and comparison.csv about the runs `a` and `b` to the folder `output`; the text for a terminal.

    Raises ArmorError as `comparison` does, with nothing written.
    """
    rows, notes, differing = comparison(a, b)
    caption = (
        f"A is {a}, B is {b}. ± is one standard error: of a perplexity, over its blocks; of a difference, over the "
        "blocks' differences, which are the same blocks in both runs."
    )
    sections, text = [], [f"A is {a}", f"B is {b}", ""]
    for index, model in enumerate(dict.fromkeys(row.model for row in rows)):
        own = [row for row in rows if row.model == model]
        table = Table({label: _cells(row) for label, row in _labelled(own).items()})
        words, settings, tables = [_summary(own)], differing[model], []
        if settings:
            html = Table(settings, corner="setting").html(f"m{index}-settings", "data text long")
            tables = [PageTable("What differs", html, SETTINGS)]
        else:
            words.append("The settings of the two runs, as far as their results note them, do not differ.")
        refused = [f"{row.refusal}." for row in own if row.not_comparable]
        sections.append(
            Section(
                id=f"m{index}",
                name=model,
                summary=words,
                table=table.html(f"m{index}-comparison"),
                caption=caption,
                notes=[*refused, *(notes if index == 0 else [])],
                tables=tables,
            )
        )
        text += [model, table.plain(width=120), *words, *refused, ""]
        if settings:
            lines = [", ".join(f"{value} in {side}" for side, value in of.items()) for of in settings.values()]
            text += ["What differs", *(f"{name}: {line}" for name, line in zip(settings, lines, strict=True)), ""]
    write_page("ARMOR: two runs compared", sections, output / PAGE)
    with atomic_path(output / COMPARISON) as temporary:
        temporary.write_text(csv_text([asdict(row) for row in rows]), encoding="utf-8")
    return "\n".join([*text, *notes, f"The page: {output / PAGE}"])
