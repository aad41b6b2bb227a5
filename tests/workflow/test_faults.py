"""Kills, failures, a full disk, two runs at once: nothing is lost, nothing is half-written, and one command goes on."""

import base64
import os
import random
import shlex
import shutil
import signal
import sys
import time

import psutil
import pytest
import snakemake.cli

from armor.config.run import Config
from armor.run.status import start_run
from tests.forks import armor
from tests.killed import POINTS, die_at, left_over, results_of, sitecustomize
from tests.workflow.conftest import Run
from tests.workflow.test_rerun import AFTER_FACTORS

KILLS = int(os.environ.get("ARMOR_KILLS", "3"))  # `make test-faults`: 50


def killed(run, point, number, where="", targets=()):
    """Run the workflow, all of it killed at `point` for the `number`-th time (0: never); whether it was.

    Only files whose path has `where` in it count; `targets` are made alone. Returns when the last of its processes is
    gone: until then it may hold locks.
    """
    patch = run.folder / "patch"
    shutil.rmtree(patch, ignore_errors=True)
    sitecustomize(patch, point, number, where)
    patched = Run(run.folder, run.config, python=patch)
    arguments = patched.command("--", *targets)["args"][2:]

    def dying():
        os.setsid()
        die_at(point, number, patch / "counter", where)
        sys.argv = arguments
        snakemake.cli.main(arguments[1:])

    done = patched.forked(dying)
    while any(is_alive(other, done.args) for other in psutil.process_iter()):
        time.sleep(0.05)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode != 0


def is_alive(process, group):
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.Error):
        return False


@pytest.fixture(scope="module")
def small(config):
    """One recipe: what can be compared, file by file, with the finished run."""
    return config | {"recipes": {"armor": config["recipes"]["armor"]}}


@pytest.mark.gate
def test_killed_anywhere_the_same_command_ends_as_if_undisturbed(run, small, tmp_path):
    """ARMOR_KILLS says how often. A kill of a single stage would not show what Snakemake makes of one of all."""
    others = tuple(f"tiny/{recipe}/" for recipe in run.config["recipes"].keys() - small["recipes"].keys())
    whole = results_of(run.folder / "results")
    expected = {name: digest for name, digest in whole.items() if not name.startswith(others)}
    assert "tiny/armor/evaluation/words.json" in expected
    saves = len(expected)  # of each file at least one
    draw, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        again = Run(tmp_path / f"run{runs}", small)
        again.folder.mkdir()
        runs += 1
        number = draw.randint(1, saves // 3)
        while killed(again, POINTS[kills % 3], number if kills < KILLS else 0):
            kills += 1
            number += draw.randint(1, saves // 3)  # each start comes further than the one before, so the last one ends
        assert results_of(again.folder / "results") == expected
        assert left_over(again.folder / "results") == []
        marks = (again.folder / ".snakemake/incomplete").glob("*")
        assert [base64.urlsafe_b64decode(mark.name) for mark in marks] == []
        assert not any((again.folder / ".snakemake/locks").glob("*"))
        shutil.rmtree(again.folder)
    print(f"{kills} kills in {runs} runs: every output as undisturbed, no file left over")


def test_what_was_done_but_not_yet_recorded_when_the_run_was_killed_runs_again(run, tmp_path):
    again = run.copied(tmp_path / "run")
    marks = again.folder / ".snakemake/incomplete"  # as Snakemake has them while a file is made
    marks.mkdir(exist_ok=True)
    for suffix in ("json", "safetensors"):
        file = f"results/tiny/armor/layers/layer_1.{suffix}"
        name = base64.urlsafe_b64encode(file.encode()).decode()
        (again.folder / ".snakemake/metadata" / name).rename(marks / name)
    assert again.would_run() == {"factorize": 1} | AFTER_FACTORS


def test_one_layer_fails_and_the_others_go_on(run, tmp_path):
    again = run.copied(tmp_path / "run")
    layers = again.folder / "results/tiny/armor/layers"
    for layer in (0, 1):
        (layers / f"layer_{layer}.safetensors").unlink()
    statistics = again.folder / "results/tiny/calibration/words/layer_1.safetensors"
    statistics.rename(again.folder / "elsewhere")
    done = again.snakemake("--keep-going")
    assert done.returncode != 0 and (layers / "layer_0.safetensors").exists() and not (layers / "layer_1.json").exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("factorize tiny armor layer 1: ")]
    assert said == [f"factorize tiny armor layer 1: {said[0].split(': ', 1)[1]}"] and "missing" in said[0]
    assert "calibration/words/layer_1.safetensors" in said[0]
    line = done.stderr[done.stderr.index("again: ") :].splitlines()[0].removeprefix("again: ")
    assert line.startswith("snakemake results/tiny/armor/layers/layer_1.safetensors --snakefile ")
    assert said[0] in armor("status", folder=again.folder).stdout
    (again.folder / "elsewhere").rename(statistics)
    done = again.forked(lambda: snakemake.cli.main(shlex.split(line)[1:]))  # the command as it was printed
    assert done.returncode == 0 and (layers / "layer_1.json").exists(), done.stderr
    assert results_of(again.folder / "results/tiny/armor/layers") == results_of(
        run.folder / "results/tiny/armor/layers"
    )


def test_a_second_run_on_the_same_results_stops_with_one_clear_line(run, config, tmp_path):
    second = Run(tmp_path, config)
    lock = start_run(tmp_path / "results", Config(**config), ["snakemake"])
    done = second.snakemake()
    os.close(lock)
    assert done.returncode != 0 and not (tmp_path / "results/tiny").exists()
    said = [line for line in done.stderr.splitlines() if "another run is at work here" in line]
    assert len(said) == 1 and f"(process {os.getpid()} on " in said[0] and "wait for its end" in said[0]
