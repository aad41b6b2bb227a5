"""The fork server: a command that it runs is the command, in what it says, how it ends, and when it is killed."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from armor.command import forkserver

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 3600  # only if it hangs


@contextlib.contextmanager
def started():
    """A server, which ends with the process that started it: that process, and the variable that it set."""
    code = (
        "import os, sys; from armor.command import forkserver; forkserver.start(); "
        "print(os.environ[forkserver.VARIABLE], flush=True); sys.stdin.read()"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment) as parent:
        yield parent, parent.stdout.readline().decode().strip()


@pytest.fixture(scope="module")
def one():
    with started() as server:
        yield server


@pytest.fixture
def server(one, monkeypatch):
    """The environment of commands while a server runs, the same for all tests that leave it as it is."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv(forkserver.VARIABLE, one[1])
    return one[0]


@pytest.fixture
def own_server(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    with started() as (parent, variable):
        monkeypatch.setenv(forkserver.VARIABLE, variable)
        yield parent


def armor(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "armor", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def process_of(parent):
    """The server's own process: the child of the one that started it."""
    return psutil.Process(parent.pid).children()[0]


def ends(condition):
    limit = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.fixture
def blocked(server, tmp_path):
    """A command whose job reads from a pipe into which nobody writes, and the processes that the server forked."""
    os.mkfifo(tmp_path / "pipe")
    files = ("--source", ".", "--topology", ".", "--calibration", "pipe", "--output", "layer.safetensors")
    command = armor("factorize", "--layer", "0", *files, cwd=tmp_path)
    forks = partial(process_of(server).children, recursive=True)
    ends(lambda: len(forks()) == 2)
    yield command, forks
    command.kill()
    command.communicate()


@pytest.mark.parametrize(
    "arguments", [("factorize", "--help"), ("factorize", "--layer", "x"), ("evaluate", "--model", "none")]
)
def test_a_command_says_and_returns_what_it_does_without_the_server(server, tmp_path, arguments, monkeypatch):
    there = armor(*arguments, cwd=tmp_path)
    said = there.communicate(timeout=SECONDS)
    monkeypatch.delenv(forkserver.VARIABLE)
    here = armor(*arguments, cwd=tmp_path)
    assert here.communicate(timeout=SECONDS) == said and there.returncode == here.returncode


def test_a_job_s_log_holds_no_progress_bars(server, root, tmp_path):
    """Of libraries that read what they are told when they are imported."""
    (tmp_path / "words.txt").write_text("a fox and a hound " * 200)
    settings = {"text": {"files": [str(tmp_path / "words.txt")]}, "sequences": 1, "sequence_length": 16}
    files = ["--model", str(root / "checkpoint.json"), "--output", str(tmp_path / "words.json")]
    command = armor("evaluate", *files, "--settings", json.dumps(settings))
    _, said = command.communicate(timeout=SECONDS)
    assert command.returncode == 0 and said and "it/s" not in said and "%|" not in said, said


def test_it_is_the_server_that_runs_it(blocked, tmp_path):
    command, forks = blocked
    ends(lambda: forks()[-1].cwd() == str(tmp_path))
    waits = psutil.Process(command.pid)
    assert not waits.children() and not any("torch" in library.path for library in waits.memory_maps())


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_killed_command_takes_its_job_with_it(blocked, how):
    command, forks = blocked
    command.send_signal(signal.Signals[how])
    assert command.wait(timeout=SECONDS) == -signal.Signals[how]
    ends(lambda: not forks())


def test_a_killed_job_ends_its_command_in_the_same_way(blocked):
    command, forks = blocked
    forks()[-1].kill()
    assert command.wait(timeout=SECONDS) == -signal.SIGKILL
    ends(lambda: not forks())


def test_a_command_whose_job_is_lost_fails_with_one_line(blocked):
    command, forks = blocked
    supervisor, job = forks()
    supervisor.kill()
    assert command.wait(timeout=SECONDS) == 1
    job.kill()
    assert command.communicate() == ("", "armor: error: the process that watched this job was killed; run it again\n")


def test_without_the_server_the_command_works_by_itself(own_server):
    process_of(own_server).kill()
    assert armor("factorize", "--help").wait(timeout=SECONDS) == 0


def test_a_command_of_another_environment_works_by_itself(server, monkeypatch):
    process_of(server).suspend()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(REPOSITORY), "elsewhere")))
    assert armor("factorize", "--help").wait(timeout=SECONDS) == 0
    process_of(server).resume()


def test_the_server_ends_with_the_process_that_started_it(own_server):
    process = process_of(own_server)
    own_server.kill()
    process.wait(timeout=SECONDS)


@pytest.mark.parametrize("module", forkserver.preloaded())
def test_what_it_imports_is_there(module):
    """The server itself passes over what it cannot import: the job says what is missing."""
    assert importlib.util.find_spec(module)


def test_what_it_imports_makes_no_lock_that_jobs_would_share():
    """A job that is killed while it holds one, as that of tqdm's bars, would stop all later ones."""
    modules = "; ".join(f"import {module}" for module in forkserver.preloaded())
    said = f"{modules}; import tqdm.std; assert not hasattr(tqdm.std.TqdmDefaultWriteLock, 'mp_lock')"
    subprocess.run([sys.executable, "-c", said], check=True)


def test_where_a_gpu_is_visible_there_is_no_server(monkeypatch):
    monkeypatch.delenv(forkserver.VARIABLE, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    forkserver.start()
    assert forkserver.VARIABLE not in os.environ
