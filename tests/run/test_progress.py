"""The line of progress: how far a run is from its files alone, and Snakemake's words and status passed on."""

import os
import pty
import subprocess
import sys

import pytest

from armor.config.run import Config
from armor.core.errors import ArmorError
from armor.run.jobs import Job, jobs
from armor.run.progress import Course, follow, typed, words
from tests.records import topology_record

TEXT = {"files": ["words.txt"]}
CONFIG = Config.model_validate(
    {
        "models": {"tiny": {"folder": "."}},
        "calibrations": {"words": {"text": TEXT}},
        "recipes": {
            "dense": {"method": "dense"},
            "nowag": {"method": "nowag"},
            "armor": {"method": "armor", "solver": {"iterations": 100}},
        },
        "evaluations": {"words": {"text": TEXT}},
        "benchmarks": {"decode": {}},
    }
)
BEGAN = 1_000_000.0


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def finish(job: Job) -> None:
    """Leave the files of a job that took two seconds."""
    for path in (*job.outputs, job.measured):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    job.measured.write_text("s\tmax_rss\n2\t10\n")
    os.utime(job.measured, (BEGAN + 100, BEGAN + 100))


def course(results) -> Course:
    found = Course(results, CONFIG, BEGAN, slots=1)
    found.look(BEGAN + 100)
    return found


def test_nothing_is_done_at_the_beginning_and_all_at_the_end(results):
    start = course(results)
    assert (start.done, start.share) == (0, 0.0) and words(start).startswith(f"0 of {start.total} jobs")
    inspected = next(job for job in jobs(CONFIG, str(results)) if job.stage == "inspect")
    finish(inspected)
    topology_record(layers=2).write(inspected.record)
    every = [job for job in jobs(CONFIG, str(results)) if job != inspected]
    for job in every[:5]:
        finish(job)
    left = course(results)
    assert 0 < left.share < 1 and left.seconds_left < start.seconds_left and " left" in words(left)
    for job in every[5:]:
        finish(job)
    end = course(results)
    assert (end.done, end.share, end.seconds_left) == (end.total, 1.0, 0.0) and end.total == len(every) + 1


SAYS = "import sys; print('one', sys.argv[1:]); print('two', file=sys.stderr); sys.exit(3)"


def test_without_a_terminal_the_command_speaks_for_itself():
    command = [sys.executable, "-m", "armor", "progress", "--", sys.executable, "-c", SAYS, "--cores", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert (done.returncode, done.stdout, done.stderr) == (3, "one ['--cores', '2']\n", "two\n")


def test_on_a_terminal_what_is_said_goes_above_the_line():
    command = [sys.executable, "-m", "armor", "progress", "--", sys.executable, "-c", SAYS, "--cores", "2"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # Linux says so that the other end is closed
        pass
    assert process.wait(3600) == 3
    text = shown.decode()
    assert "one ['--cores', '2', '--quiet', 'all']\r\n" in text and "two\r\n" in text and "starting" in text


def test_a_command_that_is_killed_is_told_as_a_shell_does():
    kills_itself = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    command = [sys.executable, "-m", "armor", "progress", "--", sys.executable, "-c", kills_itself]
    assert subprocess.run(command, capture_output=True, timeout=3600).returncode == 137


def test_a_command_that_is_not_there_is_one_line():
    with pytest.raises(ArmorError, match="no-such-snakemake: cannot be started .*; expected snakemake"):
        follow(["no-such-snakemake"])


def test_the_command_that_is_kept_is_the_one_that_was_typed():
    assert typed(["snakemake", "--cores", "2", "--quiet", "all"]) == ["snakemake", "--cores", "2"]
