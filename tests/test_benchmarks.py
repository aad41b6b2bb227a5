"""Benchmarks: what they keep of a run is small and has its command, and every one of them can be asked for help."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import typer

from benchmarks.record import LINES, store

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(file.stem for file in FOLDER.glob("*.py") if "__main__" in file.read_text())
NEED_VLLM = ("serving_families", "soak")
FIGURES = sorted(FOLDER.glob("*.json"))


def runs(file):
    return json.loads(file.read_text())["runs"]


def test_a_new_run_replaces_its_own_and_keeps_the_others(tmp_path):
    file = tmp_path / "speed.json"
    for value in (1, 2):
        for model in ("small", "large"):
            store(file, model, [{"rows": 1, "seconds": value}, {"rows": 4, "seconds": value}], dtype="float32")
    large, small = runs(file)
    assert (large["of"], small["of"]) == ("large", "small") and small["rows"][0] == {"rows": 1, "seconds": 2}
    assert small["dtype"] == "float32" and small["processor"] and small["versions"]["torch"]
    assert small["command"].startswith("python -m benchmarks.")
    other = file.read_text().replace(small["processor"], "another processor")
    file.write_text(other)
    store(file, "small", [{"rows": 1, "seconds": 3}])
    assert [(run["of"], len(run["rows"])) for run in runs(file)] == [("large", 2), ("small", 1), ("small", 2)]


@pytest.mark.parametrize("file", FIGURES, ids=lambda file: file.stem)
def test_committed_figures_are_few_lines_that_name_their_command_and_processor(file):
    text = file.read_text()
    assert len(text.splitlines()) <= LINES and file.stem in SCRIPTS
    for run in json.loads(text)["runs"]:
        assert run["command"] and run["processor"] and run["date"] and run["rows"], run["of"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_asked_for_help(name, monkeypatch, capsys):
    if name in NEED_VLLM:
        pytest.importorskip("vllm")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    script = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as ended:
        typer.run(script.main) if hasattr(script, "typer") else script.main()
    assert ended.value.code == 0 and "--help" in capsys.readouterr().out
