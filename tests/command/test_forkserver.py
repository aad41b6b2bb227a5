"""The fork server: a command that it runs is the command, in what it says, how it ends, and when it is killed."""

import contextlib
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
def server():
    """The process that started a server, which the commands of the test find."""
    with started() as (parent, variable), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv(forkserver.VARIABLE, variable)
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


def test_a_job_s_log_holds_no_progress_bars(server, root, tmp_path):
    """Of libraries that read what they are told when they are imported, so a real server must have imported them."""
    (tmp_path / "words.txt").write_text("a fox and a hound " * 200)
    settings = {"text": {"files": [str(tmp_path / "words.txt")]}, "sequences": 1, "sequence_length": 16}
    files = ["--model", str(root / "checkpoint.json"), "--output", str(tmp_path / "words.json")]
    command = armor("evaluate", *files, "--settings", json.dumps(settings))
    _, said = command.communicate(timeout=SECONDS)
    assert command.returncode == 0 and said and "it/s" not in said and "%|" not in said, said


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


def test_a_command_says_and_returns_what_it_does_without_the_server(server, tmp_path, monkeypatch):
    """So does one whose server has ended with the process that started it."""
    commands = [armor("evaluate", "--model", "none", cwd=tmp_path)]
    with started() as (parent, variable):
        process = process_of(parent)
        parent.kill()
        process.wait(timeout=SECONDS)
    monkeypatch.setenv(forkserver.VARIABLE, variable)
    commands.append(armor("evaluate", "--model", "none", cwd=tmp_path))
    there, here = ((*command.communicate(timeout=SECONDS), command.returncode) for command in commands)
    assert there == here and there[1] and there[2]


def test_where_a_gpu_is_visible_there_is_no_server(monkeypatch):
    monkeypatch.delenv(forkserver.VARIABLE, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    forkserver.start()
    assert forkserver.VARIABLE not in os.environ
