"""Two runs compared: the difference is that of paired blocks, and what does not compare is refused or said to."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import asdict
from statistics import fmean

import pytest

from armor.core.errors import ArmorError
from armor.format.layout import Results
from armor.format.records.base import File, MadeBy
from armor.format.records.checkpoint import CheckpointRecord, FactorsMadeBy
from armor.format.records.evaluation import EvaluationRecord
from armor.format.records.report import ReportRecord
from armor.format.records.source import SourceRecord
from armor.report import compare
from armor.report.compare import comparison
from tests.forks import armor
from tests.report.sample import MACHINE, change, plan, write_results

MODEL = "smollm2-135m"
RECIPES = ["dense", "nowag", "armor"]


def evaluation(run, recipe):
    return Results(str(run)).evaluation(MODEL, recipe, "wikipedia")


def change_evaluation(run, recipe, settings=None, **changes):
    if settings:
        made = EvaluationRecord.read(evaluation(run, recipe)).made_by
        changes["made_by"] = made.model_copy(update={"settings": settings})
    change(EvaluationRecord, evaluation(run, recipe), **changes)


def note(run, settings):
    """What a run's report leaves that a comparison reads."""
    made = MadeBy(stage="armor.report", code="", settings=settings.model_dump(mode="json"), inputs={})
    ReportRecord(rows=(), made_by=made, machine=MACHINE).write(run / "report" / "summary.json")


@pytest.fixture
def runs(tmp_path):
    """Two runs; ARMOR of the second is better on every block, by about a tenth."""
    found = []
    for name in ("a", "b"):
        run = write_results(tmp_path / name / "results", plan(RECIPES), 1)
        if name == "b":
            before = EvaluationRecord.read(evaluation(run, "armor")).block_means
            means = [mean - 0.1 + 0.01 * (-1) ** k for k, mean in enumerate(before)]
            change_evaluation(run, "armor", block_means=means, value=math.exp(fmean(means)))
        note(run, plan(RECIPES))
        found.append(run)
    return found


def rows_of(runs):
    return {row.recipe: row for row in comparison(*runs)[0]}


def test_the_difference_is_b_minus_a_and_its_error_that_of_the_paired_blocks(runs):
    row = rows_of(runs)["armor"]
    assert row.difference == pytest.approx(row.perplexity_b - row.perplexity_a)
    a, b = (EvaluationRecord.read(evaluation(run, "armor")).block_means for run in runs)
    # Against the jackknife: each block left out in turn.
    without = [math.exp(fmean(b[:k] + b[k + 1 :])) - math.exp(fmean(a[:k] + a[k + 1 :])) for k in range(len(a))]
    spread = sum((value - fmean(without)) ** 2 for value in without)
    assert row.difference_se == pytest.approx(math.sqrt(spread * (len(a) - 1) / len(a)), rel=0.1)
    assert row.difference_se < 0.2 * row.perplexity_a_se
    equal = rows_of(runs)["nowag"]
    assert (equal.difference, equal.difference_se, equal.not_comparable) == (0, 0, None)


def test_the_page_the_csv_and_the_text_say_the_same_and_always_do(runs, tmp_path):
    text = compare(*runs, tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    shown = re.search(r"−2\.[0-9]+ ± 0\.[0-9]+", text)[0]
    assert f">{shown}</td>" in page
    words = "By more than two standard errors of the difference, B has the lower perplexity for armor."
    assert words in text and words in page
    with open(tmp_path / "out" / "comparison.csv") as file:
        table = {row["recipe"]: row for row in csv.DictReader(file)}
    for recipe, row in rows_of(runs).items():
        assert table[recipe] == {key: "" if value is None else str(value) for key, value in asdict(row).items()}
    compare(*runs, tmp_path / "again")
    for file in ("index.html", "comparison.csv"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_the_same_tokens_compare_wherever_the_text_lay(runs):
    before = rows_of(runs)["armor"]
    settings = {"text": {"dataset": "wikipedia"}, "sequence_length": None, "dtype": "auto", "predictions_gb": 40}
    change_evaluation(runs[1], "armor", settings=settings)
    assert rows_of(runs)["armor"] == before


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"text_fingerprint": "f" * 64}, "not known to be the same text and tokens"),
        (
            {"settings": {"text": {"files": ["text.txt"]}, "sequence_length": 1024, "dtype": "float32"}},
            "different settings (dtype auto and float32)",
        ),
    ],
    ids=["text", "settings"],
)
def test_other_evaluations_are_marked_and_have_no_difference(runs, tmp_path, changes, said):
    change_evaluation(runs[1], "armor", **changes)
    row = rows_of(runs)["armor"]
    assert (row.difference, row.difference_se, row.not_comparable) == (None, None, said)
    line = f"armor on wikipedia: not comparable: {said}."
    assert line in compare(*runs, tmp_path / "out") and line in (tmp_path / "out" / "index.html").read_text()


def test_the_settings_that_differ_are_listed_and_no_others(runs, tmp_path):
    assert comparison(*runs)[2] == {MODEL: {}}
    settings = {"seed": 0, "solver": {"iterations": 20}}
    first = FactorsMadeBy(layers=(0, 1, 2), code="c" * 16, settings=settings, versions={})
    other = {"layers": (3,), "settings": settings | {"solver": {"iterations": 5}}}
    for run, factors in ((runs[0], [first]), (runs[1], [first, first.model_copy(update=other)])):
        change(CheckpointRecord, Results(str(run)).checkpoint(MODEL, "armor"), factors=factors)
    change_evaluation(runs[1], "armor", settings={"text": {"files": ["text.txt"]}, "sequence_length": 1024})
    expected = {
        "recipe armor: solver.iterations": {"A": "20", "B": "20 (layers 0 to 2), 5 (layers 3)"},
        "evaluation wikipedia: dtype": {"A": "auto", "B": "auto (dense, nowag), unset (armor)"},
    }
    assert comparison(*runs)[2] == {MODEL: expected}
    assert "recipe armor: solver.iterations: 20 in A, 20 (layers 0" in compare(*runs, tmp_path / "out")
    assert ">20 (layers 0 to 2), 5 (layers 3)</td>" in (tmp_path / "out" / "index.html").read_text()


def test_different_tokenizers_are_refused_in_one_line_and_nothing_is_written(runs, tmp_path):
    other = {"tokenizer.json": File(bytes=1, sha256="f" * 64)}
    change(SourceRecord, Results(str(runs[1])).source(MODEL), files=lambda record: record.files | other)
    for recipe in RECIPES:
        change_evaluation(runs[1], recipe, text_fingerprint="f" * 64)
    with pytest.raises(ArmorError, match=r"not comparable: .*: different tokenizers \(tokenizer.json\)") as error:
        compare(*runs, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_what_only_one_run_has_is_listed(runs):
    (runs[1] / MODEL / "nowag" / "evaluation" / "wikipedia.json").unlink()
    rows, notes, _ = comparison(*runs)
    assert [row.recipe for row in rows] == ["dense", "armor"]
    assert notes == [f"Only in A: {MODEL}/nowag on wikipedia."]


def test_what_is_no_report_to_compare_with_is_one_error(runs, tmp_path):
    with pytest.raises(ArmorError, match="holds no report/summary.json; expected the results folder of a run"):
        comparison(runs[0], tmp_path)
    other = write_results(tmp_path / "c", plan(["wanda"]), 1)
    note(other, plan(["wanda"]))
    with pytest.raises(ArmorError, match=f"in common; found .*, and {MODEL}/wanda on wikipedia"):
        comparison(runs[0], other)


def test_the_command_takes_the_folders_of_two_runs(runs, tmp_path):
    done = armor("report", "a", "b/results", folder=tmp_path)
    assert done.returncode == 0 and "B − A" in done.stdout
    assert (tmp_path / "comparison" / "index.html").is_file()
    done = armor("report", "a", folder=tmp_path)
    assert done.returncode == 2 and "expected --settings, or the results folders of two runs" in done.stderr
