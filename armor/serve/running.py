"""A server of vLLM for as long as this process needs it: it starts, answers, tells its memory, and is gone."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import psutil

from armor.core.errors import ArmorError
from armor.serve import watch
from armor.serve.server import environment, vllm_command

__all__ = ["CAUSE", "ENVIRONMENT", "Server", "failure", "memory_bytes", "server"]

DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""No proxy reaches this machine's own door."""

ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1"}
"""What vLLM is told where the user does not say it."""
CAUSE = re.compile(r"^(?:\(.*?\) ERROR .*?\] )?(?:[\w.]+Refused: |(?=[\w.]+Error: ))(.+(?:\n  .+)?)$", re.MULTILINE)
"""The first error of a traceback, in a line of vLLM's log or alone: those after it come from it. What pydantic found
stands in the line below."""


class Server(NamedTuple):
    """A server that answers at `url`, with its process, and the seconds until it did."""

    url: str
    process: psutil.Process
    start_seconds: float

    def context(self) -> int:
        """The tokens of its context, those of an answer among them."""
        with DIRECTLY.open(f"{self.url}/v1/models", timeout=60) as answer:
            return json.load(answer)["data"][0]["max_model_len"]


def _log(said: IO[str]) -> str:
    """Write to the job's log what a program said, and return it."""
    said.seek(0)
    text = said.read()
    sys.stderr.write(text)
    return text


def failure(folder: Path, said: IO[str]) -> ArmorError:
    """The error for a program that ended; all that it said goes to the job's log."""
    text = _log(said)
    found = CAUSE.search(text)
    reason = " ".join(found[1].split()) if found else next(filter(None, reversed(text.splitlines())), "it said nothing")
    return ArmorError(f"{folder}: vLLM does not serve it: {reason}")


def _is_up(url: str) -> bool:
    try:
        return DIRECTLY.open(f"{url}/health", timeout=5).status == 200
    except OSError:
        return False


@contextlib.contextmanager
def server(folder: Path, name: str, options: Sequence[str]) -> Iterator[Server]:
    """vLLM's server on `folder`, as model `name`, from when it answers; it ends with the context, or with this process,
    even one that is killed.

    Raises ArmorError, with its cause, where it ends before it answers. After an error in the context its log goes to
    the job's.
    """
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    command = vllm_command(folder, name, "127.0.0.1", port, options)
    url, start = f"http://127.0.0.1:{port}", time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", watch.__name__, *command],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT | environment(options) | {"VLLM_API_KEY": ""},  # whoever asks it has none
        )
        failed, before = False, signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is below happens
        try:
            while not _is_up(url):
                if process.poll() is not None:
                    raise failure(folder, said)
                time.sleep(0.2)
            running = Server(url, psutil.Process(process.pid).children()[0], time.perf_counter() - start)
            try:
                yield running
            except Exception:
                failed = True
                raise
        finally:
            process.communicate()  # closes the pipe
            signal.signal(signal.SIGTERM, before)
            if failed:  # it may be the cause
                _log(said)


def _tree(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


def memory_bytes(process: psutil.Process) -> int:
    """What a process and its children hold; of pages that others hold too their share, where the system can tell."""
    total = 0
    for one in _tree(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            held = one.memory_full_info()
            total += getattr(held, "pss", held.uss)
    return total
