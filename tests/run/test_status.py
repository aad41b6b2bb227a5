"""armor status: every state of a job from its files, and the same jobs as the workflow has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from armor.config.recipes import Recipe
from armor.config.run import Config
from armor.config.training import RefineSettings
from armor.core.errors import ArmorError
from armor.execution.files import write_json
from armor.model.inspect import inspect
from armor.model.source import open_source
from armor.run.jobs import jobs
from armor.run.status import read_status, start_run, summary
from tests.forks import armor
from tests.records import layer_record
from tests.tiny import tiny_model

CONFIG = Config.model_validate(
    {
        "models": {"tiny": {"folder": "tiny"}},
        "calibrations": {"words": {"text": {"files": ["words.txt"]}}},
        "recipes": {"dense": {"method": "dense"}, "armor": {"block_size": 8}},
        "evaluations": {"words": {"text": {"files": ["words.txt"]}}, "questions": {"tasks": ["piqa"]}},
        "benchmarks": {"decode": {}},
    }
)


def by_name(status):
    return {str(job): state for job, state in status.states.items()}


@pytest.fixture
def results(tmp_path):
    inspect(open_source(tiny_model(tmp_path / "tiny", layers=4)), tmp_path / "results/tiny/model.json")
    return tmp_path / "results"


def test_before_anything_all_is_missing_and_layers_are_not_counted(tmp_path):
    states = by_name(read_status(tmp_path / "results", CONFIG))
    assert set(states.values()) == {"missing"} and "factorize tiny armor layer ?" in states
    assert {"evaluate tiny armor words", "tasks tiny armor questions"} <= set(states)
    with pytest.raises(ArmorError, match="no run was started here; name another folder, or give --config"):
        read_status(tmp_path / "results")


def test_every_state(results, monkeypatch):
    monkeypatch.setenv("PWD", str(Path.cwd()))
    lock = start_run(results, CONFIG, ["/bin/snakemake", "--cores", "2"])
    os.utime(results / "run.json", (1000, 1000))
    folder, logs = results / "tiny/armor/layers", results / "logs/factorize/tiny/armor"
    logs.mkdir(parents=True)
    for layer, line in enumerate(["12:00:00 layer 0: 7/7", "12:00:00 layer 1: 3/7", "armor: error: NaN", "12:00:00 x"]):
        (logs / f"{layer}.log").write_text(f"{line}\n\n")
    os.utime(logs / "3.log", (900, 900))  # of an earlier run
    for suffix in ("safetensors", "json"):
        write_json(folder / f"layer_0.{suffix}", {})
    write_json(folder / "layer_1.safetensors", {})  # its record follows
    names = [f"factorize tiny armor layer {layer}" for layer in range(4)]

    status = read_status(results)  # its configuration is the run's
    assert [by_name(status)[name] for name in names] == ["done", "running", "failed", "stopped"]
    assert by_name(status)["assemble tiny armor"] == "missing" and by_name(status)["inspect tiny"] == "done"
    running, failed, stopped = status.details()
    assert running == f"{names[1]}: 12:00:00 layer 1: 3/7"
    again = "snakemake results/tiny/armor/layers/layer_2.safetensors --cores 2"
    assert failed.splitlines()[0] == f"{names[2]}: NaN" and failed.endswith(f"again: {again}")
    assert stopped.startswith(f"{names[3]}: stopped without a word")
    os.close(lock)
    assert by_name(read_status(results))[names[1]] == "stopped"
    measured = results / "benchmarks/factorize/tiny/armor/1.tsv"  # it ended well, and what it made was deleted
    measured.parent.mkdir(parents=True)
    measured.write_text("")
    assert by_name(read_status(results))[names[1]] == "missing"
    monkeypatch.setenv("PWD", str(results))  # from anywhere, by the run's folder too, the command is the same one
    assert read_status(results.parent).details()[-2].endswith(f"again: cd {Path.cwd()} && {again}")


def test_the_summary_tells_what_ran_from_what_was_there_before(results):
    os.close(start_run(results, CONFIG, ["snakemake"]))
    os.utime(results / "run.json", (1000, 1000))
    folder = results / "benchmarks/factorize/tiny/armor"
    folder.mkdir(parents=True)
    for layer, (ended, peak) in enumerate([(900, "9000.0"), (1100, "200.0"), (1200, "NA")]):
        write_json(results / f"tiny/armor/layers/layer_{layer}.safetensors", {})
        write_json(results / f"tiny/armor/layers/layer_{layer}.json", {})
        (folder / f"{layer}.tsv").write_text(f"s\tmax_rss\n1.5\t{peak}\n")
        os.utime(folder / f"{layer}.tsv", (ended, ended))
    # Of the last one Snakemake saw no process, as it does of a job in the fork server.
    layer_record(peak_memory_bytes=300_000_000).write(results / "tiny/armor/layers/layer_2.json")
    lines = [line.split() for line in summary(results, CONFIG)]
    assert lines[:2] == [["stage", "ran", "reused", "seconds", "peak", "memory"], ["inspect", "1"]]
    assert lines[2] == ["factorize", "2", "1", "3.0", "300", "MB"] and len(lines) == 4


def test_the_command_prints_a_table(results):
    os.close(start_run(results, CONFIG, ["snakemake"]))
    done = armor("status", results, folder=results)
    *rows, last = [line.split() for line in done.stdout.splitlines()]
    assert " ".join(last[1:9]) == "of those that are done would run again:"  # nothing recorded what made them
    assert rows[0] == ["stage", "of", "done", "running", "failed", "stopped", "missing"]
    assert ["factorize", "tiny", "armor", "4"] in rows and len(rows) == 1 + len(
        {(j.stage, j.names[:2]) for j in jobs(CONFIG, str(results))}
    )


def test_a_model_that_nothing_compresses_is_not_inspected(tmp_path):
    dense = CONFIG.replace(recipes={"dense": Recipe(method="dense")}, benchmarks={})
    states = by_name(read_status(tmp_path / "results", dense))
    assert "fetch tiny" in states and "inspect tiny" not in states


def test_the_summary_names_states_that_nothing_asks_for(results):
    config = CONFIG.replace(recipes={"armor": Recipe(block_size=8, refine=RefineSettings())})
    os.close(start_run(results, config, ["snakemake"]))
    before = summary(results, config)
    (results / "logs/states/tiny").mkdir(parents=True)
    (results / "logs/states/tiny/words-9x32.log").write_text("no states")
    (name,) = config.states()
    old = ("words-9x32", ".words-8x32.json.part/states")  # of a configuration before an edit
    for folder in (name, f".{name}.json.part/states", *old):
        (results / "tiny/states" / folder).mkdir(parents=True)
        (results / "tiny/states" / folder / "layer_0.safetensors").write_bytes(bytes(2_000_000))
    *same, unfinished, told = summary(results, config)
    assert same[:-1] == before[:-1]  # the last says how long it took
    assert unfinished.startswith(f"{results}/tiny/states/.words-8x32.json.part: hidden states that nothing ")
    assert told.startswith(f"{results}/tiny/states/words-9x32: hidden states that nothing here asks for, 0.002 GB; ")
