"""What `armor status`, `armor explain` and a job in the fork server show a user."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from armor.command import forkserver
from armor.config.run import Config
from armor.core.errors import ArmorError
from armor.execution.files import write_json
from armor.format.records.checkpoint import CheckpointRecord
from armor.run.explain import Reruns, describe, record_of
from armor.run.status import read_status, start_run, summary
from tests.forks import armor
from tests.packed import SETTINGS, packed

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 3600  # only if it hangs
TEXT = {"text": {"files": ["words.txt"]}}
CONFIG = Config.model_validate(
    {
        "models": {"tiny": {"folder": "tiny"}},
        "calibrations": {"words": TEXT},
        "recipes": {"armor": SETTINGS.model_dump(exclude={"seed", "overrides", "over"})},
        "evaluations": {"words": TEXT},
    }
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One model under one recipe; what its source and calibration were made of is not noted."""
    results = tmp_path_factory.mktemp("made") / "results"
    packed(results / "tiny")
    (results / "tiny/armor").mkdir()
    for name in ("layers", "checkpoint", "checkpoint.json"):
        (results / "tiny" / name).rename(results / "tiny/armor" / name)
    return results


@pytest.fixture
def results(made, tmp_path):
    return shutil.copytree(made, tmp_path / "results")


def by_name(status):
    return {str(job): state for job, state in status.states.items()}


def test_before_anything_all_is_missing_and_layers_are_not_counted(tmp_path):
    states = by_name(read_status(tmp_path / "results", CONFIG))
    assert set(states.values()) == {"missing"} and "factorize tiny armor layer ?" in states
    with pytest.raises(ArmorError, match="no run was started here; name another folder, or give --config"):
        read_status(tmp_path / "results")


def test_the_status_tells_what_is_done_running_failed_and_stopped(results):
    lock = start_run(results, CONFIG, ["snakemake", "--cores", "2"])
    os.utime(results / "run.json", (1000, 1000))
    logs = {"factorize/tiny/armor/1": "7/7", "assemble/tiny/armor": "armor: error: NaN", "calibrate/tiny/words": "3/7"}
    (results / "tiny/armor/layers/layer_1.json").unlink()  # it follows its factors
    (results / "tiny/armor/checkpoint.json").unlink()
    for name, line in logs.items():
        log = results / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"{line}\n")
    os.utime(results / "logs/calibrate/tiny/words.log", (900, 900))  # of an earlier run
    status = read_status(results)  # its configuration is the run's
    states = by_name(status)
    names = ["factorize tiny armor layer 0", "factorize tiny armor layer 1", "assemble tiny armor"]
    assert [states[name] for name in names] == ["done", "running", "failed"]
    assert states["calibrate tiny words"] == "stopped" and states["evaluate tiny armor words"] == "missing"
    (failed,) = (line for line in status.details() if line.startswith("assemble tiny armor: NaN\n"))
    assert failed.endswith("again: snakemake results/tiny/armor/checkpoint.json --cores 2")
    os.close(lock)
    assert by_name(read_status(results))[names[1]] == "stopped"


def test_the_summary_tells_what_ran_from_what_was_there_before(results):
    os.close(start_run(results, CONFIG, ["snakemake"]))
    os.utime(results / "run.json", (1000, 1000))
    folder = results / "benchmarks/factorize/tiny/armor"
    folder.mkdir(parents=True)
    for layer, (ended, peak) in enumerate([(900, 9000.0), (1100, 200.0)]):
        (folder / f"{layer}.tsv").write_text(f"s\tmax_rss\n1.5\t{peak}\n")
        os.utime(folder / f"{layer}.tsv", (ended, ended))
    lines = [line.split()[:4] for line in summary(results, CONFIG)]
    assert lines[0] == ["stage", "ran", "reused", "seconds"] and ["factorize", "1", "1", "1.5"] in lines


def test_the_commands_print_a_table_and_what_made_a_file(results):
    os.close(start_run(results, CONFIG, ["snakemake"]))
    *rows, last = [line.split() for line in armor("status", results, folder=results).stdout.splitlines()]
    assert rows[0] == ["stage", "of", "done", "running", "failed", "stopped", "missing"]
    assert ["factorize", "tiny", "armor", "2"] in rows and "would run again:" in " ".join(last)
    said = armor("explain", results / "tiny/armor/checkpoint", folder=results).stdout
    words = [line.split() for line in said.splitlines()]
    assert ["stage", "armor.assemble.writer"] in words and ["input", "factors", "of", "2", "layers"] in words
    assert "assemble tiny armor would run again:\n  " in said  # there is no source.json


def test_a_file_leads_to_its_record_or_is_refused(results, tmp_path):
    folder = results / "tiny/armor"
    assert record_of(folder / "layers/layer_1.safetensors") == folder / "layers/layer_1.json"
    assert record_of(folder / "checkpoint/model.safetensors") == folder / "checkpoint.json"
    write_json(tmp_path / "other.json", {"a": 1})
    with pytest.raises(ArmorError, match="nothing here says what made it"):
        record_of(tmp_path / "other.json")
    with pytest.raises(ArmorError, match="name one of its files: layer_0.json, layer_1.json"):
        record_of(folder / "layers")


def test_a_checkpoint_that_was_copied_elsewhere_still_says_what_made_it(results, tmp_path):
    fingerprint = CheckpointRecord.read(results / "tiny/armor/checkpoint.json").fingerprint
    (results / "tiny/armor/checkpoint").rename(tmp_path / "mine")
    said = "\n".join(describe(record_of(tmp_path / "mine")))
    assert "layers          0 to 1" in said and "solver.iterations: 2" in said and fingerprint in said
    assert "threads" not in said and str(results) not in said  # the same bytes on any machine


def test_a_setting_that_differs_is_named(results):
    wider = CONFIG.model_dump(mode="json", exclude_unset=True)
    wider["recipes"]["armor"]["block_size"] = 8
    reruns = Reruns(results, Config.model_validate(wider))
    job = next(job for job in reruns.jobs if job.stage == "factorize")
    assert "setting block_size: 16, now 8" in reruns.reasons(job)


@pytest.fixture(scope="module")
def server():
    """A process that started a fork server, the variable by which commands find it set."""
    code = (
        "import os, sys; from armor.command import forkserver; forkserver.start(); "
        "print(os.environ[forkserver.VARIABLE], flush=True); sys.stdin.read()"
    )
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as parent:
            patch.setenv(forkserver.VARIABLE, parent.stdout.readline().strip())
            yield parent
            parent.stdin.close()


def started(*arguments, folder):
    """A command in a process of its own."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "armor", *arguments]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=folder)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_forked_job_says_and_returns_what_it_does_without_the_server(server, tmp_path, monkeypatch):
    commands = [started("evaluate", "--model", "none", folder=tmp_path)]
    monkeypatch.delenv(forkserver.VARIABLE)
    commands.append(started("evaluate", "--model", "none", folder=tmp_path))
    forked, alone = ((*command.communicate(timeout=SECONDS), command.returncode) for command in commands)
    assert forked == alone and forked[1] and forked[2]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_killed_command_takes_its_forked_job_with_it(server, tmp_path):
    os.mkfifo(tmp_path / "pipe")  # into which nobody writes
    files = ("--source", ".", "--topology", ".", "--calibration", "pipe", "--output", "layer.safetensors")
    command = started("factorize", "--layer", "0", *files, folder=tmp_path)
    (process,) = psutil.Process(server.pid).children()
    for forks in (2, 0):
        limit = time.monotonic() + SECONDS
        while len(process.children(recursive=True)) != forks:
            assert time.monotonic() < limit
            time.sleep(0.02)
        command.send_signal(signal.SIGTERM)
    assert command.wait(timeout=SECONDS) == -signal.SIGTERM
    command.communicate()
