"""Commands in a fork of the test's process: what they say and return, without the time that importing torch takes.

So is the server that a command of the workflow starts for its jobs.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SERVER = "armor.command.forkserver"
real_popen = subprocess.Popen


def popen(command: Any, *arguments: Any, **options: Any) -> subprocess.Popen | None:
    """What subprocess.Popen does, but the server of forks begins with all that this process has imported."""
    if command[1:3] != ["-m", SERVER]:
        return real_popen(command, *arguments, **options)
    if os.fork() == 0:
        listening = os.dup2(int(command[3]), 3)
        os.dup2(options["stdin"], 0)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))  # the other end of its standard input above all
        _standard_streams()
        os.environ.clear()
        os.environ.update(options["env"])
        sys.argv = ["-m", str(listening)]
        sys.modules.pop(SERVER, None)
        runpy.run_module(SERVER, run_name="__main__")
        os._exit(1)
    return None


def _standard_streams() -> None:
    sys.stdin = open(0, closefd=False)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))


def fork(
    work: Callable[[], object], folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Do `work` in `folder`, in a process of its own that begins with all that this one has imported.

    Returns its number, exit code and what it said.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for descriptor, file in enumerate((out, said), 1):
                    os.dup2(file.fileno(), descriptor)
                _standard_streams()
                subprocess.Popen = popen
                if "torch" in sys.modules:  # a fork has no pool of threads, and to wait for one would never end
                    sys.modules["torch"].set_num_threads(1)
                if "tqdm" in sys.modules:  # all forks share the parent's lock
                    sys.modules["tqdm"].tqdm.set_lock(threading.RLock())
                os.chdir(folder)
                os.environ.update(environment or {})
                work()
                code = 0
            except SystemExit as ended:
                code = int(ended.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [file.seek(0) or file.read() for file in (out, said)]
    return subprocess.CompletedProcess(child, code, *texts)


def armor(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess:
    """The `armor` command in `folder`."""

    def work() -> None:
        import logging

        from armor.command import cli

        logging.getLogger().handlers.clear()  # pytest's; the command says where its own go
        sys.argv = ["armor", *map(str, arguments)]
        cli.main()

    return fork(work, folder)
