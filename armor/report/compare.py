"""Two runs side by side: every model and recipe that both have, with the difference of perplexity and how sure it is.

Two perplexities compare only if both models predicted the same tokens, which the fingerprint of an evaluation's blocks
says: so another tokenizer, text, length or dtype is named in place of a difference, and where nothing compares the two
runs are refused. On the same blocks the difference is much surer than either perplexity, for a block that is hard for
one model is hard for the other. What each run holds is read from its own report's summary.json and the records, which
say with which settings they were made, too: those that differ are listed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

import pandas as pd
from markupsafe import Markup

from armor.config.reading import parse_settings
from armor.config.report import ReportSettings
from armor.core.errors import ArmorError
from armor.execution.files import atomic_path, read_json
from armor.format.provenance import ranges
from armor.report.gather import read_results
from armor.report.page import write_page
from armor.report.results import ModelResults
from armor.report.tables import GAP, cells_table, csv_text, number, plus_minus

__all__ = ["compare", "comparison"]

TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model")
BLOCKS = ("text", "sequences", "sequence_length")
"""The settings of an evaluation that end in its blocks of tokens, and in nothing else."""
UNSET = "unset"
SETTINGS = "Of the models, recipes, calibrations and evaluations that both runs have, as their results note them."
Key = tuple[str, str, str]


@dataclass(frozen=True)
class _Measured:
    """One evaluation, with the bits per weight of the recipe and the hashes of the tokenizer's files."""

    record: dict
    bits: float | None
    tokenizer: dict[str, str | None]


def _models(run: Path) -> dict[str, ModelResults]:
    """What a run's report is about, by model."""
    files = [results / "report" / "summary.json" for results in (run, run / "results")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ArmorError(f"{run}: holds no report/summary.json; expected the results folder of a run with its report")
    settings = read_json(file).get("settings")
    if settings is None:
        raise ArmorError(f"{file}: does not say what was reported on: an older release; run the report again")
    settings = parse_settings(ReportSettings, settings, str(file))
    return {model.name: model for model in read_results(file.parents[1], settings)}


def _measured(models: Iterable[ModelResults]) -> dict[Key, _Measured]:
    """All perplexities, by model, recipe and evaluation."""
    found = {}
    for model in models:
        for recipe in model.recipes:
            own = (recipe.source or {}).get("files", {})
            tokenizer = {name: own[name].get("sha256") for name in TOKENIZER if name in own}
            for name, record in recipe.evaluations.items():
                found[model.name, recipe.name, name] = _Measured(record, recipe.row()["bits_per_weight"], tokenizer)
    return found


def _obstacle(a: _Measured, b: _Measured) -> str | None:
    """Why two evaluations do not compare, or None."""
    blocks = [(m.record.get("inputs", {}).get("text"), m.record["blocks"], m.record["length"]) for m in (a, b)]
    same = blocks[0] == blocks[1] and blocks[0][0] is not None
    changed = [name for name in TOKENIZER if name in a.tokenizer and a.tokenizer[name] != b.tokenizer.get(name)]
    if changed and not same:
        return f"different tokenizers ({', '.join(changed)})"
    own, other = a.record["settings"], b.record["settings"]
    keys = [key for key in own | other if own.get(key) != other.get(key) and not (same and key in BLOCKS)]
    told = [key if key == "text" else f"{key} {own.get(key)} and {other.get(key)}" for key in keys]
    if told:
        return f"different settings ({', '.join(told)})"
    return None if same else "not known to be the same text and tokens"


def _difference(a: dict, b: dict) -> tuple[float, float | None]:
    """How much higher the perplexity of `b` is than that of `a`, and the standard error of that.

    The perplexity is the exponential of the blocks' mean, so to first order the difference changes with block i by
    b·bᵢ − a·aᵢ (the delta method), whose mean over the n blocks has the standard error stdev / √n.
    """
    pairs = zip(a["block_means"], b["block_means"], strict=True)
    changes = [b["value"] * after - a["value"] * before for before, after in pairs]
    error = stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None
    return b["value"] - a["value"], error


def _flat(value: object, key: str = "") -> dict[str, str]:
    """Settings as one level of texts, keys joined by dots; what is unset is left out, a list of values is one text."""
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        value = dict(enumerate(value, 1))
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{key}.{name}".lstrip(".")).items()}
    return {} if value is None else {key: repr(value) if isinstance(value, list) else str(value)}


def _told(parts: Iterable[tuple[str, dict]]) -> dict[str, str]:
    """One text for each setting; where the parts of a thing differ in it, each value with the parts that have it."""
    parts = [(part, _flat(settings)) for part, settings in parts]
    told = {}
    for key in dict.fromkeys(key for _, settings in parts for key in settings):
        values: dict[str, list[str]] = {}
        for part, settings in parts:
            values.setdefault(settings.get(key, UNSET), []).append(part)
        single = len(values) == 1
        told[key] = ", ".join(v if single else f"{v} ({', '.join(names)})" for v, names in values.items())
    return told


def _settings(model: ModelResults) -> dict[str, dict[str, str]]:
    """The settings that the perplexities of a model were made with, by what they are settings of."""
    found = {"model": _flat((model.recipes[0].source or {}).get("settings", {}))}
    for recipe in (recipe for recipe in model.recipes if recipe.checkpoint):
        parts = recipe.checkpoint["factors"]
        made = _told((f"layers {ranges(part['layers'])}", {"code": part["code"]} | part["settings"]) for part in parts)
        found[f"recipe {recipe.name}"] = made | _flat({"calibration": recipe.pair.calibration})
    for name, record in model.calibrations.items():
        found[f"calibration {name}"] = _flat(record.get("settings", {}))
    for name in model.evaluation_names():
        measured = [(r.name, r.evaluations[name]["settings"]) for r in model.recipes if name in r.evaluations]
        found[f"evaluation {name}"] = _told(measured)
    return found


def _differing(a: ModelResults, b: ModelResults) -> dict[str, dict[str, str]]:
    """The settings in which two runs of a model differ, in A and in B, of what both have."""
    found = {}
    own, other = _settings(a), _settings(b)
    for thing in (thing for thing in own if own[thing] and other.get(thing)):
        for key in own[thing] | other[thing]:
            values = {name: side[thing].get(key, UNSET) for name, side in (("A", own), ("B", other))}
            if values["A"] != values["B"]:
                found[f"{thing}: {key}"] = values
    return found


def comparison(a: Path, b: Path) -> tuple[list[dict], list[str], dict[str, dict]]:
    """A row for each model, recipe and evaluation that both runs have; a line for each that only one has; what differs.

    The last is by model, and by setting the values in A and in B.

    `a` and `b` are results folders, or folders that hold one named results. A row's `difference` is B − A in
    perplexity, None where `not_comparable` says why. Raises ArmorError for a folder without a report, for two runs with
    nothing in common, and for two of which nothing compares.
    """
    runs = [_models(run) for run in (a, b)]
    sides = [_measured(models.values()) for models in runs]
    rows = []
    for key in (key for key in sides[0] if key in sides[1]):
        pair = [side[key] for side in sides]
        obstacle = _obstacle(*pair)
        difference, error = (None, None) if obstacle else _difference(*(side.record for side in pair))
        row = dict(zip(("model", "recipe", "evaluation"), key, strict=True))
        for side, name in zip(pair, "ab", strict=True):
            row[f"perplexity_{name}"], row[f"perplexity_{name}_se"] = (
                side.record["value"],
                side.record["standard_error"],
            )
        row |= {"difference": difference, "difference_se": error}
        row |= {f"bits_per_weight_{name}": side.bits for side, name in zip(pair, "ab", strict=True)}
        rows.append(row | {"not_comparable": obstacle})
    lonely = [[_name(key) for key in own if key not in other] for own, other in (sides, sides[::-1])]
    if not rows:
        held = [", ".join(names) or "no perplexity" for names in lonely]
        raise ArmorError(f"{a} and {b}: no model, recipe and evaluation in common; found {held[0]}, and {held[1]}")
    if all(row["not_comparable"] for row in rows):
        row = rows[0]
        where = _name((row["model"], row["recipe"], row["evaluation"]))
        raise ArmorError(f"{a} and {b}: not comparable: {where}: {row['not_comparable']}; expected the same tokens")
    differing = {name: _differing(model, runs[1][name]) for name, model in runs[0].items() if name in runs[1]}
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


def _labels(rows: list[dict]) -> list[str]:
    """What the rows of one model are called: the recipe, and the evaluation where there are several."""
    single = len({row["evaluation"] for row in rows}) == 1
    return [row["recipe"] if single else f"{row['recipe']} on {row['evaluation']}" for row in rows]


def _cells(rows: list[dict]) -> dict[str, dict[str, str]]:
    """The texts of one model's table by row and column: first the difference, for a phone shows little more."""
    cells = {}
    for label, row in zip(_labels(rows), rows, strict=True):
        own = {"B − A": _signed(row["difference"], row["difference_se"])}
        for name in "ab":
            value = plus_minus(row[f"perplexity_{name}"], row[f"perplexity_{name}_se"])
            own[f"Perplexity {name.upper()}"] = value
        for name in "ab":
            bits = row[f"bits_per_weight_{name}"]
            own[f"Bits/weight {name.upper()}"] = GAP if bits is None else f"{bits:.2f}"
        cells[label] = own
    return cells


def _summary(rows: list[dict]) -> str:
    """What the rows of a model come to, in words."""
    better, worse = [], []
    for label, row in zip(_labels(rows), rows, strict=True):
        if row["difference_se"] and abs(row["difference"]) > 2 * row["difference_se"]:
            (better if row["difference"] < 0 else worse).append(label)
    if all(row["difference_se"] is None for row in rows):
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
    for index, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        own = [row for row in rows if row["model"] == model]
        refused = [
            f"{row['recipe']} on {row['evaluation']}: not comparable: {row['not_comparable']}."
            for row in own
            if row["not_comparable"]
        ]
        cells, words, settings = _cells(own), [_summary(own)], differing[model]
        table = settings and cells_table(settings, f"m{index}-settings", classes="data text long", corner="Setting")
        if not settings:
            words.append("The settings of the two runs, as far as their results note them, do not differ.")
        sections.append(
            {
                "id": f"m{index}",
                "name": model,
                "summary": words,
                "table": Markup(cells_table(cells, f"m{index}-comparison")),
                "caption": caption,
                "notes": [*refused, *(notes if index == 0 else [])],
                "tables": [{"title": "What differs", "table": Markup(table), "caption": SETTINGS}] if settings else [],
            }
        )
        frame = pd.DataFrame.from_dict(cells, orient="index")
        text += [model, frame.to_string(line_width=120), *words, *refused, ""]
        if settings:
            text += ["What differs", *(f"{name}: {v['A']} in A, {v['B']} in B" for name, v in settings.items()), ""]
    write_page("ARMOR: two runs compared", sections, output / "index.html")
    with atomic_path(output / "comparison.csv") as temporary:
        temporary.write_text(csv_text(rows), encoding="utf-8")
    return "\n".join([*text, *notes, f"The page: {output / 'index.html'}"])
