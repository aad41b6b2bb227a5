"""The line of progress: how far a run is from its files alone, and Snakemake's words and status passed on."""

import os
import pty
import subprocess
import sys

import pytest

from armor.config.run import Config
from armor.core.errors import ArmorError
from armor.format.records.topology import DecoderLayer, Topology
from armor.run.jobs import Job, jobs
from armor.run.progress import Course, follow, typed, words
from armor.run.stages import STAGES

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
TOPOLOGY = Topology(
    model_type="llama",
    fingerprint="f",
    dtype="float32",
    context_length=8,
    hidden_size=4,
    parameters=1,
    linear_parameters=1,
    decoder_parameters=1,
    tied_embeddings=False,
    layers=(),
)
BEGAN = 1_000_000.0


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def finish(job: Job, seconds: float, ended: float = BEGAN + 100) -> None:
    """Leave the files of a job that took so long."""
    for path in (*job.outputs, job.measured):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    job.measured.write_text(f"s\tmax_rss\n{seconds}\t10\n")
    os.utime(job.measured, (ended, ended))


def course(results, slots=1) -> Course:
    found = Course(results, CONFIG, BEGAN, slots)
    found.look(BEGAN + 100)
    return found


def of(stage: str, results) -> list[Job]:
    return [job for job in jobs(CONFIG, str(results)) if job.stage == stage]


def test_nothing_is_done_at_the_beginning_and_all_at_the_end(results):
    start = course(results)
    assert (start.done, start.share, start.running) == (0, 0.0, [])
    stages = {job.stage for job in jobs(CONFIG, str(results))}
    assert start.seconds_left > sum(STAGES[stage].seconds for stage in stages) and start.total > 30
    every = [job for job in jobs(CONFIG, str(results)) if job.stage not in ("inspect", "factorize")]
    for job in every:
        finish(job, 2.0)
    left = course(results)
    assert left.done == len(every) and 0 < left.share < 1 and left.seconds_left < start.seconds_left
    inspected = of("inspect", results)[0]
    finish(inspected, 2.0)
    layers = tuple(DecoderLayer(index=index, prefix=f"layers.{index}", linears=()) for index in range(2))
    inspected.record.write_text(TOPOLOGY.model_copy(update={"layers": layers}).model_dump_json())
    for job in of("factorize", results):
        finish(job, 2.0)
    end = course(results)
    assert (end.done, end.share, end.seconds_left) == (end.total, 1.0, 0.0) and end.total == len(every) + 1 + 4


def test_a_stage_costs_what_its_jobs_cost_and_others_in_proportion(results):
    """Nothing but evaluations have ended, at thrice the typical cost: so all that is left is thrice as dear."""
    start = course(results).seconds_left
    own = of("evaluate", results)
    for job in own[:2]:
        finish(job, 3 * STAGES["evaluate"].seconds)
    assert course(results).seconds_left == pytest.approx(3 * (start - 2 * STAGES["evaluate"].seconds))
    finish(of("benchmark", results)[0], 3 * STAGES["benchmark"].seconds)
    left = start - 2 * STAGES["evaluate"].seconds - STAGES["benchmark"].seconds
    assert course(results).seconds_left == pytest.approx(3 * left)


def test_the_networks_speed_says_nothing_about_the_machine(results):
    start = course(results).seconds_left
    finish(of("fetch", results)[0], 500.0)
    assert course(results).seconds_left == pytest.approx(start - STAGES["fetch"].seconds)


def test_what_was_reused_is_no_work_of_this_run(results):
    finish(of("calibrate", results)[0], 40.0, ended=BEGAN - 5)
    assert course(results).share == 0.0
    finish(of("predict", results)[0], 40.0)
    assert course(results).share > 0.0


def test_layers_run_side_by_side(results):
    one, two = course(results, slots=1), course(results, slots=2)
    layers = STAGES["factorize"].seconds * 60 + 0.15 * 100 * 30
    assert one.seconds_left - two.seconds_left == pytest.approx(layers / 2)


def test_a_job_that_runs_is_named_and_gets_nearer_to_its_end(results):
    job = of("predict", results)[0]
    job.log.parent.mkdir(parents=True)
    job.log.touch()
    found = course(results)
    before = found.seconds_left
    found.look(BEGAN + 110)
    assert found.running == [job] and before - found.seconds_left == pytest.approx(10)
    found.look(BEGAN + 10_000)
    assert before - found.seconds_left == pytest.approx(STAGES["predict"].seconds)
    assert words(found).endswith("predict tiny words")


@pytest.mark.parametrize(
    "seconds, said", [(0, "5 s left"), (42, "40 s left"), (100, "2 min left"), (3600, "60 min left")]
)
def test_the_time_left_is_said_as_people_would(results, seconds, said):
    found = course(results)
    found.seconds_left = seconds
    assert said in words(found) and words(found).startswith(f"0 of {found.total} jobs")


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
    assert typed(["snakemake", "-n"]) == ["snakemake", "-n"]
