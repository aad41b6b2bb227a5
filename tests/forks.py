"""Commands in a fork of the test's process: what they say and return, without the time that importing torch takes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["armor", "fork"]


def fork(
    work: Callable[[], object], folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Do `work` in `folder`, in a process of its own that begins with all that this one has imported.

    Returns its exit code and what it said.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for descriptor, file in enumerate((out, said), 1):
                    os.dup2(file.fileno(), descriptor)
                sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
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
    return subprocess.CompletedProcess("fork", code, *texts)


def armor(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess:
    """The `armor` command in `folder`."""

    def work() -> None:
        import logging

        from armor.command import cli

        logging.getLogger().handlers.clear()  # pytest's; the command says where its own go
        sys.argv = ["armor", *map(str, arguments)]
        cli.main()

    return fork(work, folder)
